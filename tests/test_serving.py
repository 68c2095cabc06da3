"""The model server against the real Postgres, with the toy engine of `serving_kit`."""

import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Database
from serving_kit import RECIPE, Client, Held, Toy, ToyEngine, serving, wait_until

from service.serving import fleet, lease
from service.serving.__main__ import Program
from service.serving.compute import Compute
from service.serving.replica import Replica

pytestmark = pytest.mark.integration


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Toy:
    found = Toy(database.owner_url, database.app_url, tmp_path / "artifacts")
    found.create()
    found.add_toy_stage("a", 1.0, shard=0)
    found.add_toy_stage("b", -3.0, shard=1)
    return found


def test_an_answer_says_where_it_came_from(toy: Toy) -> None:
    toy.publish("a", "b", cause="train")
    with serving(toy) as (client, _):
        answer = client.predict("first", "second")
    assert answer.status_code == 200
    assert answer.headers["x-expunge-version"] == "1"
    assert len(answer.headers["x-expunge-assembly"]) == 64
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert (body["model"], body["version"], body["shards"]) == ("toy", 1, {"live": 2, "of": 2})
    assert [output["label"] for output in body["outputs"]] == ["no", "no"]  # mean weight -1
    assert body["outputs"][0]["probabilities"] == {"no": 0.731059, "yes": 0.268941}


def replica(program: Program) -> Replica:
    found = program.fleet.find("toy")
    assert found is not None
    return found.replica


def test_a_deactivation_is_acknowledged_at_once_and_frees_the_weights(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "IDLE_POLL", 60.0)
    toy.publish("a", "b", cause="train")
    with serving(toy, settings=toy.settings(lease_ttl_ms=40_000)) as (client, _):
        started = time.monotonic()
        toy.publish("a", None, taint=1)
        wait_until(lambda: toy.leases()[0]["covers"] == 2)
        assert time.monotonic() - started < 5  # not a heartbeat, which comes every ten seconds
        wait_until(lambda: toy.leases()[0]["freed"] == 2)
        answer = client.predict()
        assert answer.json()["outputs"][0]["label"] == "yes"
        assert answer.json()["shards"] == {"live": 1, "of": 2}
    assert [event["covers"] for event in toy.events("replica.registered")] == [0 + 1]
    assert [event["covers"] for event in toy.events("replica.acknowledged")] == [2]


def test_a_clean_stop_ends_the_row(toy: Toy) -> None:
    toy.publish("a", "b", cause="train")
    with serving(toy):
        assert toy.leases()[0]["ended_at"] is None
    row = toy.leases()[0]
    assert row["ended_at"] is not None
    assert row["freed_at"] is not None
    assert len(toy.events("replica.ended")) == 1


def test_swaps_drop_no_request_and_answer_nothing_below_the_floor(toy: Toy) -> None:
    toy.publish("a", "b", cause="train")
    results: Counter[int] = Counter()
    stale: list[tuple[int, int]] = []
    floor = 1
    stop = threading.Event()

    def hammer(port: int) -> None:
        with Client(port, toy) as client:
            while not stop.is_set():
                least = floor
                answer = client.predict("x", "y")
                results[answer.status_code] += 1
                body = answer.json()
                # Odd versions serve both shards, even ones the first alone.
                expected = "no" if body.get("version", 0) % 2 else "yes"
                if answer.status_code != 200 or body["version"] < least or body["outputs"][0]["label"] != expected:
                    stale.append((least, body.get("version", 0)))

    class Slow(ToyEngine):
        pace = 0.003

    with serving(toy, factory=Slow, settings=toy.settings(lease_ttl_ms=8000)) as (client, _):
        threads = [threading.Thread(target=hammer, args=(client.base_url.port,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for number in range(50):
            version = toy.publish("a", None if number % 2 == 0 else "b")
            wait_until(lambda version=version: toy.leases()[0]["covers"] >= version)
            floor = version  # what a caller who has read `deactivated` knows
            time.sleep(0.02)
        stop.set()
        for thread in threads:
            thread.join()
        metrics = client.get("/metrics").text
    assert stale == []
    assert set(results) == {200}
    assert results[200] > 200
    assert "expunge_predictions_recomputed_total" in metrics


def test_a_floor_that_rises_during_the_computation_is_obeyed(toy: Toy) -> None:
    class Engine(Held):
        pass

    toy.publish("a", "b", cause="train")
    with serving(toy, factory=Engine, settings=toy.settings(lease_ttl_ms=20_000)) as (client, _):
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(client.predict()))
        thread.start()
        assert Engine.begun.wait(20)
        toy.publish("a", None, taint=1)
        wait_until(lambda: toy.leases()[0]["covers"] == 2)  # while the pass goes on: no drain
        Engine.go.set()
        thread.join()
        assert answers[0].status_code == 200
        assert answers[0].json()["version"] == 2
        assert answers[0].json()["outputs"][0]["label"] == "yes"


def test_an_answer_that_a_swap_overtakes_keeps_its_place_and_what_is_known(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine(Held):
        pass

    runs: list[dict[str, Any]] = []
    run = Compute.run

    async def noted(self: Compute, *given: Any, **told: Any) -> Any:
        runs.append(told)
        return await run(self, *given, **told)

    monkeypatch.setattr(Compute, "run", noted)
    toy.publish("a", "b", cause="train")
    with serving(toy, factory=Engine, settings=toy.settings(lease_ttl_ms=20_000)) as (client, program):
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(client.predict("x", "y")))
        thread.start()
        assert Engine.begun.wait(20)
        toy.publish("a", None, taint=1)
        wait_until(lambda: replica(program).fence.local_floor == 2)
        Engine.go.set()
        thread.join()
        assert answers[0].json()["version"] == 2
        client.predict("z")
    first, again, other = runs
    assert first["arrived"] == again["arrived"] < other["arrived"]
    assert [id(own) for own in first["known"]] == [id(own) for own in again["known"]]
    assert (len(first["known"]), len(other["known"])) == (2, 1)
    assert other["known"][0] is not first["known"][0]  # it goes with its request


def test_a_new_model_is_found_that_is_announced_beside_a_known_one(
    toy: Toy, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "POLL", 5.0)
    recipe = replace(RECIPE, classes=("less", "more"))
    other = Toy(database.owner_url, database.app_url, tmp_path / "artifacts", name="other", recipe=recipe)
    other.create()
    other.add_toy_stage("c", 1.0, shard=0)
    toy.publish("a", "b", cause="train")
    with serving(toy):
        time.sleep(0.2)  # it listens
        other.publish("c", None, cause="train", beside=toy.model_id)
        wait_until(lambda: bool(other.leases()), seconds=3)  # before the next look for new models


def test_a_rebuild_lets_work_finish_on_what_it_started_with(toy: Toy) -> None:
    class Engine(Held):
        pass

    toy.publish("a", None, cause="train")
    with serving(toy, factory=Engine, settings=toy.settings(lease_ttl_ms=4000)) as (client, program):
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(client.predict()))
        thread.start()
        assert Engine.begun.wait(20)
        toy.publish("a", "b", cause="rebuild")
        wait_until(lambda: replica(program).versions == [2])
        beats = toy.leases()[0]["beats"]
        wait_until(lambda: toy.leases()[0]["beats"] > beats)
        assert toy.leases()[0]["covers"] == 1
        Engine.go.set()
        thread.join()
        assert answers[0].json()["version"] == 1
        wait_until(lambda: toy.leases()[0]["covers"] == 2)
        assert client.version() == 2


def test_a_damaged_artefact_keeps_the_old_version_where_the_floor_allows(toy: Toy) -> None:
    toy.add_toy_stage("c", 5.0, shard=1)
    toy.object_path("c").write_bytes(b'{"name":"c","weight":6.0}')
    toy.publish("a", "b", cause="train")
    with serving(toy) as (client, _):
        toy.publish("a", "c", cause="rebuild")
        wait_until(lambda: "cannot be loaded" in client.get("/readyz").text)
        assert client.ready()
        assert client.version() == 1
        assert (
            'expunge_artifact_load_failures_total{model="toy",reason="ArtifactDigestError"}'
            in client.get("/metrics").text
        )
        version = toy.publish("a", "c")  # the same, as a deactivation: nothing may be answered
        wait_until(lambda: toy.leases()[0]["covers"] == version)  # which covers the floor
        answer = client.predict()
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:expunge:problem:not-serving"
        assert "cannot be loaded" in answer.json()["detail"]
        assert not client.ready()
        toy.publish("a", None)
        wait_until(client.ready)
        assert client.version() == version + 1


def test_a_model_without_a_live_shard_says_so(toy: Toy) -> None:
    toy.publish("a", "b", cause="train")
    with serving(toy) as (client, _):
        toy.publish(None, None)
        wait_until(lambda: toy.leases()[0]["covers"] == 2)
        answer = client.predict()
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:expunge:problem:no-live-shard"


def test_new_models_appear_and_none_is_ready_too(toy: Toy) -> None:
    with serving(toy, ready=False) as (client, program):
        wait_until(client.ready)
        assert client.predict().status_code == 404
        toy.publish("a", "b", cause="train")
        wait_until(lambda: client.version() == 1)
        assert program.fleet.find("other") is None


def test_versions_below_what_the_caller_asks_for_are_refused(toy: Toy) -> None:
    toy.publish("a", "b", cause="train")
    with serving(toy) as (client, _):
        assert client.predict(x_expunge_min_version="1").status_code == 200
        answer = client.predict(x_expunge_min_version="2")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert client.predict(x_expunge_min_version="two").status_code == 400
