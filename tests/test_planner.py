"""The planner: whom a request finds, what it takes out of service, and who it must not disturb (rules 23, 26 to 30)."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
from world_copies import SUBJECTS, Copy

from service.store import leases, models, publish, targets
from service.store.database import transaction
from shards.partition import dataset_key, record_id_of
from workers import steps
from workers.barrier import Barrier

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration

DONE = [("completed", "erased")]


def in_cells(world: Copy) -> dict[int, str]:
    """A subject for each cell."""
    found: dict[int, str] = {}
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    for subject, (name, *_) in SUBJECTS.items():
        (cell_id,) = world.row("SELECT cell_id FROM record WHERE record_id = %s", record_id_of(key, name))
        found.setdefault(cell_id, subject)
    return found


def names_of(world: Copy, request_id: UUID) -> set[UUID]:
    return {i for (i,) in world.rows("SELECT record_id FROM deletion_request_record WHERE request_id = %s", request_id)}


def test_an_unknown_subject_matches_nothing(world: Copy) -> None:
    request_id = world.ask("nobody")
    assert steps.plan_targets(world.context, world.model_id) == 1
    assert world.states(request_id) == [("completed", "no_match")]
    assert world.shown(request_id) == ("completed", "no_match")
    assert world.bounds() == (1, 0, 0)
    assert world.events("target.completed") == [{"outcome": "no_match"}]


@pytest.mark.parametrize("subject", ["ann", "bob", "cid"])
def test_a_record_is_found_from_everybody_it_concerns(world: Copy, subject: str) -> None:
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    request_id = world.ask(subject)
    steps.plan_targets(world.context, world.model_id)
    own = {record_id_of(key, "bobs")} if subject == "bob" else set()
    assert names_of(world, request_id) == {record_id_of(key, "shared")} | own
    world.finish(request_id)
    assert world.states(request_id) == DONE
    world.no_trace_of(request_id)
    assert world.active("ann") == 0


def test_the_same_subject_twice_in_one_batch(world: Copy) -> None:
    both = [world.ask("s1"), world.ask("s1")]
    assert steps.plan_targets(world.context, world.model_id) == 2
    assert world.bounds() == (2, 2, 0)
    world.finish(*both)
    assert [world.states(each) for each in both] == [DONE, DONE]


def test_the_second_of_two_plans_waits_for_the_same_floor(world: Copy) -> None:
    """Rule 30: nothing is tainted any more, but the floor that took it out is not cleared yet."""
    process_id = uuid4()
    about = {"process_id": process_id, "model_id": world.model_id}
    with transaction(world.pool) as connection:
        leases.register(connection, **about, name="r", covers=1, freed=1, ttl_ms=60_000)
    both: list[UUID] = []
    for _ in range(2):
        both.append(world.ask("s1"))
        assert steps.plan_targets(world.context, world.model_id) == 1
    assert world.bounds() == (2, 2, 0)
    assert world.rows("SELECT DISTINCT state, version FROM request_target") == [("deactivating", 2)]
    barrier = Barrier(world.pool, margin=0.05)
    assert barrier.look()
    assert world.rows("SELECT DISTINCT state FROM request_target") == [("deactivating",)]
    with transaction(world.pool) as connection:
        assert leases.beat(connection, **about, covers=2, freed=2).granted
        assert leases.end(connection, process_id)
    world.finish(*both)
    assert [world.states(each) for each in both] == [DONE, DONE]
    late = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    assert world.states(late) == [("completed", "no_match")]


def test_a_request_by_record_ids(world: Copy) -> None:
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    wanted = [record_id_of(key, "s1r0"), record_id_of(key, "s3r1")]
    request_id = world.ask(record_ids=wanted, dataset_id=world.dataset.dataset_id)
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    assert world.states(request_id) == DONE
    assert names_of(world, request_id) == set(wanted)
    assert (world.active("s1"), world.active("s3")) == (1, 1)
    assert world.add({"s1": ["s1-later"]}).skipped == 0  # the records go, the people may stay


def test_a_burst_is_one_version(world: Copy) -> None:
    for subject in itertools.islice(itertools.cycle(SUBJECTS), 200):
        world.ask(subject)
    assert steps.plan_targets(world.context, world.model_id) == 200
    assert world.bounds() == (2, 2, 0)
    assert world.rows("SELECT DISTINCT state, version FROM request_target") == [("deactivating", 2)]


def test_versions_keep_their_distance_even_between_planners(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 27. Another planner publishes while this one sleeps: it must look at the clock again."""
    a, b, c, d = in_cells(world).values()
    asked: list[UUID] = [world.ask(a)]
    steps.plan_targets(world.context, world.model_id)
    asked.append(world.ask(b))

    def other_planner(seconds: float) -> None:
        time.sleep(seconds)
        monkeypatch.setattr(steps, "time", time)
        steps.plan_targets(world.context, world.model_id)
        asked.append(world.ask(c))

    monkeypatch.setattr(steps, "time", SimpleNamespace(sleep=other_planner))
    steps.plan_targets(world.context, world.model_id)
    asked.append(world.ask(d))
    steps.plan_targets(world.context, world.model_id)
    at = world.rows("SELECT created_at FROM event_pending WHERE kind = 'version.published' ORDER BY id")
    gaps = [(after - before).total_seconds() for (before,), (after,) in itertools.pairwise(at[1:])]
    assert len(gaps) == 3
    assert min(gaps) > 0.095
    assert world.rows("SELECT DISTINCT state FROM request_target") == [("deactivating",)]


def test_two_planners_take_disjoint_targets(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "BATCH", 5)
    for subject in SUBJECTS:
        world.ask(subject)

    def planner() -> int:
        return sum(iter(lambda: steps.plan_targets(world.context, world.model_id), 0))

    with ThreadPoolExecutor(2) as pool:
        taken = [each.result() for each in [pool.submit(planner), pool.submit(planner)]]
    assert sum(taken) == len(SUBJECTS)
    per_request = "SELECT count(*) FROM event_pending WHERE kind = 'target.deactivating' GROUP BY request_id"
    assert world.rows(per_request) == [(1,)] * len(SUBJECTS)


def fail_at(world: Copy, condition: str) -> None:
    """Let the freezing of a target's plan fail in Postgres."""
    world.as_owner(
        "CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NEW.state = 'deactivating' AND {condition} THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW; END $$"
    )
    world.as_owner(
        "CREATE OR REPLACE TRIGGER fail BEFORE UPDATE ON request_target FOR EACH ROW EXECUTE FUNCTION fail()"
    )


def test_one_bad_target_does_not_poison_its_batch(world: Copy) -> None:
    good, bad, other = world.ask("s1"), world.ask("s2"), world.ask("s3")
    fail_at(world, f"NEW.request_id = '{bad}'")
    assert steps.plan_targets(world.context, world.model_id) == 3
    assert world.states(bad) == [("failed", None)]
    assert world.shown(bad) == ("failed", None)
    assert world.events("target.failed") == [{"error": "RaiseException", "attempts": 1}]
    assert world.active("s2") == 1  # nothing of the failed one is half done
    world.finish(good, bad, other)
    assert [world.states(each) for each in (good, other)] == [DONE, DONE]


def test_orders_of_deletion_agree(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """a then b, b then a, both at once: one assembly, for people of one cell, of one shard and of two."""
    monkeypatch.setattr(steps, "SPACING_SECONDS", 0)
    groups = [*itertools.combinations([*in_cells(world).values(), "ann"], 2), ("s1", "s2", "s3")]
    asked = {subject: world.ask(subject) for subject in {s for group in groups for s in group}}
    with transaction(world.pool) as connection:
        connection.execute("UPDATE request_target SET state = 'awaiting_identity'")

    def digest(batches: list[tuple[str, ...]]) -> str:
        with transaction(world.pool) as connection:
            for batch in batches:
                ids = [asked[subject] for subject in batch]
                connection.execute("UPDATE request_target SET state = 'received' WHERE request_id = ANY(%s)", [ids])
                assert steps.plan_batch(connection, world.model_id, counted=True) == len(batch)
            model = models.get_model_by_id(connection, world.model_id)
            found = publish.candidate(connection, model)
            assert found.assembly.digest == found.served
            assert not {member.stage for member in found.assembly.members if member} & found.tainted
            connection.rollback()
        return found.assembly.digest

    seen: set[str] = set()
    for group in groups:
        ways = [[(s,) for s in order] for order in itertools.permutations(group)] + [[group]]
        (only,) = {digest(way) for way in ways}
        seen.add(only)
    assert len(seen) > 2
