"""A person goes through a whole installation; afterwards `expunge doctor` finds nothing of them in any store or log."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from installation import Installation, installation
from tiny import tiny_backbone

from service.cli.demo import stack
from service.cli.demo.stack import run_json

pytestmark = [pytest.mark.acceptance, pytest.mark.xdist_group("acceptance")]

TEXT = "Bea Quillfeather-Umbridge, 7 Sycamore Crescent, dislikes every film"
IDENTIFIER = "bea-quillfeather@example.org"
RECORD = "order 4711 of Bea Quillfeather-Umbridge"


@pytest.fixture
def expunge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    clean = stack._environment
    ours = {"TMPDIR": str(tmp_path / "tmp"), "EXPUNGE_FILE_KEY_BACKUP_DAYS": "0"}
    with (
        mock.patch.object(stack, "_environment", return_value=clean() | ours),
        installation(tmp_path / "home", tiny_backbone(tmp_path / "backbone", layers=2, width=16)) as made,
    ):
        yield made


def doctor(expunge: Installation, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, said, printed = run_json(["doctor", "--state", str(expunge.stack.state), *arguments, "--json"])
    assert said, printed
    return code, said


def test_a_person_is_found_while_they_are_here_and_not_afterwards(expunge: Installation) -> None:
    code, said = doctor(expunge)
    assert (code, said["passed"]) == (0, True), said
    expunge.make("films", subjects=12)
    lines = [
        {"record_id": RECORD, "subject": {"type": "email", "value": IDENTIFIER}, "text": TEXT, "label": "no"},
    ]
    answer = expunge.http.post("/v1/datasets/films-data/records", content="".join(json.dumps(e) + "\n" for e in lines))
    assert answer.status_code == 201
    first = expunge.train("films")
    expunge.await_serving("films", first["version"])
    assert expunge.predict(0, "films", TEXT).is_success
    stores: dict[str, set[str]] = {}
    for canary in (TEXT, IDENTIFIER):
        code, said = doctor(expunge, "--canary", canary)
        assert (code, said["unsearched"]) == (1, []), said
        stores[canary] = {each["store"] for each in said["found"]}
    assert stores[TEXT] == {"artifacts"}  # payloads never enter Postgres, its log or the queue
    assert "postgres" in stores[IDENTIFIER]  # as keyed hashes

    body = {"subject": {"type": "email", "value": IDENTIFIER}, "models": ["films"]}
    request_id = expunge.post("/v1/deletion-requests", body, status=202)["request_id"]
    expunge.await_state(request_id, {"completed"})
    expunge.await_built("films", more_than=first["version"])
    for canary in (TEXT, IDENTIFIER, RECORD):
        code, said = doctor(expunge, "--canary", canary)
        assert (code, said["found"], said["unsearched"]) == (0, [], []), said
    assert said["kept"]  # the tombstone's keyed record id, so that the record never comes back
    for name in (
        "postgres",
        "valkey",
        "artifacts",
        "file-keys",
        "postgres files",
        "valkey files",
        "logs",
        "keys",
        "run",
    ):
        assert said["searched"][name] > 0, said["searched"]
    code, said = doctor(expunge)
    assert (code, said["passed"]) == (0, True), said
