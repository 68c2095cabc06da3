"""Keys of files wrapped by a key management service: what lies in the key store is no key without it."""

import shutil
from pathlib import Path

import boto3
import pytest
from key_store import file_keys

from service.store.artifacts import ArtifactMissingError, open_artifacts
from service.store.file_keys import FileKeys, FileKeysError, open_file_keys
from service.store.key_wrapping import WrappingError
from service.store.sealing import unseal
from shards.errors import ArtifactDigestError

pytest_plugins = ("moto_server",)
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("aws_environment")]
SECRET = b"Bea Example lives in Main Street"


@pytest.fixture
def master(aws_environment: str) -> str:
    assert aws_environment
    return boto3.client("kms").create_key()["KeyMetadata"]["KeyId"]


@pytest.fixture
def url(tmp_path: Path, master: str) -> str:
    return f"{file_keys(tmp_path / 'artifacts')}?kms={master}"


def test_objects_open_through_the_service_and_not_by_the_key_store_alone(url: str, tmp_path: Path) -> None:
    store = open_artifacts((tmp_path / "artifacts").as_uri(), url)
    store.put("cells/a/1", SECRET)
    assert store.get("cells/a/1") == SECRET
    assert open_artifacts((tmp_path / "artifacts").as_uri(), url).get("cells/a/1") == SECRET
    key = open_file_keys(url).get("cells/a/1")
    assert key is not None
    files = [path.read_bytes() for path in (tmp_path / "file-keys").rglob("*") if path.is_file()]
    assert not [data for data in files if key in data]
    bare = FileKeys(tmp_path / "file-keys").get("cells/a/1")
    assert bare != key
    with pytest.raises((ArtifactDigestError, ValueError)):
        unseal((bare or b"")[:32], "cells/a/1", store.files.get("cells/a/1"))
    store.delete("cells/a/1")
    assert not store.exists("cells/a/1")
    with pytest.raises(ArtifactMissingError):
        store.get("cells/a/1")


def test_a_wrapped_key_is_one_files_only(url: str, tmp_path: Path) -> None:
    keys = open_file_keys(url)
    open_artifacts((tmp_path / "artifacts").as_uri(), url)
    keys.create("one")
    keys.create("two")
    one, two = sorted(path for path in (tmp_path / "file-keys").glob("*/*"))
    shutil.copyfile(one, two)
    opened = 0
    for name in ("one", "two"):
        try:
            opened += keys.get(name) is not None
        except WrappingError as error:
            assert "does not decrypt" in str(error)  # noqa: PT017 - which of the two depends on their digests
    assert opened == 1


def test_a_destruction_that_was_interrupted_leaves_no_key(url: str, tmp_path: Path) -> None:
    keys = open_file_keys(url)
    keys.begin()
    keys.create("one")
    (path,) = (tmp_path / "file-keys").glob("*/*")
    path.write_bytes(bytes(path.stat().st_size))
    assert keys.get("one") is None
    with pytest.raises(FileExistsError, match="never reused"):
        keys.create("one")
    keys.destroy("one")
    assert not keys.exists("one")


def test_a_service_that_does_not_answer_is_said(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file_keys(url).begin()
    open_file_keys(url).create("one")
    unknown = open_file_keys(url.partition("?")[0] + "?kms=alias/none")
    with pytest.raises(WrappingError, match="does not encrypt"):
        unknown.create("two")
    assert len(list((tmp_path / "file-keys").glob("*/*"))) == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(WrappingError, match="check EXPUNGE_FILE_KEYS_URL"):
        open_file_keys(url).get("one")


def test_without_its_library_the_message_says_what_to_install(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "service.store.key_wrapping", None)
    with pytest.raises(FileKeysError, match=r"expunge\[kms\]"):
        open_file_keys(url)
