"""The command line against a real API."""

import json
import time
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from api_client import RECIPE, Api, Run, line, ndjson
from psycopg.types.json import Jsonb

from service.store import targets

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration


@pytest.fixture
def ready(run: Run, tmp_path: Path) -> Run:
    recipe, data = tmp_path / "recipe.json", tmp_path / "data.ndjson"
    recipe.write_text(json.dumps(RECIPE))
    data.write_bytes(ndjson(line(n) for n in range(30)))
    grid = ("--shards", "2", "--slices", "2")
    assert run("dataset", "create", "reviews", "--class", "bad", "--class", "good", *grid)[0] == 0
    code, out, _ = run("dataset", "ingest", "reviews", str(data), "--json")
    assert (code, json.loads(out)["accepted"]) == (0, 30)
    assert run("model", "create", "sentiment", "--dataset", "reviews", "--recipe", str(recipe))[0] == 0
    return run


def test_from_a_dataset_to_a_request(ready: Run, api: Api) -> None:
    code, out, _ = ready("dataset", "list")
    assert code == 0
    assert "reviews" in out
    assert "30" in out
    code, out, _ = ready("model", "show", "sentiment")
    assert (code, out.count("..")) == (0, 2)
    code, out, _ = ready("preview", "--subject", "email:p1@example.org", "--json")
    assert (code, json.loads(out)["models"][0]["model"]) == (0, "sentiment")
    code, out, _ = ready("delete", "--subject", "email:p1@example.org", "--reference", "T-1", "--json")
    request: dict[str, Any] = json.loads(out)
    assert (code, request["state"]) == (0, "received")
    code, out, _ = ready("delete", "--record", "r2", "--record", "r3", "--dataset", "reviews")
    assert code == 0
    code, out, _ = ready("requests", "--json")
    assert len(json.loads(out)["requests"]) == 2
    code, out, _ = ready("requests", request["request_id"])
    assert (code, "sentiment" in out) == (0, True)
    assert api.scalar("SELECT count(*) FROM deletion_request") == 2


def test_a_rebuild_policy_is_set_and_shown(ready: Run) -> None:
    code, out, _ = ready("model", "policy", "sentiment", "spares", "--spares", "1")
    assert (code, "rebuild spares, spares 1" in out) == (0, True)
    code, out, _ = ready("model", "show", "sentiment", "--json")
    assert json.loads(out)["rebuild"] == {"kind": "spares", "spares": 1}
    code, _, err = ready("model", "policy", "sentiment", "min_depth")
    assert code == 1
    assert "rebuild.min_depth must be at least 1" in err
    code, out, _ = ready("preview", "--subject", "email:p1@example.org")
    assert code == 0
    assert "rebuild by_deadline: " in out


def test_a_key_makes_one_request(ready: Run, api: Api) -> None:
    for _ in range(2):
        assert ready("delete", "--subject", "email:a@example.org", "--key", "k")[0] == 0
    assert api.scalar("SELECT count(*) FROM deletion_request") == 1


def test_waiting_ends_with_the_state_or_says_what_happened(ready: Run, api: Api) -> None:
    def later(count: int, state: str, outcome: str | None) -> None:
        while api.scalar("SELECT count(*) FROM deletion_request") < count:
            time.sleep(0.05)
        with api.database() as connection:
            connection.execute(
                "UPDATE request_target SET state = %s::deletion_state, outcome = %s, version = 1",
                (state, outcome),
            )
            rows = connection.execute("SELECT request_id FROM deletion_request").fetchall()
            targets.refresh_requests(connection, [request_id for (request_id,) in rows])

    timer = Timer(0.5, later, (1, "completed", "erased"))
    timer.start()
    code, out, _ = ready("delete", "--subject", "email:a@example.org", "--wait", "deactivated", "--json")
    timer.join()
    assert (code, json.loads(out)["outcome"]) == (0, "erased")
    timer = Timer(0.5, later, (2, "failed", None))
    timer.start()
    code, _, err = ready("delete", "--subject", "email:b@example.org", "--wait", "completed")
    timer.join()
    assert (code, "is failed" in err) == (1, True)
    code, _, err = ready("delete", "--subject", "email:b@x", "--wait", "completed", "--timeout", "0.1")
    assert (code, "it goes on" in err) == (1, True)


def test_a_certificate_is_written_as_it_is(ready: Run, api: Api, tmp_path: Path) -> None:
    request = api.request("p1@example.org").json()["request_id"]
    code, _, err = ready("certificate", request)
    assert (code, "no certificate yet" in err) == (1, True)
    envelope = {"payload": "e30=", "payloadType": "x", "signatures": []}
    with api.database() as connection:
        connection.execute(
            "INSERT INTO certificate (request_id, model_id, envelope, digest, issued_at)"
            " SELECT request_id, model_id, %s, %s, now() FROM request_target",
            (Jsonb(envelope), "0" * 64),
        )
    path = tmp_path / "certificate.json"
    assert ready("certificate", request, "-o", str(path))[0] == 0
    assert json.loads(path.read_text()) == envelope
    code, _, err = ready("certificate", "../../datasets")
    assert (code, "looks like" in err) == (1, True)


def test_training_waits_for_the_jobs(ready: Run, api: Api) -> None:
    def later() -> None:
        while not api.scalar("SELECT rebuild_wanted FROM model"):
            time.sleep(0.05)
        with api.database() as connection:
            connection.execute("UPDATE model SET rebuild_wanted = false, version = 1")

    timer = Timer(0.5, later)
    timer.start()
    code, out, _ = ready("model", "train", "sentiment", "--json")
    timer.join()
    assert (code, json.loads(out)["version"]) == (0, 1)


def test_errors_say_what_to_do(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.ndjson"
    wrong.write_bytes(ndjson([line(0), {"record_id": "x"}]))
    create = ("dataset", "create", "reviews", "--class", "bad", "--class", "good")
    assert run(*create)[0] == 0
    for arguments, says in (
        (("dataset", "ingest", "reviews", str(wrong)), "line 2: the field label is missing"),
        (("dataset", "ingest", "reviews", str(tmp_path / "none")), "cannot be read"),
        (("dataset", "ingest", "none", str(wrong)), "no dataset"),
        (create, "already"),
        (("model", "create", "m", "--dataset", "reviews", "--recipe", str(wrong)), "not valid JSON"),
        (("model", "show", "none"), "no model"),
        (("model", "predict", "none", "text"), "no model server"),
        (("delete",), "--subject"),
        (("delete", "--subject", "ann"), "type:value"),
        (("delete", "--record", "1"), "--dataset"),
        (("requests", "--in", "nonsense"), "state"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, ""), arguments
        assert says in err, (arguments, err)
    monkeypatch.setenv("EXPUNGE_API_URL", "http://127.0.0.1:9")
    code, _, err = run("dataset", "list")
    assert (code, "does not answer" in err) == (1, True)
