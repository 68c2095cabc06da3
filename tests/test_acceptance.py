"""The whole path through HTTP, Celery workers, Valkey, Postgres and two model servers, and what breaks on its way."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from installation import DONE, Installation, installation, text_of
from tiny import tiny_backbone

from service.cli.demo.stack import run_json

pytestmark = [pytest.mark.acceptance, pytest.mark.xdist_group("acceptance")]


@pytest.fixture(scope="module")
def expunge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    backbone = tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=3, width=16)
    with installation(tmp_path_factory.mktemp("home"), backbone) as made:
        yield made


def test_the_whole_path_under_traffic(expunge: Installation, tmp_path: Path) -> None:
    expunge.make("path", subjects=30, evaluation=True)
    first = expunge.train("path")
    expunge.await_serving("path", first["version"])
    grid = expunge.get("/v1/models/path/shards")
    assert [shard["depth"] for shard in grid["shards"]] == [2, 2]
    subject = {"type": "user", "value": "path2"}
    (preview,) = expunge.post("/v1/deletion-requests:preview", {"subject": subject, "models": ["path"]})["models"]
    traffic = expunge.traffic("path")
    traffic.start()
    traffic.wait_for(20)
    request_id = expunge.ask("path2", ["path"])
    request = expunge.await_state(request_id, DONE)
    target = request["targets"][0]
    traffic.floor = target["version"]
    traffic.wait_for(20)
    versions = expunge.get("/v1/models/path/versions")["versions"]
    assert next(each["depths"] for each in versions if each["version"] == target["version"]) != [2, 2]
    expunge.await_state(request_id, {"completed"})
    rebuilt = expunge.await_built("path", more_than=target["version"])
    expunge.await_serving("path", rebuilt["version"])
    seen = traffic.stop()
    assert (seen.failed, seen.stale) == (0, 0), seen
    assert set(seen.versions) >= {first["version"], target["version"]}
    code, checks = expunge.certificate(request_id, "path", tmp_path)
    assert code == 0, [check for check in checks["checks"] if not check["passed"]]
    grid = expunge.get("/v1/models/path/shards")
    assert [shard["depth"] for shard in grid["shards"]] == [2, 2]
    assert preview["depth_before"] == [2, 2]
    stage = grid["shards"][preview["cells"][0]["shard"]]["stage"]
    code, replayed, said = run_json(
        ["replay", "--state", str(expunge.stack.state), "--model", "path", "--stage", stage, "--json"]
    )
    assert (code, replayed.get("equal")) == (0, True), said


def test_an_unknown_subject_completes_and_says_nothing(expunge: Installation) -> None:
    expunge.make("nobody", subjects=4)
    request = expunge.await_state(expunge.ask("not-there", ["nobody"]), {"completed"})
    assert request["outcome"] == "no_match"


def test_a_deletion_that_arrives_while_its_records_are_trained_on(expunge: Installation, tmp_path: Path) -> None:
    expunge.make("busy", subjects=60, epochs=40, batch_size=2)
    expunge.post("/v1/models/busy/rebuild", status=202)
    expunge.until(lambda: expunge.get("/v1/models/busy")["jobs"].get("running"), within=60)
    request_id = expunge.ask("busy2", ["busy"])
    expunge.await_state(request_id, {"completed"})
    model = expunge.await_built("busy", within=180)
    expunge.await_serving("busy", model["version"])
    code, checks = expunge.certificate(request_id, "busy", tmp_path)
    assert code == 0, [check for check in checks["checks"] if not check["passed"]]
    assert [shard["depth"] for shard in expunge.get("/v1/models/busy/shards")["shards"]] == [2, 2]


@pytest.mark.parametrize("program", ["plan", "default", "loops", "train-1", "api"])
def test_a_program_killed_in_the_middle_loses_nothing(expunge: Installation, tmp_path: Path, program: str) -> None:
    name = f"kill-{program}"
    expunge.make(name, subjects=12)
    expunge.train(name)
    request_id = expunge.ask(f"{name}2", [name])
    expunge.kill(program)
    expunge.await_state(request_id, {"completed"}, within=90)
    model = expunge.await_built(name, more_than=1, within=120)
    code, checks = expunge.certificate(request_id, name, tmp_path)
    assert code == 0, [check for check in checks["checks"] if not check["passed"]]
    expunge.await_serving(name, model["version"])


def test_a_dead_and_a_paused_replica_are_fenced_by_expiry(expunge: Installation) -> None:
    expunge.make("fence", subjects=16)
    version = expunge.train("fence")["version"]
    expunge.await_serving("fence", version)
    paused = expunge.kill("server-2", signal.SIGSTOP)
    try:
        began = time.monotonic()
        request = expunge.await_state(expunge.ask("fence3", ["fence"]), DONE)
        took = time.monotonic() - began
        assert took > 0.5, "a paused replica holds the barrier until its lease has run out"
        floor = request["targets"][0]["version"]
    finally:
        os.kill(paused, signal.SIGCONT)
    # What it answers after waking, if anything, does not come from below the floor.
    for _ in range(20):
        try:
            answer = expunge.predict(1, "fence", text_of("late"))
        except httpx.TransportError:
            continue
        assert not answer.is_success or int(answer.headers["X-Expunge-Version"]) >= floor
    expunge.await_serving("fence", floor, within=60)
    expunge.kill("server-1")
    expunge.await_state(expunge.ask("fence4", ["fence"]), DONE, within=30)


def test_valkey_gone_for_a_while_loses_nothing(expunge: Installation) -> None:
    expunge.make("bell", subjects=16)
    expunge.train("bell")
    valkey = expunge.kill("valkey", signal.SIGSTOP)
    try:
        began = time.monotonic()
        request_id = expunge.ask("bell2", ["bell"])
        assert time.monotonic() - began < 5, "the 202 never waits for Valkey"
        time.sleep(10)
        assert expunge.request(request_id)["state"] == "received"
    finally:
        os.kill(valkey, signal.SIGCONT)
    expunge.await_state(request_id, {"completed"}, within=90)


def test_postgres_killed_comes_back_with_everything(expunge: Installation) -> None:
    expunge.make("base", subjects=16)
    version = expunge.train("base")["version"]
    expunge.await_serving("base", version)
    request_id = expunge.ask("base2", ["base"])
    expunge.kill("postgres")
    expunge.await_state(request_id, {"completed"}, within=90)
    expunge.await_serving("base", version + 1, within=60)
    expunge.until(lambda: expunge.http.get("/readyz").is_success, within=30)


def test_postgres_that_does_not_answer_for_ten_seconds(expunge: Installation) -> None:
    """Replicas answer until their leases run out, then 503, then again; what was asked before is done after."""
    expunge.make("still", subjects=16)
    version = expunge.train("still")["version"]
    expunge.await_serving("still", version)
    request_id = expunge.ask("still2", ["still"])
    postmaster = psutil.Process(expunge.document["programs"]["postgres"])
    stopped = [postmaster, *postmaster.children(recursive=True)]
    for process in stopped:
        process.suspend()
    try:
        end = time.monotonic() + 10
        time.sleep(4)  # the lease's time to live is 2 s
        assert [expunge.predict(server, "still", "w1").status_code for server in (0, 1)] == [503, 503]
        time.sleep(max(0.0, end - time.monotonic()))
    finally:
        for process in stopped:
            process.resume()
    expunge.await_state(request_id, {"completed"}, within=90)
    expunge.await_serving("still", version + 1, within=60)


def test_a_burst_shares_versions(expunge: Installation) -> None:
    expunge.make("burst", subjects=60)
    before = expunge.train("burst")["version"]
    with ThreadPoolExecutor(8) as callers:
        asked = list(callers.map(lambda number: expunge.ask(f"burst{number}", ["burst"]), range(40)))
    for request_id in asked:
        expunge.await_state(request_id, DONE)
    causes = [each["cause"] for each in expunge.get("/v1/models/burst/versions")["versions"]]
    assert causes.count("deactivate") < 40, causes
    assert expunge.get("/v1/models/burst")["version"] > before
    for request_id in asked:
        expunge.await_state(request_id, {"completed"}, within=120)
