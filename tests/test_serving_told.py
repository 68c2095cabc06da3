"""How much answers tell, when a refusal ends, and what is never told: a shard's own output."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from api_client import Api, Run
from conftest import Database
from serving_kit import RECIPE, Client, Toy, serving, wait_until
from serving_talk import TALK, Talker, complete

from service.domain.answers import Answers
from service.serving import lease
from service.store import policies
from service.store.api_keys import Scope
from service.store.forecasts import expected_at
from service.store.models import get_model

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration
INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}


def toy_of(database: Database, directory: Path, *weights: float, name: str = "toy", talks: bool = False) -> Toy:
    toy = Toy(database.owner_url, database.app_url, directory / "artifacts", name=name)
    toy.recipe = replace(TALK if talks else RECIPE, seed=len(name))
    toy.create()
    for shard, weight in enumerate(weights):
        toy.add_toy_stage(f"s{shard}", weight, shard=shard)
    toy.publish(*(f"s{shard}" for shard in range(len(weights))), cause="train")
    return toy


def tell(toy: Toy, answers: Answers) -> None:
    with toy.connect() as connection:
        policies.set_answers(connection, toy.name, answers, actor="test")


def test_a_policy_says_how_much_answers_tell(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "IDLE_POLL", 60.0)
    toy = toy_of(database, tmp_path, 1.0, -3.0)
    with serving(toy, settings=toy.settings(lease_ttl_ms=80_000)) as (client, _):
        assert client.predict().json()["outputs"] == [
            {"label": "no", "probabilities": {"no": 0.731059, "yes": 0.268941}}
        ]
        tell(toy, Answers.TOP1)  # heard by NOTIFY: a heartbeat comes every twenty seconds
        wait_until(lambda: "score" in client.predict().json()["outputs"][0], seconds=10)
        assert client.predict().json()["outputs"] == [{"label": "no", "score": 0.73}]
        found = client.post("/v2/models/toy/infer", json=INFER).json()["outputs"]
        assert found == [
            {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["no"]},
            {"name": "score", "datatype": "FP32", "shape": [1], "data": [0.73]},
        ]
        named = client.get("/v2/models/toy").json()["outputs"]
        assert [output["name"] for output in named] == ["label", "score"]
        refused = client.post("/v2/models/toy/infer", json=INFER | {"outputs": [{"name": "probabilities"}]})
        assert (refused.status_code, "label, score" in refused.json()["error"]) == (400, True)
        tell(toy, Answers.PROBABILITIES)
        wait_until(lambda: "probabilities" in client.predict().json()["outputs"][0], seconds=10)
    tell(toy, Answers.PROBABILITIES)
    assert toy.events("model.answers_changed") == [
        {"actor": "test", "answers": "top1"},
        {"actor": "test", "answers": "probabilities"},
    ]


def test_what_is_told_is_declared_shown_and_changed(api: Api, run: Run) -> None:
    api.dataset()
    api.model(answers="top1")
    url = "/v1/models/sentiment"
    assert api.client.get(url).json()["answers"] == "top1"
    changed = api.client.patch(url, json={"answers": "probabilities"})
    assert (changed.status_code, changed.json()["answers"], changed.json()["min_shards"]) == (200, "probabilities", 1)
    for wrong in ("everything", None, 1):
        assert api.client.patch(url, json={"answers": wrong}).status_code == 422
    assert api.with_scopes(Scope.DELETION_READ).patch(url, json={"answers": "top1"}).status_code == 403
    code, out, _ = run("model", "answers", "sentiment", "top1")
    assert (code, "answers tell top1" in out) == (0, True)
    assert api.client.get(url).json()["answers"] == "top1"
    assert run("model", "answers", "sentiment", "everything")[0] != 0


def queue(toy: Toy, name: str, *, work: float, took: float | None = None) -> None:
    """A training job of a stage that waits, or one that took so many seconds."""
    with toy.connect() as connection:
        connection.execute(
            "insert into stage_job (stage_key, model_id, state, work) values (%s, %s, 'queued', %s)",
            (toy.stages[name][0], toy.model_id, work),
        )
        if took is not None:
            connection.execute(
                "update stage_job set state = 'done', started_at = now() - %s, ended_at = now(), platform = %s"
                " where stage_key = %s",
                (timedelta(seconds=took), "f" * 64, toy.stages[name][0]),
            )


def test_a_refusal_says_when_a_rebuild_is_expected(database: Database, tmp_path: Path) -> None:
    toy = toy_of(database, tmp_path, 1.0, -3.0)
    queue(toy, "s0", work=100, took=50)  # half a second a unit
    with toy.connect() as connection:
        policies.set_min_shards(connection, toy.name, 2, actor="test")
    with serving(toy) as (client, program):
        queue(toy, "s1", work=240)
        with toy.connect() as connection:
            connection.execute("update model set building = true")
        toy.publish("s0", None, taint=1)
        (served,) = [program.fleet.find("toy")]
        assert served is not None
        wait_until(lambda: served.replica.expected_at is not None)
        answer = client.predict()
        body = answer.json()
        assert answer.status_code == 503
        assert (body["shards"], body["min_shards"]) == ({"live": 1, "of": 2}, 2)
        left = (datetime.fromisoformat(body["expected_at"]) - datetime.now(UTC)).total_seconds()
        assert 90 < left < 200  # what is queued, and what the planner adds for empty cells: nothing
        assert abs(int(answer.headers["retry-after"]) - left) < 5
        assert body["expected_at"] in body["detail"]
        with toy.connect() as connection:
            policies.set_min_shards(connection, toy.name, 1, actor="test")
        wait_until(lambda: client.predict().status_code == 200)
        wait_until(lambda: served.replica.expected_at is None)


def test_a_forecast_counts_what_is_queued_at_the_measured_speed(database: Database, tmp_path: Path) -> None:
    toy = toy_of(database, tmp_path, 1.0, -3.0)

    def left() -> float | None:
        with toy.connect() as connection:
            found = expected_at(connection, get_model(connection, toy.name))
            return None if found is None else (found - datetime.now(UTC)).total_seconds()

    assert left() is None  # nothing is missing, wanted or queued
    queue(toy, "s0", work=100, took=50)
    queue(toy, "s1", work=240)
    assert left() == pytest.approx(120, abs=5)
    with toy.connect() as connection:
        connection.execute(
            "update stage_job set state = 'running', started_at = now() - interval '90 s' where state = 'queued'"
        )
    assert left() == pytest.approx(30, abs=5)
    with toy.connect() as connection:
        connection.execute("update stage_job set started_at = now() - interval '1 h' where state = 'running'")
    assert left() == pytest.approx(0, abs=5)  # longer than expected: not before now


def heard(client: Client) -> dict[str, str]:
    """All that a caller with a key can get of a model, but for what names it and counts time."""
    name = client.toy.name
    (ready,) = [each for each in client.get("/readyz").json()["models"] if each["model"] == name]
    metrics = [line.rsplit(" ", 1)[0] for line in client.get("/metrics").text.splitlines() if f'"{name}"' in line]
    gave = {
        "predict": client.predict("a", "bb").text,
        "infer": client.post(f"/v2/models/{name}/infer", json=INFER).text,
        "metadata": client.get(f"/v2/models/{name}").text,
        "model_ready": client.get(f"/v2/models/{name}/ready").text,
        "readyz": json.dumps(ready),
        "model": client.get(f"/v1/models/{name}").text,
        "completion": complete(client, max_tokens=2).text,
        "stream": complete(client, max_tokens=2, stream=True).text,
        "metrics": "\n".join(sorted(metrics)),
    }
    names = r"[0-9a-f]{64}|cmpl-[0-9a-f]{32}|\b1[0-9]{9}\b"  # assemblies, calls and the time
    return {place: re.sub(names, "-", text.replace(name, "-")) for place, text in gave.items()}


@pytest.mark.parametrize("talks", [False, True])
def test_no_endpoint_metric_or_log_tells_shards_apart(
    database: Database, tmp_path: Path, talks: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two models whose shards say other things and whose mean is the same cannot be told apart by any caller."""

    class Engine(Talker):
        pass

    toys = [
        toy_of(database, tmp_path, *weights, name=name, talks=talks)
        for name, weights in (("onemodel", (1.5, -3.5)), ("othermodel", (-1.25, -0.75)))
    ]
    with serving(toys[0], factory=Engine) as (client, _):
        wait_until(lambda: len(client.get("/readyz").json()["models"]) == 2 and client.ready())
        found: list[dict[str, str]] = []
        for _ in range(2):  # the second time every metric that there is has appeared
            found = []
            for client.toy in toys:
                found.append(heard(client))
    for place, text in found[0].items():
        assert found[1][place] == text, place
    assert '"live": 2' in found[0]["completion" if talks else "predict"]
    assert "expunge_predictions_total" in found[0]["metrics"]
    told = "".join(found[0].values()) + "".join(found[1].values()) + "".join(capfd.readouterr())
    assert not re.search(r"3\.5|1\.25|0\.75|-1\.5", told)
