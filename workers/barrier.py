"""The barrier: declares `deactivated` once no process can answer from below a floor (rules 9 and 10).

Any number of barriers may run; each trusts only its own monotonic clock and what Postgres has committed.
"""

import time
from dataclasses import dataclass, field
from uuid import UUID

import structlog

from service.store import barrier
from service.store.barrier import LeaseRow, Server, Waiting
from service.store.database import Pool, retrying, transaction

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
    ttl: float = 0.0
    """Seconds of the longest lease that may run without a row here: a Postgres that was restored has lost rows."""
    floors: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    """(model, floor) -> when it was read as committed."""
    processes: dict[UUID, _Seen] = field(default_factory=dict[UUID, _Seen])
    server: Server | None = None
    """The Postgres whose rows these are."""
    since: float = 0.0
    """When it was first seen: until a lease's length has passed, only timeouts declare (rule 10)."""

    def saw_server(self, server: Server, now: float) -> None:
        """Forget what another Postgres said: with it renewals, acknowledgements and whole rows may have been lost.

        At a checkpoint silence is counted anew: it may be the one after a crash, of which nothing else tells, and what
        a crash has lost is at most the newest heartbeats (rule 12).
        """
        if self.server is None or server.is_another_than(self.server):
            self.since = now
            self.floors.clear()
        if server != self.server:
            self.server = server
            self.processes.clear()

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
        at = self.floors.get((lease.model_id, floor))
        lags = at is not None and lease.covers < floor and now > at + lease.ttl_ms / 1000 + self.margin
        return lags or self.is_silent(lease, now)

    def is_silent(self, lease: LeaseRow, now: float) -> bool:
        """Whether the process has not renewed for a whole time to live on our clock."""
        return now > self.processes[lease.process_id].since + lease.ttl_ms / 1000 + self.margin

    def trusts_acknowledgements(self, leases: list[LeaseRow], now: float) -> bool:
        """False for one lease's length after another Postgres took over, also of rows that it may lack (rule 10)."""
        longest = max((self.ttl, *(lease.ttl_ms / 1000 for lease in leases)))
        return longest == 0 or now > self.since + longest + self.margin


def _open(waiting: Waiting, key: tuple[int, int]) -> bool:
    model_id, floor = key
    return waiting.model_id == model_id and floor > waiting.cleared


class Barrier:
    """One look at a time, at the caller's pace. What follows from a declaration is the relay's to ring."""

    def __init__(self, pool: Pool, *, margin: float, ttl: float = 0.0) -> None:
        """`margin` and `ttl` in seconds, as in `Clocks`."""
        self._pool = pool
        self._clocks = Clocks(margin, ttl)

    def look(self) -> bool:
        """Declare what can be declared, end what has run out; returns whether a floor is still waited for."""
        with transaction(self._pool) as connection:
            server, waiting, leases = barrier.look(connection)
        now = boottime()  # after the reads: what was read was committed before it
        clocks = self._clocks
        clocks.saw_server(server, now)
        clocks.saw_leases(leases, now)
        clocks.saw_floors(waiting, now)
        declared = [self._declare(each, leases, server, now) for each in waiting]
        self._end_silent(leases, server, now)
        return False in declared

    def _end_silent(self, leases: list[LeaseRow], server: Server, now: float) -> None:
        """End processes whose lease ran out, so that the next deactivation need not wait for them."""
        silent: dict[int, dict[UUID, int]] = {}
        for lease in leases:
            if self._clocks.is_silent(lease, now):
                silent.setdefault(lease.model_id, {})[lease.process_id] = lease.beats
        for model_id, expired in silent.items():
            with transaction(self._pool) as connection:
                still = barrier.is_still(connection, server)
                ended = barrier.end_expired(connection, model_id, expired) if still else []
            if ended:
                log.warning("barrier.fenced", model_id=model_id, processes=len(ended))

    def _declare(self, waiting: Waiting, leases: list[LeaseRow], server: Server, now: float) -> bool:
        """Declare the highest floor that nobody lags behind; False when the newest is not declared yet."""
        mine = [lease for lease in leases if lease.model_id == waiting.model_id]
        if not self._clocks.trusts_acknowledgements(mine, now):
            return False
        for floor in sorted((f for m, f in self._clocks.floors if m == waiting.model_id), reverse=True):
            expired = {lease.process_id: lease.beats for lease in mine if self._clocks.is_expired(lease, floor, now)}
            lagging = [lease for lease in mine if lease.covers < floor and lease.process_id not in expired]
            if not lagging and self._commit(waiting.model_id, floor, expired, server):
                return floor == waiting.floor
        return False

    def _commit(self, model_id: int, floor: int, expired: dict[UUID, int], server: Server) -> bool:
        def step() -> barrier.Declared | None:
            with transaction(self._pool) as connection:
                return barrier.declare(connection, model_id, floor, expired=expired, server=server)

        declared = retrying(step)
        if declared is not None and declared.fenced:
            log.warning("barrier.fenced", model_id=model_id, floor=floor, processes=declared.fenced)
        return declared is not None
