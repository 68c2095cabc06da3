"""The barrier: when `deactivated` may be said (rules 9 and 10), on a clock of its own and on real lease rows."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from world_copies import Copy

from service.store import barrier as store
from service.store import leases, models
from service.store.barrier import LeaseRow, Server, Waiting
from service.store.database import Connection, transaction
from service.store.leases import Beat
from workers import steps
from workers.barrier import Barrier, Clocks

pytest_plugins = ("world_fixtures",)
A, B = UUID(int=1), UUID(int=2)
FIRST = Server(1, "00000001", datetime(2026, 1, 1, tzinfo=UTC), "0/1")


def row(covers: int, *, beats: int = 0, process_id: UUID = A, model_id: int = 1, ttl_ms: int = 1000) -> LeaseRow:
    return LeaseRow(process_id, model_id, covers, ttl_ms, beats)


@pytest.fixture
def clocks() -> Clocks:
    found = Clocks(margin=0.1)
    found.saw_server(FIRST, -100.0)
    return found


def test_each_floor_has_its_own_timer(clocks: Clocks) -> None:
    """A stream of new floors starves no older one, and no older timer declares a newer floor."""
    for beats, now in enumerate((0.0, 0.4, 0.8)):  # the process renews all the time, and never swaps
        clocks.saw_leases([row(1, beats=beats)], now)
        clocks.saw_floors([Waiting(1, 2 + beats, 1)], now)
    clocks.saw_leases([row(1, beats=9)], 1.2)
    for now, expired in ((1.09, ()), (1.11, (2,)), (1.51, (2, 3)), (1.91, (2, 3, 4))):
        clocks.saw_leases([row(1, beats=int(now * 100))], now)
        assert [f for f in (2, 3, 4) if clocks.is_expired(row(1), f, now)] == list(expired), now
    assert not clocks.is_expired(row(4), 4, 1.92)  # it covers the floor: its own lease counts
    clocks.saw_floors([Waiting(1, 4, 3)], 5.0)
    assert list(clocks.floors) == [(1, 4)]


def test_a_silent_process_expires_by_its_own_clock(clocks: Clocks) -> None:
    clocks.saw_leases([row(5, beats=1), row(5, process_id=B)], 0.0)
    clocks.saw_leases([row(5, beats=2), row(5, process_id=B)], 1.0)
    assert [clocks.is_expired(row(5, process_id=each), 5, 1.11) for each in (A, B)] == [False, True]
    assert clocks.is_expired(row(5), 5, 2.11)
    clocks.saw_leases([], 3.0)
    clocks.saw_leases([row(5, beats=2)], 4.0)  # a row that was away is as good as new
    assert not clocks.is_expired(row(5), 5, 4.5)


def test_models_have_timers_of_their_own(clocks: Clocks) -> None:
    clocks.saw_leases([row(1, model_id=2)], 1.0)
    clocks.saw_floors([Waiting(1, 2, 1)], 0.0)
    clocks.saw_floors([Waiting(1, 2, 1), Waiting(2, 2, 1)], 1.0)
    assert not clocks.is_expired(row(1, model_id=2), 2, 1.5)
    assert clocks.floors == {(1, 2): 0.0, (2, 2): 1.0}


@pytest.mark.parametrize(
    "change",
    [{"system_identifier": 2}, {"timeline": "00000002"}, {"started": FIRST.started + timedelta(seconds=1)}],
    ids=["another cluster", "failover", "restart"],
)
def test_another_postgres_resets_everything(clocks: Clocks, change: dict[str, Any]) -> None:
    """Rule 10: with the old one acknowledgements, and after a restore whole rows, may have been lost."""
    clocks.saw_leases([row(1)], 0.0)
    clocks.saw_floors([Waiting(1, 2, 1)], 0.0)
    assert clocks.trusts_acknowledgements([row(2)], 0.5)
    clocks.saw_server(FIRST, 0.5)
    assert (1, 2) in clocks.floors
    clocks.saw_server(replace(FIRST, **change), 0.9)
    assert (clocks.floors, clocks.processes) == ({}, {})
    longer = [row(2), row(2, process_id=B, ttl_ms=3000)]
    assert [clocks.trusts_acknowledgements(longer, now) for now in (0.9, 3.99, 4.01)] == [False, False, True]


def test_a_restored_postgres_may_lack_the_row_of_a_process_that_runs() -> None:
    """Rule 10: no row at all is no proof that nobody holds a lease, until the longest lease has passed."""
    clocks = Clocks(margin=0.1, ttl=2.0)
    clocks.saw_server(FIRST, 0.0)
    assert [clocks.trusts_acknowledgements([], now) for now in (0.0, 2.09, 2.11)] == [False, False, True]
    assert not clocks.trusts_acknowledgements([row(2, ttl_ms=3000)], 2.11)
    clocks.saw_server(replace(FIRST, system_identifier=2), 9.0)
    assert not clocks.trusts_acknowledgements([], 11.0)


def test_after_a_checkpoint_silence_is_counted_anew(clocks: Clocks) -> None:
    """It may be the one after a crash, which loses heartbeats (rule 12) but neither floors nor acknowledgements."""
    clocks.saw_leases([row(1)], 0.0)
    clocks.saw_floors([Waiting(1, 2, 1)], 0.0)
    clocks.saw_server(replace(FIRST, checkpoint="0/2"), 0.9)
    clocks.saw_leases([row(1)], 0.9)
    assert clocks.floors == {(1, 2): 0.0}
    assert clocks.trusts_acknowledgements([row(1)], 0.9)
    assert [clocks.is_silent(row(1), now) for now in (1.2, 1.99, 2.01)] == [False, False, True]


class Watch:
    """A barrier that has watched this Postgres for long, and the processes that it watches."""

    def __init__(self, world: Copy) -> None:
        self.world = world
        self.barrier = self.new()

    def new(self) -> Barrier:
        made = Barrier(self.world.pool, margin=0.05)
        with transaction(self.world.pool) as connection:
            made._clocks.saw_server(store.look(connection)[0], -1e9)
        return made

    def start(self, covers: int, *, ttl_ms: int = 60_000, model_id: int | None = None) -> UUID:
        process_id, model_id = uuid4(), model_id or self.world.model_id
        with transaction(self.world.pool) as connection:
            assert leases.register(
                connection, process_id=process_id, model_id=model_id, name="r", covers=covers, freed=0, ttl_ms=ttl_ms
            ).granted
        return process_id

    def beat(self, process_id: UUID, covers: int) -> Beat:
        with transaction(self.world.pool) as connection:
            return leases.beat(connection, process_id=process_id, model_id=self.world.model_id, covers=covers, freed=0)

    def deactivate(self, subject: str = "s1") -> UUID:
        request_id = self.world.ask(subject)
        steps.plan_targets(self.world.context, self.world.model_id)
        return request_id

    def until_declared(self, barrier: Barrier, during: dict[UUID, int]) -> float:
        """Look until nothing is waited for, while these processes renew with what they cover."""
        began = time.monotonic()
        while barrier.look():
            for process_id, covers in during.items():
                self.beat(process_id, covers)
            time.sleep(0.01)
            assert time.monotonic() < began + 10
        return time.monotonic() - began


@pytest.fixture
def watch(world: Copy) -> Iterator[Watch]:
    return Watch(world)


@pytest.mark.integration
def test_declared_when_all_have_acknowledged_and_not_before(watch: Watch, world: Copy) -> None:
    first, second = watch.start(1), watch.start(1)
    assert not watch.barrier.look()
    request_id = watch.deactivate()
    for process_id in (first, second):
        assert watch.barrier.look()
        assert world.states(request_id) == [("deactivating", None)]
        assert world.bounds() == (2, 2, 0)
        watch.beat(process_id, 2)
    assert not watch.barrier.look()
    assert world.states(request_id) == [("deactivated", None)]
    assert world.bounds() == (2, 2, 2)
    assert world.events("version.cleared") == [{"floor": 2, "acknowledged": 2, "fenced": 0}]


@pytest.mark.integration
@pytest.mark.parametrize("renews", [False, True])
def test_a_replica_that_never_acknowledges_is_fenced_by_time(watch: Watch, world: Copy, renews: bool) -> None:
    """Dead, or alive and renewing without a swap: neither holds `deactivated` longer than its lease."""
    lost, good = watch.start(1, ttl_ms=400), watch.start(1, ttl_ms=300)
    began = time.monotonic()
    watch.barrier.look()
    request_id = watch.deactivate()
    assert watch.beat(good, 2).granted
    watch.until_declared(watch.barrier, {good: 2} | ({lost: 1} if renews else {}))
    assert time.monotonic() - began > 0.45
    assert world.states(request_id) == [("deactivated", None)]
    assert world.rows("SELECT process_id FROM lease WHERE ended_at IS NOT NULL") == [(lost,)]
    assert watch.beat(lost, 2) == Beat(2, 2, granted=False, ended=True)
    assert world.events("replica.fenced") == [{"process_id": str(lost), "floor": 2}]
    assert world.events("version.cleared") == [{"floor": 2, "acknowledged": 1, "fenced": 1}]


@pytest.mark.integration
def test_a_new_barrier_trusts_no_acknowledgement_for_one_lease(watch: Watch, world: Copy) -> None:
    watch.beat(watch.start(1, ttl_ms=300), 1)
    process_id = watch.start(1, ttl_ms=300)
    request_id = watch.deactivate()
    both = {each: 2 for (each,) in world.rows("SELECT process_id FROM lease")}
    assert all(watch.beat(each, 2).granted for each in both)
    assert watch.until_declared(Barrier(world.pool, margin=0.05), both) > 0.34
    assert world.states(request_id) == [("deactivated", None)]
    assert watch.beat(process_id, 2).granted  # it had acknowledged: nobody ended it


@pytest.mark.integration
def test_two_barriers_declare_once(watch: Watch, world: Copy) -> None:
    process_id = watch.start(1)
    barriers = [watch.barrier, watch.new()]
    for number, subject in enumerate(("s1", "s2", "s3"), start=1):
        watch.deactivate(subject)
        watch.beat(process_id, world.bounds()[1])
        start = threading.Barrier(2)
        threads = [threading.Thread(target=lambda b=b, s=start: (s.wait(), b.look())) for b in barriers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert world.row("SELECT count(*) FROM event_pending WHERE kind = 'target.deactivated'") == (number,)
    floors = [body["floor"] for body in world.events("version.cleared")]
    assert floors == sorted(set(floors))
    assert world.rows("SELECT DISTINCT state FROM request_target") == [("deactivated",)]


@pytest.mark.integration
def test_an_acknowledged_floor_is_declared_while_a_newer_one_waits(watch: Watch, world: Copy) -> None:
    process_id = watch.start(1)
    first = watch.deactivate()
    assert watch.barrier.look()
    assert watch.beat(process_id, 2).granted
    others = (watch.deactivate(f"s{number}") for number in range(2, 24))
    last = next(each for each in others if world.bounds()[1] == 3)
    assert not watch.beat(process_id, 2).granted
    assert watch.barrier.look()
    assert world.bounds() == (3, 3, 2)
    assert (world.states(first), world.states(last)) == ([("deactivated", None)], [("deactivating", None)])


@pytest.mark.integration
def test_floor_zero_and_other_models_wait_for_nobody(watch: Watch, world: Copy) -> None:
    recipe = type(world.recipe).from_json(world.recipe.to_json() | {"seed": 9})
    with transaction(world.pool) as connection:
        other = models.insert_model(
            connection, name="other", dataset_id=world.dataset.dataset_id, evaluation_id=None, recipe=recipe,
            erase_after=timedelta(0),
        )  # fmt: skip
    watch.start(1)
    watch.start(0, model_id=other)
    request_id = watch.deactivate()
    steps.plan_targets(world.context, other)
    assert world.rows("SELECT version FROM request_target ORDER BY model_id") == [(2,), (0,)]
    assert watch.barrier.look()
    assert world.states(request_id) == [("deactivating", None), ("deactivated", None)]
    assert world.shown(request_id) == ("deactivating", None)


@pytest.mark.integration
def test_silent_processes_are_ended_when_nothing_waits(watch: Watch) -> None:
    silent, alive = watch.start(1, ttl_ms=300), watch.start(1)
    ended = "SELECT 1 FROM lease WHERE process_id = %s AND ended_at IS NOT NULL"
    until = time.monotonic() + 60
    while not watch.world.rows(ended, silent):
        assert time.monotonic() < until
        assert watch.beat(alive, 1).granted
        watch.barrier.look()
        time.sleep(0.02)
    assert (watch.beat(silent, 1).ended, watch.beat(alive, 1).granted) == (True, True)


@pytest.mark.integration
def test_a_process_that_renews_at_the_last_moment_is_not_ended(watch: Watch, world: Copy) -> None:
    """Rules 5 and 9: what was seen expired may have renewed since; then it holds a lease, and nobody ends it."""
    process_id = watch.start(1)
    assert watch.beat(process_id, 1).granted
    with transaction(world.pool) as connection:
        assert store.end_expired(connection, world.model_id, {process_id: 0}) == []
    assert watch.beat(process_id, 1).granted
    watch.deactivate()
    with transaction(world.pool) as connection:
        assert store.declare(connection, world.model_id, 2, expired={process_id: 0}) is None
        assert store.declare(connection, world.model_id, 2, expired={process_id: 2}) is not None
    assert watch.beat(process_id, 2).ended


@pytest.mark.integration
def test_what_was_seen_before_a_crash_neither_declares_nor_ends(
    watch: Watch, world: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres may go down between the look and the declaration, and come back without the newest heartbeats."""
    process_id = watch.start(1)
    watch.deactivate()
    watch.beat(process_id, 2)
    real = store.look

    def other(connection: Connection) -> tuple[Server, list[Waiting], list[LeaseRow]]:
        server, waiting, rows = real(connection)
        return replace(server, checkpoint="0/1"), waiting, rows

    with monkeypatch.context() as patch:
        patch.setattr(store, "look", other)
        assert watch.barrier.look()
        watch.barrier._clocks.processes[process_id].since = -1e9
        assert watch.barrier.look()
    assert world.rows("SELECT process_id FROM lease WHERE ended_at IS NOT NULL") == []
    assert world.bounds() == (2, 2, 0)
    assert not watch.barrier.look()
    assert world.bounds() == (2, 2, 2)


@pytest.mark.integration
def test_a_barrier_of_a_restored_postgres_waits_for_leases_without_a_row(watch: Watch, world: Copy) -> None:
    watch.deactivate()
    began = time.monotonic()
    watch.until_declared(Barrier(world.pool, margin=0.05, ttl=0.4), {})
    assert time.monotonic() - began > 0.44
    assert world.bounds() == (2, 2, 2)
