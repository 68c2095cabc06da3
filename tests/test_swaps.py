"""Swaps of real model server processes: nothing fails, nothing is stale, the old weights are gone."""

import itertools
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Database
from key_store import open_local
from serving_kit import Client, Toy, ToyEngine, serving, wait_until
from serving_process import HEAVY, Server, barrier, cleared, deactivated, put_out, replica
from tiny import tiny_backbone, tiny_recipe, tiny_records

from shards.digest import canonical
from shards.engine.backbone import Backbone
from shards.engine.determinism import prepare
from shards.engine.s3t import S3T
from shards.recipe import Lora
from shards.stages import chain

pytestmark = pytest.mark.integration
MIB = 2**20


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Toy:
    found = Toy(database.owner_url, database.app_url, tmp_path / "artifacts")
    found.create()
    found.add_toy_stage("a", 1.0, shard=0)
    found.add_toy_stage("b", -3.0, shard=1)
    return found


class Crowd:
    """Clients that ask without a pause; each notes what it knew when it sent."""

    def __init__(self, toy: Toy, ports: list[int]) -> None:
        self.labels: dict[int, str] = {}
        """What each version answers."""
        self.floor = 1
        """What every client has read of `deactivated`."""
        self.results: Counter[int] = Counter()
        self.wrong: list[tuple[int, int, str]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(toy, port)) for port in ports]
        for thread in self._threads:
            thread.start()

    def _ask(self, toy: Toy, port: int) -> None:
        with Client(port, toy) as client:
            while not self._stop.is_set():
                least = self.floor
                answer = client.predict("x", "y")
                self.results[answer.status_code] += 1
                body = answer.json()
                version, said = body.get("version", 0), answer.text if "outputs" not in body else ""
                label = said or body["outputs"][0]["label"]
                if version < least or label != self.labels[version]:
                    self.wrong.append((least, version, label))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_hundred_swaps_fail_nothing_and_answer_nothing_stale(toy: Toy) -> None:
    """Of three swaps two are deactivations, and the third is a rebuild, which drains by itself."""
    toy.publish("a", "b", cause="train")
    with barrier(toy, ttl=5), replica(toy, ttl=5) as (one, _), replica(toy, ttl=5) as (two, _):
        crowd = Crowd(toy, [one.base_url.port, two.base_url.port] * 2)
        crowd.labels[1] = "no"
        for version in range(2, 102):
            whole = version % 2 == 1
            crowd.labels[version] = "no" if whole else "yes"
            cause = "rebuild" if version % 3 == 0 else "deactivate"
            assert toy.publish("a", "b" if whole else None, cause=cause) == version
            if cause == "deactivate":
                wait_until(lambda version=version: cleared(toy) >= version)
                crowd.floor = version
            time.sleep(0.01)
        crowd.stop()
        assert [row["ended_at"] for row in toy.leases()] == [None, None]
    assert crowd.wrong == []
    assert set(crowd.results) == {200}
    assert crowd.results[200] > 400
    assert toy.events("replica.fenced") == []


def freed(toy: Toy, version: int) -> bool:
    return all(row["freed"] >= version for row in toy.leases() if row["ended_at"] is None)


def test_the_memory_of_deactivated_weights_goes_back_to_the_kernel(toy: Toy) -> None:
    """One stage of 64 MiB more or less, over and over: told by the process (weak references) and by the kernel."""
    toy.publish("a", None, cause="train")
    with barrier(toy), replica(toy, "heavy", ttl=4) as (client, process):
        put_out(toy, "b")
        deactivated(toy, "a", None)
        version = toy.leases()[0]["covers"]
        wait_until(lambda: freed(toy, version))
        least = process.resident()
        for number in range(12):
            name = f"c{number}"
            toy.add_toy_stage(name, -5.0, shard=1)
            rebuilt = toy.publish("a", name, cause="rebuild")
            wait_until(lambda rebuilt=rebuilt: client.version() == rebuilt)
            assert process.resident() > least + HEAVY * 3 // 4
            put_out(toy, name)
            floor, _ = deactivated(toy, "a", None)
            wait_until(lambda floor=floor: freed(toy, floor))
            assert process.resident() < least + HEAVY // 4
            assert client.version() == floor


def test_the_real_engine_holds_no_more_after_many_swaps(database: Database, tmp_path: Path) -> None:
    """Two stages of 16 MiB of the torch engine take turns; a leaked one a turn would be 190 MiB."""
    prepare()
    recipe = tiny_recipe(
        tiny_backbone(tmp_path / "backbone", layers=2, width=1024, inner=64), lora=Lora(rank=1024, alpha=1024)
    )
    trainer = S3T(recipe, Backbone.load(recipe))
    toy = Toy(database.owner_url, database.app_url, tmp_path / "artifacts", recipe=recipe)
    toy.create()
    for name, shard, root in (("a", 0, "a"), ("c", 1, "c"), ("d", 1, "d")):
        stage = chain(recipe.digest, shard, (0,), {0: root * 64})[0]
        data = trainer.train(stage, tiny_records(4, name), [])
        assert len(data) > 12 * MIB
        toy.add_stage(name, shard=shard, data=data, key=stage.key)
    put_out(toy, "c", "d")
    toy.publish("a", None, cause="train")
    with barrier(toy, ttl=4), replica(toy, "real", ttl=4) as (client, process):
        sizes = [_turn(toy, client, process, name) for name in itertools.islice(itertools.cycle("cd"), 12)]
    assert max(sizes[4:]) < min(sizes[:4]) + 64 * MIB, [size // MIB for size in sizes]


def _turn(toy: Toy, client: Client, process: Server, name: str) -> int:
    """Rebuild with a stage and deactivate it again; resident memory after that."""
    put_out(toy, name, state="live")
    rebuilt = toy.publish("a", name, cause="rebuild")
    wait_until(lambda: client.version() == rebuilt, seconds=20)
    put_out(toy, name)
    floor, _ = deactivated(toy, "a", None)
    wait_until(lambda: freed(toy, floor), seconds=20)
    assert client.predict("w1 w2").json()["version"] == floor
    return process.resident()


def test_a_deactivation_loads_nothing(toy: Toy) -> None:
    """What survives is in memory when a server is ready, also what no version has served: the store may be gone."""
    toy.add_toy_stage("c", 7.0, shard=0)
    toy.publish("a", "b", cause="train")
    with barrier(toy, ttl=40), replica(toy, ttl=40) as (client, _):
        for name in ("a", "b", "c"):
            toy.object_path(name).unlink()
        floor, took = deactivated(toy, "c", None)
        assert took < 4  # a heartbeat comes every ten seconds, the loader looks every five
        answer = client.predict("x")
        assert (answer.json()["version"], answer.json()["outputs"][0]["probabilities"]["yes"]) == (floor, 0.999089)


def alter(toy: Toy, name: str) -> None:
    """A byte of the file is another one: it cannot be unsealed."""
    path = toy.object_path(name)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def exchange(toy: Toy, name: str) -> None:
    """The file is whole, and holds another artefact than the row says."""
    key, digest = toy.stages[name]
    other = f"stages/{key}/{digest}/{uuid.uuid4()}"
    open_local(toy.artifacts).put(other, canonical({"name": name, "weight": 9.0}))
    with toy.connect() as connection:
        connection.execute("update artifact set object_name = %s where stage_key = %s", (other, key))


@pytest.mark.parametrize("corrupt", [alter, exchange])
def test_a_failed_load_keeps_the_old_version_and_says_so(
    toy: Toy, capfd: pytest.CaptureFixture[str], corrupt: Callable[[Toy, str], None]
) -> None:
    """A corrupted artefact: the digest is verified before a byte of it is used."""
    toy.publish("a", "b", cause="train")
    with barrier(toy), replica(toy, ttl=4) as (client, _):
        toy.add_toy_stage("c", 5.0, shard=1)
        corrupt(toy, "c")
        toy.publish("a", "c", cause="rebuild")
        wait_until(lambda: "cannot be loaded" in client.get("/readyz").text)
        assert (client.ready(), client.version()) == (True, 1)
        assert toy.stages["c"][1][:12] in client.get("/readyz").text
        kept = 'expunge_swaps_total{model="toy",result="kept_old"} 1.0'
        wait_until(lambda: kept in client.get("/metrics").text)
        assert 'expunge_artifact_load_failures_total{model="toy"' in client.get("/metrics").text
        assert "artifact_unusable" in capfd.readouterr().out
        # Below the floor it may not stay: nothing is answered, and `deactivated` waits for nobody.
        floor, _ = deactivated(toy, "a", "c")
        assert toy.events("replica.fenced") == []
        assert client.predict().status_code == 503
        assert (client.ready(), client.get("/healthz").status_code) == (False, 200)
        clean = toy.publish("a", None, cause="rebuild")
        wait_until(lambda: client.version() == clean)
        assert clean > floor


def test_a_starting_replica_loads_the_current_version_or_is_not_ready(toy: Toy) -> None:
    toy.publish("a", None, cause="train")
    path = toy.object_path("b")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    toy.publish("a", "b", cause="rebuild")  # version 1 would do, and is not the current one
    with barrier(toy), replica(toy, ttl=20, ready=False) as (client, _):
        wait_until(lambda: "cannot be loaded" in client.get("/readyz").text)
        assert not client.ready()
        assert (client.predict().status_code, toy.leases()) == (503, [])
        assert deactivated(toy, "a", None)[1] < 10  # nobody waits for a process that never served: not for its 20 s
        wait_until(client.ready)
        assert client.version() == 3
    put_out(toy, "b", state="live")


def test_a_load_that_only_takes_its_time_is_no_failure(toy: Toy) -> None:
    toy.publish("a", None, cause="train")
    with serving(toy) as (client, _):
        toy.add_toy_stage("c", 5.0, shard=1)
        toy.publish("a", "c", cause="rebuild")
        wait_until(lambda: client.version() == 2)
        assert 'result="kept_old"' not in client.get("/metrics").text


def test_a_new_version_serves_before_what_is_only_in_reserve_is_loaded(toy: Toy) -> None:
    """A rebuild trains spare orders, too: nobody waits for them."""
    toy.publish("a", None, cause="train")
    opened = threading.Event()

    class Slow(ToyEngine):
        def load(self, digest: str, data: bytes) -> None:
            if json.loads(data)["name"].startswith("spare"):
                opened.wait()
            super().load(digest, data)

    with serving(toy, factory=Slow) as (client, _):
        try:
            for name in ("spare1", "c", "spare2"):
                toy.add_toy_stage(name, 5.0, shard=1)
            toy.publish("a", "c", cause="rebuild")
            wait_until(lambda: client.version() == 2)
        finally:
            opened.set()


def test_a_loader_outlives_whatever_an_engine_does(toy: Toy) -> None:
    toy.publish("a", None, cause="train")
    failures = iter([RuntimeError("not enough of something"), KeyError("a stage")])

    class Poor(ToyEngine):
        def load(self, digest: str, data: bytes) -> None:
            if json.loads(data)["name"] == "c" and (failure := next(failures, None)):
                raise failure
            super().load(digest, data)

    with serving(toy, factory=Poor) as (client, _):
        toy.add_toy_stage("c", 5.0, shard=1)
        toy.publish("a", "c", cause="rebuild")
        wait_until(lambda: client.version() == 2)


def test_a_server_that_starts_is_ready_when_its_reserve_is_loaded(toy: Toy) -> None:
    toy.publish("a", None, cause="train")
    loading, opened = threading.Event(), threading.Event()

    class Slow(ToyEngine):
        def load(self, digest: str, data: bytes) -> None:
            if json.loads(data)["name"] == "b":
                loading.set()
                opened.wait()
            super().load(digest, data)

    with serving(toy, factory=Slow, ready=False) as (client, _):
        try:
            assert loading.wait(20)
            assert not client.ready()
        finally:
            opened.set()
        wait_until(client.ready)
