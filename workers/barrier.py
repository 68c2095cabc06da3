"""The barrier: declares `deactivated` once no process can answer from below a floor (rules 9 and 10).

Any number of barriers may run; each trusts only its own monotonic clock and what Postgres has committed.
"""

import time
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

import structlog

from service.store import barrier
from service.store.barrier import LeaseRow, Waiting
from service.store.database import Pool, retrying, transaction
from workers.bell import Bell

log = structlog.get_logger()


def boottime() -> float:
    """Seconds that pass while the machine sleeps, too (assumption A1)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class _Seen:
    beats: int
    since: float


@dataclass(slots=True)
class Clocks:
    """What this barrier has seen, and when: one timer per floor, one per process. Pure; the caller gives the time."""

    margin: float
    """Seconds added to every time to live: what clocks may drift apart."""
    floors: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    """(model, floor) -> when it was read as committed."""
    processes: dict[UUID, _Seen] = field(default_factory=dict[UUID, _Seen])
    started: datetime | None = None
    """Start of the postmaster whose rows these are."""
    since: float = 0.0
    """When this postmaster was first seen: until a lease's length has passed, only timeouts declare (rule 10)."""

    def saw_postmaster(self, started: datetime, now: float) -> None:
        """Forget everything when another postmaster answers: acknowledgements may have been lost with the old one."""
        if started != self.started:
            self.started, self.since = started, now
            self.processes.clear()
            self.floors.clear()

    def saw_leases(self, leases: list[LeaseRow], now: float) -> None:
        """Note which processes renewed since the last look."""
        kept: dict[UUID, _Seen] = {}
        for lease in leases:
            seen = self.processes.get(lease.process_id)
            kept[lease.process_id] = seen if seen and seen.beats == lease.beats else _Seen(lease.beats, now)
        self.processes = kept

    def saw_floors(self, waiting: list[Waiting], now: float) -> None:
        """Start a timer for each new floor; drop those of floors that are cleared."""
        kept = {key: at for key, at in self.floors.items() if any(_open(each, key) for each in waiting)}
        for each in waiting:
            kept.setdefault((each.model_id, each.floor), now)
        self.floors = kept

    def is_expired(self, lease: LeaseRow, floor: int, now: float) -> bool:
        """Whether the lease has run out for certain, so that the process can pass no final check below `floor`.

        Either it has not renewed for a whole time to live on our clock, or it lags behind a floor that long: a
        heartbeat that covers less than a committed floor is refused.
        """
        length = lease.ttl_ms / 1000 + self.margin
        silent = now > self.processes[lease.process_id].since + length
        at = self.floors.get((lease.model_id, floor))
        return silent or (at is not None and lease.covers < floor and now > at + length)

    def trusts_acknowledgements(self, leases: list[LeaseRow], now: float) -> bool:
        """False for one lease's length after another postmaster took over (rule 10)."""
        longest = max((lease.ttl_ms for lease in leases), default=0) / 1000
        return now > self.since + longest + self.margin or not leases


def _open(waiting: Waiting, key: tuple[int, int]) -> bool:
    model_id, floor = key
    return waiting.model_id == model_id and floor > waiting.cleared


class Barrier:
    """One look at a time, at the caller's pace."""

    def __init__(self, pool: Pool, bell: Bell, *, margin: float) -> None:
        """`margin` in seconds, as in `Clocks`."""
        self._pool = pool
        self._bell = bell
        self._clocks = Clocks(margin)

    def look(self) -> bool:
        """Declare what can be declared; returns whether a floor is still waited for."""
        with transaction(self._pool) as connection:
            started, waiting, leases = barrier.look(connection)
        now = boottime()  # after the reads: what was read was committed before it
        clocks = self._clocks
        clocks.saw_postmaster(started, now)
        clocks.saw_leases(leases, now)
        clocks.saw_floors(waiting, now)
        return [self._declare(each, leases, now) for each in waiting].count(False) > 0

    def end_silent(self) -> int:
        """End processes whose lease ran out, so that the next deactivation need not wait for them; returns how many."""
        now, ended = boottime(), 0
        with transaction(self._pool) as connection:
            for lease in barrier.list_leases(connection):
                seen = self._clocks.processes.get(lease.process_id)
                if seen and seen.beats == lease.beats and self._clocks.is_expired(lease, 0, now):
                    barrier.end_leases(connection, [lease.process_id], model_id=lease.model_id, floor=lease.covers)
                    ended += 1
        return ended

    def _declare(self, waiting: Waiting, leases: list[LeaseRow], now: float) -> bool:
        """Declare the highest floor that nobody lags behind; False when the newest is not declared yet."""
        mine = [lease for lease in leases if lease.model_id == waiting.model_id]
        floors = sorted((f for m, f in self._clocks.floors if m == waiting.model_id), reverse=True)
        for floor in floors:
            expired = frozenset(lease.process_id for lease in mine if self._clocks.is_expired(lease, floor, now))
            lagging = [lease for lease in mine if lease.covers < floor and lease.process_id not in expired]
            timer = self._clocks.floors[waiting.model_id, floor]
            trusted = self._clocks.trusts_acknowledgements(mine, now) or all(
                now > timer + lease.ttl_ms / 1000 + self._clocks.margin for lease in mine
            )
            if not lagging and trusted and self._commit(waiting.model_id, floor, expired):
                return floor == waiting.floor
        return False

    def _commit(self, model_id: int, floor: int, expired: frozenset[UUID]) -> bool:
        def step() -> barrier.Declared | None:
            with transaction(self._pool) as connection:
                return barrier.declare(connection, model_id, floor, expired=expired)

        declared = retrying(step)
        if declared is None:
            return False
        for request_id in declared.requests:
            self._bell.ring("target.erase", str(request_id), model_id)
        self._bell.ring("model.rebuild", model_id)
        if declared.fenced:
            log.warning("barrier.fenced", model_id=model_id, floor=floor, processes=declared.fenced)
        return True
