import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from certificate_sample import (
    KEY,
    PEM,
    artifact_bytes,
    artifact_digest,
    manifest,
    payload_bytes,
    restricted,
    sample,
)
from typer.testing import CliRunner

from service.cli.verify import verify as command
from service.evidence.certificate import issue
from service.evidence.verify import Check, verify

ROOT = Path(__file__).parent.parent
runner = CliRunner()


def run(*arguments: Any) -> Any:
    app = typer.Typer()
    app.command()(command)
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A certificate, its key, and the artefact store as it is afterwards."""
    (tmp_path / "certificate.json").write_text(json.dumps(issue(sample(), KEY), indent=2))
    (tmp_path / "signing.pub").write_bytes(PEM)
    for stage in sample().served_stages:
        path = tmp_path / "store" / "stages" / stage.key / artifact_digest(stage) / "0"
        path.parent.mkdir(parents=True)
        path.write_bytes(artifact_bytes(stage))
    return tmp_path


def directory_check(files: Path) -> Check:
    return verify(issue(sample(), KEY), PEM, artifacts=files / "store")[-1]


def test_lines_and_exit_code(files: Path) -> None:
    done = run(files / "certificate.json", "--key", files / "signing.pub", "--artifacts", files / "store")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) == 26
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert "re-derived" in done.stdout
    assert "4 files, none destroyed; 4 of 4 served artefacts are there" in done.stdout
    assert lines[-1].startswith("all 25 checks passed")


def test_json(files: Path) -> None:
    done = run(files / "certificate.json", "--key", files / "signing.pub", "--json")
    body = json.loads(done.stdout)
    assert done.exit_code == 0
    assert body["passed"] is True
    assert body["checks"][2]["name"] == "signature"
    assert set(body["checks"][2]) == {"name", "passed", "detail", "strength"}


def test_a_tampered_file_fails(files: Path) -> None:
    path = files / "certificate.json"
    envelope = json.loads(path.read_text())
    envelope["payload"] = envelope["payload"].replace("A", "B", 1)
    path.write_text(json.dumps(envelope))
    done = run(path, "--key", files / "signing.pub")
    assert done.exit_code == 1
    assert "FAILED  signature" in done.stdout
    assert "do not rely" in done.stdout


@pytest.mark.parametrize("content", [b"", b"\xff", b'{"payload":', b'{"payload":"","payload":""}', b"[" * 99_999])
def test_a_file_that_is_no_json_fails_as_an_envelope(files: Path, content: bytes) -> None:
    (files / "certificate.json").write_bytes(content)
    done = run(files / "certificate.json", "--key", files / "signing.pub")
    assert done.exit_code == 1
    assert "FAILED  envelope" in done.stdout


def test_missing_files_say_so(files: Path) -> None:
    key, certificate = files / "signing.pub", files / "certificate.json"
    for arguments, words in (
        ((files / "none.json", "--key", key), "cannot read the certificate"),
        ((certificate, "--key", files / "none.pub"), "cannot read the public key"),
        ((files, "--key", key), "Is a directory"),
        ((certificate, "--key", key, "--artifacts", files / "none"), "is not a directory"),
        ((certificate, "--key", key, "--artifacts", certificate), "is not a directory"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert not done.stdout


def test_a_destroyed_object_that_is_still_there_is_found(files: Path) -> None:
    name = sample().tainted_objects[0].object_name
    (files / "store" / name).parent.mkdir(parents=True)
    (files / "store" / name).write_bytes(b"even with other content")
    assert not directory_check(files).passed
    assert "still there" in directory_check(files).detail
    (files / "store" / name).unlink()
    assert directory_check(files).passed
    (files / "store" / name).symlink_to("nowhere")
    assert not directory_check(files).passed


def test_what_lies_under_a_tainted_stage_is_found(files: Path) -> None:
    """A sealed copy has other bytes; a paused trainer's late upload has another name."""
    path = files / "store" / "stages" / sample().tainted_stages[0].key / ("0" * 64) / "late.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"sealed")
    assert "belongs to a tainted stage" in directory_check(files).detail


def test_a_key_that_is_still_there_is_found(files: Path) -> None:
    def found() -> Check:
        return verify(issue(sample(), KEY), PEM, file_keys=files / "keys")[-1]

    digest = hashlib.sha256(sample().payloads[0].object_name.encode()).hexdigest()
    place = files / "keys" / digest[:2] / digest
    place.parent.mkdir(parents=True)
    assert "is it the key store?" in found().detail
    (files / "keys" / "store").write_text("mark")
    assert (found().passed, found().detail) == (True, "7 keys looked for, none there")
    for name in (digest, f".{digest}.0.part"):
        left = place.with_name(name)
        left.write_bytes(bytes(32))
        assert "is still there" in found().detail
        left.write_bytes(b"")  # its destruction was interrupted after the bytes were gone
        assert found().passed
    assert "nothing to look for" in verify(issue(restricted(), KEY), PEM, file_keys=files / "keys")[-1].detail


def test_a_copy_under_another_name_is_found(files: Path) -> None:
    for content in (payload_bytes(0), artifact_bytes(sample().tainted_stages[2])):
        copy = files / "store" / "cells" / ".aside.part"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)
        found = directory_check(files)
        assert not found.passed
        assert "cells/.aside.part has the content of a destroyed object" in found.detail


def test_another_directory_does_not_pass_for_the_store(files: Path) -> None:
    empty = files / "empty"
    empty.mkdir()
    found = verify(issue(sample(), KEY), PEM, artifacts=empty)[-1]
    assert not found.passed
    assert "is it the artefact store?" in found.detail
    (empty / "note").write_text("a file of someone else's")
    assert "0 of 4 served artefacts" in verify(issue(sample(), KEY), PEM, artifacts=empty)[-1].detail


def test_a_file_that_cannot_be_read_fails(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied", "store/x")

    monkeypatch.setattr("service.evidence.destruction.hashlib.file_digest", forbidden)
    assert "Permission denied" in directory_check(files).detail


def test_a_directory_that_cannot_be_listed_fails(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def forbidden(path: Any) -> Any:
        if Path(path).name == "cells":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (files / "store" / "cells").mkdir(exist_ok=True)
    monkeypatch.setattr("os.scandir", forbidden)
    assert "Permission denied" in directory_check(files).detail


def test_a_store_in_use_may_lose_files_but_gains_no_destroyed_one_unseen(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that was paused finishes its upload while the store is read: the listed name goes, another comes."""
    name = sample().tainted_objects[0].object_name
    upload = files / "store" / "stages" / ".0.part"
    upload.parent.mkdir(exist_ok=True)
    upload.write_bytes(b"weights")
    real = hashlib.file_digest
    (files / "store" / name).parent.mkdir(parents=True, exist_ok=True)

    def finishing(file: Any, kind: str) -> Any:
        if upload.exists():
            upload.rename(files / "store" / name)
        return real(file, kind)

    monkeypatch.setattr("service.evidence.destruction.hashlib.file_digest", finishing)
    assert "is still there" in directory_check(files).detail
    (files / "store" / name).rename(upload)
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: (upload.unlink(missing_ok=True), opened(path, mode))[1])
    assert directory_check(files).passed
    assert not upload.exists()


def test_a_restriction_leaves_the_store_alone(files: Path) -> None:
    checks = verify(issue(restricted(), KEY), PEM, artifacts=files / "store")
    assert all(check.passed for check in checks)
    assert "nothing to look for" in checks[-1].detail


def test_progress_ends_at_the_total(files: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(issue(sample(), KEY), PEM, artifacts=files / "store", on_bytes=lambda *step: seen.append(step))
    assert len(seen) == 4
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_it_loads_no_torch_database_or_network_and_opens_no_socket(files: Path) -> None:
    program = f"""
import socket, sys
def refuse(*_, **__): raise AssertionError("a socket")
socket.socket = socket.create_connection = refuse
from pathlib import Path
from service.cli.verify import verify
try:
    verify(Path({str(files / "certificate.json")!r}), [Path({str(files / "signing.pub")!r})],
           supplements=None, checkpoint=None, ledger=None, artifacts=Path({str(files / "store")!r}), file_keys=None,
           recipe=None, json=False)
except BaseException as end:
    assert getattr(end, "exit_code", None) == 0, end
heavy = {{"torch", "psycopg", "httpx", "redis", "celery", "fastapi", "numpy", "pydantic", "requests"}}
writer = {{"service.evidence." + name for name in (
    "certificate", "rows", "wording", "dsse", "keys", "events", "statement", "membership", "supplement",
    "leaves", "merkle", "note", "tree_head", "tiles", "ledger_check")}}
print("loaded:", sorted((heavy | writer) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_manifests_of_the_sample_differ() -> None:
    assert manifest(0, 1, deleted=True, generation=2) != manifest(0, 1, generation=2)
