"""The barrier's SQL: which floors are waited for, who lags behind, and the declaration (rule 9)."""

from dataclasses import dataclass
from datetime import datetime
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.evidence.events import EventKind
from service.store import events, models, targets
from service.store.database import Connection, ask
from service.store.models import Model

LIST_WAITING: LiteralString = """
SELECT m.model_id, m.floor, m.cleared
FROM model m
WHERE m.cleared < m.floor
   OR EXISTS (SELECT FROM request_target t
              WHERE t.model_id = m.model_id AND t.state = 'deactivating' AND t.version <= m.cleared)
ORDER BY m.model_id
"""
LIST_LEASES: LiteralString = """
SELECT process_id, model_id, covers, ttl_ms, beats FROM lease WHERE ended_at IS NULL
"""
LOCK_LEASES: LiteralString = """
SELECT process_id, model_id, covers, ttl_ms, beats FROM lease
WHERE model_id = %(model_id)s::bigint AND ended_at IS NULL
ORDER BY process_id
FOR UPDATE
"""
END_LEASES: LiteralString = """
UPDATE lease l SET ended_at = clock_timestamp()
FROM unnest(%(process_ids)s::uuid[], %(beats)s::bigint[]) q (process_id, beats)
WHERE l.process_id = q.process_id AND l.beats = q.beats AND l.ended_at IS NULL
RETURNING l.process_id
"""
MARK_CLEARED: LiteralString = """
UPDATE model SET cleared = %(floor)s::bigint WHERE model_id = %(model_id)s::bigint AND cleared < %(floor)s::bigint
"""
ALL_FREED: LiteralString = """
SELECT NOT EXISTS (
    SELECT FROM lease
    WHERE model_id = %(model_id)s::bigint AND ended_at IS NULL AND freed < %(version)s::bigint)
"""
SERVER: LiteralString = """
SELECT s.system_identifier, substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) AS timeline,
       pg_postmaster_start_time() AS started, c.checkpoint_lsn::text AS checkpoint
FROM pg_control_system() s, pg_control_checkpoint() c
"""


@dataclass(frozen=True, slots=True)
class Server:
    """Which Postgres answers: what rule 10 calls another one differs in one of the first three."""

    system_identifier: int
    timeline: str
    started: datetime
    checkpoint: str
    """Where the last checkpoint lies: it also moves when the server recovers from a crash of one of its processes,
    which ends no postmaster but may lose heartbeats, that are committed asynchronously (rule 12)."""

    def is_another_than(self, other: "Server") -> bool:
        """Restarted, failed over or restored since."""
        mine, theirs = ((each.system_identifier, each.timeline, each.started) for each in (self, other))
        return mine != theirs


@dataclass(frozen=True, slots=True)
class Waiting:
    """A model with a floor to clear, or with targets that wait for one that is cleared."""

    model_id: int
    floor: int
    cleared: int


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """A process that may still answer."""

    process_id: UUID
    model_id: int
    covers: int
    ttl_ms: int
    beats: int


@dataclass(frozen=True, slots=True)
class Declared:
    """What a declaration did."""

    requests: list[UUID]
    fenced: int


def look(connection: Connection) -> tuple[Server, list[Waiting], list[LeaseRow]]:
    """The server, models to do something for, and processes that have not ended; one round trip."""
    with connection.pipeline():
        server = ask(connection, SERVER, {}, class_row(Server))
        waiting = ask(connection, LIST_WAITING, {}, class_row(Waiting))
        leases = ask(connection, LIST_LEASES, {}, class_row(LeaseRow))
        return server()[0], waiting(), leases()


def is_still(connection: Connection, server: Server) -> bool:
    """Whether nothing that `look` has seen on `server` can have been lost since (rules 10 and 12)."""
    with connection.cursor(row_factory=class_row(Server)) as cursor:
        return cursor.execute(SERVER).fetchall() == [server]


def all_freed(connection: Connection, model_id: int, version: int) -> bool:
    """Whether every process that runs has dropped the weights that only versions below `version` used."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return bool(cursor.execute(ALL_FREED, {"model_id": model_id, "version": version}).fetchone())


def declare(
    connection: Connection, model_id: int, floor: int, *, expired: dict[UUID, int], server: Server | None = None
) -> Declared | None:
    """Clear `floor`, unless a process that is not in `expired` lags behind it (then None, nothing changed).

    `expired` are processes whose lease has run out on the caller's own monotonic clock, with the heartbeats they had
    sent by then; those that lag and have not renewed since are ended. None also where `server`, which they were seen
    on, does not answer any more, see `is_still`.
    """
    with connection.pipeline():  # this is waited for: server, model and leases come in one round trip
        here = ask(connection, SERVER, {}, class_row(Server))
        model = models.ask_locked(connection, model_id)
        leases = ask(connection, LOCK_LEASES, {"model_id": model_id}, class_row(LeaseRow))
        if here() != [server] and server is not None:
            return None
        return _declare(connection, model(), leases(), floor, expired)


def end_expired(connection: Connection, model_id: int, expired: dict[UUID, int]) -> list[UUID]:
    """End processes whose lease has run out, under the model's lock, so that no heartbeat renews one meanwhile."""
    model = models.lock_model(connection, model_id)
    return _end(connection, expired, model_id=model_id, floor=model.floor)


def _declare(
    connection: Connection, model: Model, leases: list[LeaseRow], floor: int, expired: dict[UUID, int]
) -> Declared | None:
    model_id = model.model_id
    lagging = {lease.process_id: lease.beats for lease in leases if lease.covers < floor}
    if any(expired.get(process_id) != beats for process_id, beats in lagging.items()):
        return None
    if lagging:
        _end(connection, lagging, model_id=model_id, floor=floor)
    if model.cleared < floor:
        connection.execute(MARK_CLEARED, {"model_id": model_id, "floor": floor})
        events.append(
            connection,
            EventKind.VERSION_CLEARED,
            model_id=model_id,
            floor=floor,
            acknowledged=len(leases) - len(lagging),
            fenced=len(lagging),
        )
    done = targets.mark_deactivated(connection, model_id, floor)
    for request_id in done:
        events.append(connection, EventKind.TARGET_DEACTIVATED, request_id=request_id, model_id=model_id, version=floor)
    return Declared(done, len(lagging))


def _end(connection: Connection, expired: dict[UUID, int], *, model_id: int, floor: int) -> list[UUID]:
    """Mark processes as ended: their heartbeats are refused from now on, and they exit (rule 11)."""
    values = {"process_ids": list(expired), "beats": list(expired.values())}
    with connection.cursor(row_factory=scalar_row) as cursor:
        ended: list[UUID] = cursor.execute(END_LEASES, values).fetchall()
    for process_id in ended:
        events.append(connection, EventKind.REPLICA_FENCED, model_id=model_id, process_id=str(process_id), floor=floor)
    return ended
