"""Canaries: two versions answer, the fence holds for both, and a deactivation ends the trial without asking."""

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Database
from hypothesis import given
from hypothesis import strategies as st
from releases import build, delete, depth, evaluated, model_of, nothing_tainted_serves, served, set_canary, set_gate
from serving_kit import Client, Held, Toy, ToyEngine, serving, wait_until
from world_copies import SUBJECTS, Copy

from service.domain.errors import ConflictError
from service.domain.release import Canary, Gate
from service.domain.requests import Kind
from service.serving import lease
from service.serving.fence import Fence
from service.store import canaries, gates, lifts, models, overrides, policies, publish
from service.store.database import Connection, transaction
from shards.assembly import Assembly, Member
from shards.digest import canonical
from shards.partition import dataset_key, record_id_of
from shards.stages import Stage
from workers import steps
from workers.barrier import Barrier
from workers.gate import evaluate_model

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _no_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SPACING_SECONDS", 0)


# The fence


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["advance", "canary", "deactivate", "begin", "check", "abandon", "sent"]),
        st.booleans(),
        st.integers(0, 9),
    ),
    max_size=40,
)


@given(ACTIONS)
def test_what_covers_has_left_behind_never_answers_again(actions: list[tuple[str, bool, int]]) -> None:
    """Whatever versions stand beside each other: a promise that was told is kept, and none is below the floor."""
    fence = Fence().grant(0.0, 1.0).advance(1, 0)
    version, floor, told = 1, 0, 0
    computing: list[int] = []
    sending: list[int] = []
    for action, other, beside in actions:
        match action:
            case "advance":  # a rebuild, a promotion, an abort: one version, whatever was there before
                version += other
                fence = fence.advance(version, floor)
            case "canary":
                stable = version if other else max(floor, version - beside)  # that one may be long gone
                version += 1
                fence = fence.advance(version, floor, stable)
            case "deactivate":
                version += 1
                floor = version
                fence = fence.advance(version if other else 0, floor)  # loaded in time, or not
            case "begin" if fence.pointer:
                begun = fence.stable if other and fence.stable else fence.pointer
                fence = fence.begin(begun)
                computing.append(begun)
            case "check" if computing:
                begun = computing.pop(-other)
                if fence.may_answer(begun, 0.5):
                    assert begun >= told
                    assert begun >= floor
                    fence = fence.send(begun)
                    sending.append(begun)
                else:
                    fence = fence.abandon(begun)
            case "abandon" if computing:
                fence = fence.abandon(computing.pop(-other))
            case "sent" if sending:
                fence = fence.sent(sending.pop(-other))
            case _:
                pass
        assert fence.covers >= told
        told = fence.covers
        for each in (fence.pointer, fence.stable):
            assert not each or floor <= each <= version
    for begun in computing:
        assert not fence.may_answer(begun, 0.5) or begun >= told


# A model server with two versions


def add(toy: Toy, name: str, weight: float, *, shard: int, before: str | None = None) -> None:
    """A stage whose key is that of its content, as the planner derives it; preferred to the stage `before`."""

    def key_of(root: str) -> str:
        return Stage(toy.recipe.digest, shard, (0,), (root,), None).key

    limit = toy.stages[before][0] if before else "z"
    root = next(root for root in (f"{number:064x}" for number in range(ord(name), 999)) if key_of(root) < limit)
    key = key_of(root)
    toy.add_stage(name, shard=shard, data=canonical({"name": name, "weight": weight}), key=key)
    with toy.connect() as connection:
        connection.execute("update stage set roots = %s where stage_key = %s", ([root], key))


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Toy:
    """Version 1 serves a and b, which says no; with c in the place of b it says yes."""
    found = Toy(database.owner_url, database.app_url, tmp_path / "artifacts")
    found.create()
    add(found, "a", 1.0, shard=0)
    add(found, "b", -3.0, shard=1)
    add(found, "c", 3.0, shard=1, before="b")  # what any rebuild would choose
    found.publish("a", "b", cause="train")
    return found


def start(toy: Toy, *names: str | None, share: int = 50) -> int:
    """A rebuild's way to a canary, with an assembly of the test's."""
    members = tuple(None if n is None else Member(toy.stages[n][0], (0,), (toy.stages[n][1],)) for n in names)
    found = publish.Candidate(Assembly(toy.recipe.digest, members), False, frozenset(), None, reserve=False)  # noqa: FBT003
    with toy.connect() as connection:
        policies.set_canary(connection, toy.name, Canary(share), actor="test")
        model = models.lock_model(connection, toy.model_id)
        gates.open_trial(connection, model, found, state="canary")
        return canaries.start(connection, model, found)


def verb(toy: Toy, function: Any) -> Any:
    with toy.connect() as connection:
        model = models.lock_model(connection, toy.model_id)
        return function(connection, model, actor="test", reason_code="tried")


def versions(client: Client, count: int = 60, **headers: str) -> Counter[int]:
    found = Counter[int]()
    for _ in range(count):
        answer = client.predict(**headers)
        assert answer.status_code == 200, answer.text
        version = int(answer.headers["x-expunge-version"])
        assert answer.json()["outputs"][0]["label"] == {1: "no"}.get(version, "yes")
        found[version] += 1
    return found


def both(client: Client) -> None:
    wait_until(lambda: client.predict(x_expunge_canary="true").headers.get("x-expunge-version") == "2")


def test_a_share_of_the_requests_is_answered_by_the_canary(toy: Toy) -> None:
    with serving(toy) as (client, _):
        assert start(toy, "a", "c") == 2
        both(client)
        assert toy.leases()[0]["covers"] == 1  # the lowest that may still answer
        shared = versions(client, 200)
        assert set(shared) == {1, 2}
        assert 50 < shared[2] < 150  # 7 standard errors
        assert versions(client, x_expunge_canary="false") == {1: 60}
        assert versions(client, x_expunge_canary="true") == {2: 60}
        assert versions(client, x_expunge_min_version="2") == {2: 60}
        assert versions(client, x_expunge_min_version="2", x_expunge_canary="false") == {2: 60}
        assert client.predict(x_expunge_canary="perhaps").status_code == 400
        metadata = client.get("/v2/models/toy").json()
        assert metadata["versions"] == ["1", "2"]
        body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}
        for version in ("1", "2"):
            answer = client.post(f"/v2/models/toy/versions/{version}/infer", json=body)
            assert (answer.status_code, answer.json()["model_version"]) == (200, version)
            assert client.get(f"/v2/models/toy/versions/{version}/ready").status_code == 200
        assert client.get("/v2/models/toy/versions/3/ready").status_code == 503
        metrics = client.get("/metrics").text
        assert 'expunge_serving_canary_share{model="toy"} 50.0' in metrics
        for version in (1, 2):
            assert f'expunge_version_answers_total{{model="toy",result="answered",version="{version}"}}' in metrics


def test_a_promotion_ends_the_stable_version_when_its_last_work_is_done(toy: Toy) -> None:
    with serving(toy) as (client, _):
        start(toy, "a", "c")
        both(client)
        verb(toy, canaries.promote)
        wait_until(lambda: toy.leases()[0]["covers"] == 2)
        assert versions(client, 30, x_expunge_canary="false") == {2: 30}
        assert 'version="1"' not in client.get("/metrics").text
        (event,) = toy.events("canary.promoted")
        assert event == {"version": 2, "actor": "test", "reason_code": "tried"}
        with pytest.raises(ConflictError, match="no canary"):
            verb(toy, canaries.abort)


def test_an_abort_serves_the_stable_assembly_under_a_new_number(toy: Toy) -> None:
    with serving(toy) as (client, _):
        start(toy, "a", "c")
        both(client)
        assert verb(toy, canaries.abort) == 3
        wait_until(lambda: toy.leases()[0]["covers"] == 3)
        answer = client.predict(x_expunge_canary="true")
        assert (answer.headers["x-expunge-version"], answer.json()["outputs"][0]["label"]) == ("3", "no")
        assert len(toy.events("canary.aborted")) == 1


@pytest.mark.parametrize("tainted", [0, 1])
def test_a_deactivation_ends_a_canary_at_once_and_frees_what_is_tainted(
    toy: Toy, tainted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "IDLE_POLL", 60.0)
    with serving(toy, settings=toy.settings(lease_ttl_ms=80_000)) as (client, _):
        start(toy, "a", "c")
        both(client)
        began = time.monotonic()
        kept = ["a", "b"]
        kept[tainted] = None  # type: ignore[call-overload]
        version = toy.publish(*kept, taint=tainted)
        wait_until(lambda: toy.leases()[0]["covers"] == version)
        assert time.monotonic() - began < 5  # not a heartbeat, which comes every twenty seconds
        for wish in ("true", "false"):
            assert client.predict(x_expunge_canary=wish).headers["x-expunge-version"] == str(version)
        wait_until(lambda: toy.leases()[0]["freed"] == version)
        with toy.connect() as connection:
            row = connection.execute("select stable, canary_until from model").fetchone()
        assert row == (None, None)


def test_work_begun_on_either_is_computed_again_where_the_floor_rises(toy: Toy) -> None:
    class Engine(Held):
        pass

    with serving(toy, factory=Engine, settings=toy.settings(lease_ttl_ms=20_000)) as (client, program):
        start(toy, "a", "c")
        Engine.go.set()
        both(client)
        Engine.go.clear()
        answers: list[httpx.Response] = []

        def ask(wish: str) -> None:
            with Client(client.base_url.port or 0, toy) as own:
                answers.append(own.predict(x_expunge_canary=wish))

        threads = [threading.Thread(target=ask, args=(wish,)) for wish in ("true", "false")]
        for thread in threads:
            thread.start()
        found = program.fleet.find("toy")
        assert found is not None
        wait_until(lambda: len(found.replica.fence.computing) == 2)
        version = toy.publish("a", None, taint=1)
        wait_until(lambda: found.replica.fence.local_floor == version)
        Engine.go.set()
        for thread in threads:
            thread.join()
        assert [each.json().get("version", each.text) for each in answers] == [version, version]


def test_no_request_fails_and_none_is_stale_through_canaries_that_come_and_go(toy: Toy) -> None:
    floor, stop = 1, threading.Event()
    wrong: list[Any] = []
    seen = Counter[int]()

    def hammer(port: int) -> None:
        with Client(port, toy) as own:
            while not stop.is_set():
                least = floor
                answer = own.predict()
                version = int(answer.headers.get("x-expunge-version", 0))
                seen[version] += 1
                if answer.status_code != 200 or version < least:
                    wrong.append((answer.status_code, version, least))

    with serving(toy) as (client, _):
        threads = [threading.Thread(target=hammer, args=(client.base_url.port,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(9):
            newest = start(toy, "a", "c")
            wait_until(lambda newest=newest: seen[newest] > 0)
            if turn % 3 == 0:
                verb(toy, canaries.promote)
            elif turn % 3 == 1:
                verb(toy, canaries.abort)
            else:
                cleared = toy.publish("a", "b")
                wait_until(lambda cleared=cleared: toy.leases()[0]["covers"] == cleared)
                floor = cleared
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(seen) > 9


def test_a_server_that_starts_during_a_canary_begins_with_the_stable_version(toy: Toy) -> None:
    start(toy, "a", "c")
    with serving(toy) as (client, _):
        both(client)
        assert set(versions(client, 60)) == {1, 2}
        assert [event["covers"] for event in toy.events("replica.registered")] == [1]


def test_a_canary_that_cannot_be_loaded_leaves_all_traffic_to_the_stable_version(toy: Toy) -> None:
    toy.object_path("c").write_bytes(b'{"name":"c","weight":6.0}')
    with serving(toy) as (client, _):
        start(toy, "a", "c")
        wait_until(lambda: "cannot be loaded" in client.get("/readyz").text)
        assert versions(client, 30, x_expunge_canary="true") == {1: 30}


def test_an_engine_that_fails_on_the_canary_ends_it(toy: Toy) -> None:
    class Failing(ToyEngine):
        def build(self, assembly: Assembly) -> Any:
            made = super().build(assembly)
            if any(tensor.weight == 3.0 for tensor in made.tensors):
                made.logits = lambda _texts: 1 / 0  # type: ignore[method-assign,assignment,return-value]
            return made

    with serving(toy, factory=Failing) as (client, _):
        start(toy, "a", "c", share=1)
        wait_until(lambda: client.predict(x_expunge_canary="true").status_code == 500)
        wait_until(lambda: client.predict(x_expunge_canary="true").headers.get("x-expunge-version") == "3")
        (event,) = toy.events("canary.aborted")
        assert event == {"version": 2, "actor": None, "reason_code": "engine_failed"}
        assert client.predict().json()["outputs"][0]["label"] == "no"


# Through planner and worker


def rebuilt_to_canary(world: Copy, *, minutes: float | None = None) -> None:
    set_canary(world, Canary(20, minutes))
    delete(world, "s1")
    build(world)


def running(world: Copy) -> tuple[int | None, int]:
    model = model_of(world)
    return model.stable, model.version


def locked(connection: Connection, world: Copy) -> models.Model:
    return models.lock_model(connection, world.model_id)


def test_a_rebuild_is_tried_beside_what_serves_and_promoted_when_its_time_has_come(world: Copy) -> None:
    rebuilt_to_canary(world, minutes=5)
    assert running(world) == (2, 3)
    assert (depth(world, 2), depth(world, 3)) == (3, 4)
    nothing_tainted_serves(world)
    build(world)
    assert running(world) == (2, 3)  # neither twice, nor early
    with transaction(world.pool) as connection:
        connection.execute("UPDATE model SET canary_until = clock_timestamp()")
    steps.publish_model(world.context, world.model_id)
    assert running(world) == (None, 3)
    assert world.row("SELECT state FROM gate") == ("admitted",)
    assert world.row("SELECT count(*) FROM stage WHERE gated") == (0,)
    assert world.events("canary.promoted") == [{"version": 3, "actor": None, "reason_code": "time_passed"}]


def test_what_was_aborted_does_not_come_again_by_itself(world: Copy) -> None:
    rebuilt_to_canary(world)
    stable = served(world, 2).digest
    with transaction(world.pool) as connection:
        canaries.abort(connection, locked(connection, world), actor=world.actor, reason_code="worse")
    assert (running(world), served(world).digest) == ((None, 4), stable)
    build(world)
    assert running(world) == (None, 4)
    with transaction(world.pool) as connection:
        assert overrides.override(connection, "tiny", actor=world.actor, reason_code="better") == 5
    assert depth(world) == 4


def test_a_deletion_ends_the_canary_whatever_it_touches_and_a_new_one_follows(world: Copy) -> None:
    rebuilt_to_canary(world)
    for subject in ("s2", "s3"):
        delete(world, subject)  # finds itself in effect at once
        model = model_of(world)
        assert (model.stable, model.floor) == (None, model.version)
        nothing_tainted_serves(world)
        build(world)
        model = model_of(world)
        assert model.stable == model.floor
        nothing_tainted_serves(world)


def test_a_lift_that_brings_nothing_back_leaves_the_canary(world: Copy) -> None:
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)

    def cell_of(subject: str) -> int:
        return world.row("SELECT cell_id FROM record WHERE record_id = %s", record_id_of(key, SUBJECTS[subject][0]))[0]

    neighbour = next(each for each in SUBJECTS if each != "s1" and cell_of(each) == cell_of("s1"))
    restriction = world.ask(neighbour, kind=Kind.RESTRICT)
    steps.plan_targets(world.context, world.model_id)
    rebuilt_to_canary(world)
    before = running(world)
    assert before[0] is not None
    with transaction(world.pool) as connection:
        lifts.lift(connection, restriction, actor=world.actor, reason_code="withdrawn")
    assert running(world) == before


def test_gate_then_canary(world: Copy) -> None:
    evaluated(world)
    set_gate(world, Gate(within=0))
    rebuilt_to_canary(world)
    assert running(world) == (None, 2)
    assert evaluate_model(world.context, world.model_id) == 3
    assert running(world) == (2, 3)
    assert world.row("SELECT state, score FROM gate") == ("canary", 0.5)
    with transaction(world.pool) as connection, pytest.raises(ConflictError, match="promote or abort"):
        policies.set_canary(connection, "tiny", None, actor=world.actor)
    assert Barrier(world.pool, margin=0.05).look() is not None
