"""The artefact store in an S3 bucket, against a server that speaks S3; the same verbs as the directory's."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

import httpx
import obstore
import pytest
from conftest import Database
from key_store import file_keys
from tiny import tiny_backbone
from world import make_world

from service.evidence.verify import verify
from service.store.artifacts import ArtifactMissingError, Artifacts, Files, open_artifacts
from service.store.bucket import Bucket, BucketError
from service.store.directory import Directory
from service.store.file_keys import FileKeys
from service.store.sealing import unseal
from shards.errors import ArtifactDigestError
from workers import steps
from workers.barrier import Barrier
from workers.reaper import Reaper
from workers.training import train_queued

pytest_plugins = ("moto_server",)
pytestmark = pytest.mark.integration
SECRET = b"Bea Example lives in Main Street"


@pytest.fixture
def s3(aws_environment: str) -> str:
    return aws_environment


@pytest.fixture
def bucket(s3: str) -> str:
    """The name of an empty bucket, without versions."""
    name = f"b{uuid4().hex[:20]}"
    httpx.put(f"{s3}/{name}", headers=SIGNED).raise_for_status()
    return name


SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=none/20260101/us-east-1/s3/aws4_request"}


def set_versioning(s3: str, bucket: str, status: str) -> None:
    body = f"<VersioningConfiguration><Status>{status}</Status></VersioningConfiguration>"
    httpx.put(f"{s3}/{bucket}?versioning", content=body, headers=SIGNED).raise_for_status()


@pytest.fixture(params=["directory", "bucket"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    if request.param == "directory":
        return Directory(tmp_path / "files")
    return Bucket(f"s3://{request.getfixturevalue('bucket')}/below/a/prefix")


def test_both_stores_keep_the_same_promises(files: Files) -> None:
    assert files.names(older_than=-60) == []
    with pytest.raises(FileNotFoundError):
        files.get("a/1")
    assert not files.exists("a/1")
    files.delete("a/1")
    files.put("a/1", b"one")
    files.put("a/b/2", b"two")
    files.put("ab/3", b"")
    with pytest.raises(FileExistsError):
        files.put("a/1", b"other")
    assert [files.get(name) for name in ("a/1", "a/b/2", "ab/3")] == [b"one", b"two", b""]
    assert files.exists("a/1")
    assert files.names(older_than=-60) == ["a/1", "a/b/2", "ab/3"]
    assert files.names(older_than=60) == []
    assert files.names_below("a") == ["a/1", "a/b/2"]
    files.delete("a/1")
    files.delete("a/1")
    assert not files.exists("a/1")
    assert files.names(older_than=-60) == ["a/b/2", "ab/3"]


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers a conditional write in two steps, which another write may come between: no bucket does."""
    lock, put = Lock(), obstore.put

    def alone(*args: Any, **options: Any) -> Any:
        with lock:
            return put(*args, **options)

    monkeypatch.setattr(obstore, "put", alone)


@pytest.mark.usefixtures("one_at_a_time")
def test_one_writer_wins_and_a_replacement_needs_what_it_replaces(files: Files) -> None:
    def attempt(number: int) -> bool:
        try:
            files.put("one", b"%d" % number)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(24))) == 1
    for expected in (None, b"not that"):
        with pytest.raises(FileExistsError):
            files.replace("one", b"next", expected=expected)
    files.replace("one", b"next", expected=files.get("one"))
    files.replace("two", b"first", expected=None)
    assert (files.get("one"), files.get("two")) == (b"next", b"first")


def test_a_bucket_that_keeps_old_versions_is_refused_unless_their_end_is_declared(
    s3: str, bucket: str, tmp_path: Path
) -> None:
    keys = file_keys(tmp_path / "artifacts")
    assert open_artifacts(f"s3://{bucket}", keys).names(older_than=-60) == []
    for status in ("Enabled", "Suspended"):
        set_versioning(s3, bucket, status)
        if status == "Enabled":
            for url in (f"s3://{bucket}", f"s3://{bucket}/x", f"s3://{bucket}?version_days=", f"s3://{bucket}?x=3"):
                with pytest.raises(BucketError, match=r"no erasure can be certified.*version_days=N"):
                    open_artifacts(url, keys)
        store = open_artifacts(f"s3://{bucket}?version_days=30", keys)
        store.put(f"cells/{status}", SECRET)
        assert store.get(f"cells/{status}") == SECRET


def test_old_versions_of_what_was_destroyed_do_not_open(s3: str, bucket: str, tmp_path: Path) -> None:
    set_versioning(s3, bucket, "Enabled")
    store = open_artifacts(f"s3://{bucket}?version_days=30", file_keys(tmp_path / "artifacts"))
    store.put("cells/a/1", SECRET)
    store.put("cells/b/2", b"somebody else's")
    store.delete("cells/a/1")
    assert not store.exists("cells/a/1")
    listed = httpx.get(f"{s3}/{bucket}?versions&prefix=cells/a/1", headers=SIGNED).text
    version = listed.split("<Version>")[1].split("<VersionId>")[1].split("<")[0]
    old = httpx.get(f"{s3}/{bucket}/cells/a/1?versionId={version}", headers=SIGNED).content
    assert len(old) > len(SECRET)
    assert SECRET not in old
    keys = [path.read_bytes() for path in (tmp_path / "file-keys").rglob("*") if path.is_file()]
    for key in (each for each in keys if len(each) == 32):
        with pytest.raises(ArtifactDigestError):
            unseal(key, "cells/a/1", old)
    assert store.get("cells/b/2") == b"somebody else's"
    store.files.put("cells/a/1", old)  # the old version put back
    with pytest.raises(ArtifactMissingError):
        store.get("cells/a/1")


def test_a_bucket_that_is_not_there_is_an_error_of_the_store(bucket: str) -> None:
    with pytest.raises(BucketError, match="make it, or check EXPUNGE_ARTIFACT_URL"):
        Bucket(f"s3://{bucket}-not-there")


def test_a_server_that_is_away_is_an_error_that_callers_expect(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:1")
    with pytest.raises(OSError, match="does not answer as it should"):
        Bucket(f"s3://{bucket}")


def test_a_deletion_from_end_to_end(
    database: Database, tmp_path: Path, bucket: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(database, tmp_path, tiny_backbone(tmp_path / "backbone", layers=3, width=16))
    keys = FileKeys(tmp_path / "file-keys")
    store = Artifacts(Bucket(f"s3://{bucket}/expunge"), FileKeys(_fresh(tmp_path / "bucket-keys")))
    world.context = replace(world.context, artifacts=store)
    world.add({f"person{number}": [f"p{number}"] for number in range(12)})
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    before = set(store.names(older_than=-60))
    assert before
    request_id = world.ask("person2")
    steps.plan_targets(world.context, world.model_id)
    Barrier(world.pool, margin=0.05).look()
    steps.erase_target(world.context, request_id, world.model_id)
    world.log()
    steps.certify_target(world.context, request_id, world.model_id)
    assert keys.count() == 0
    (state,) = world.row("SELECT state FROM request_target WHERE request_id = %s", request_id)
    gone = {name for (name,) in world.rows("SELECT object_name FROM artifact WHERE state = 'destroyed'")}
    assert gone & before
    assert not gone & set(store.names(older_than=-60))
    assert state == "completed"
    rows = world.rows("SELECT envelope FROM certificate WHERE request_id = %s", request_id)
    assert all(check.passed for (envelope,) in rows for check in verify(envelope, world.public_key))
    store.put("cells/stray/1", SECRET)
    monkeypatch.setattr("workers.reaper.ABANDONED_SECONDS", -60)
    assert "cells/stray/1" in Reaper(world.pool, store, job_attempts=2).remove_strays()
    world.pool.close()
    assert httpx.get(f"{s3}/{bucket}?list-type=2", headers=SIGNED).text.count("<Key>") == len(
        store.names(older_than=-60)
    ) + 1  # fmt: skip


def _fresh(directory: Path) -> Path:
    directory.mkdir(mode=0o700)
    return directory
