"""Leases of model servers: which process may still answer from which version (protocol.md, rules 2-6, 11, 12).

The decision to grant is made here, under a lock on the model's row; what a process does with it is
`service.serving.fence`.
"""

from dataclasses import dataclass, replace
from typing import Any, LiteralString, Self
from uuid import UUID

from psycopg.rows import class_row

from service.domain.errors import NotFoundError
from service.evidence.events import EventKind
from service.store import events
from service.store.database import Connection
from service.store.stages import HOLDS

# A process that is paused between two statements must not hold the lock on, for then nobody could publish.
SHARE_MODEL: LiteralString = """
SELECT m.version, m.floor
FROM model m, set_config('idle_in_transaction_session_timeout', (%(ttl_ms)s::int / 2)::text, true)
WHERE m.model_id = %(model_id)s::bigint
FOR SHARE OF m
"""
# A heartbeat need not wait for its fsync (rule 12); `true` ends the settings with the transaction, poolers included.
SHARE_MODEL_ASYNC: LiteralString = """
SELECT m.version, m.floor
FROM model m, set_config('synchronous_commit', 'off', true) durability,
     set_config('idle_in_transaction_session_timeout',
                (SELECT (l.ttl_ms / 2)::text FROM lease l WHERE l.process_id = %(process_id)s::uuid), true) patience
WHERE m.model_id = %(model_id)s::bigint
FOR SHARE OF m
"""
INSERT: LiteralString = """
INSERT INTO lease (process_id, model_id, name, covers, freed, ttl_ms)
VALUES (%(process_id)s::uuid, %(model_id)s::bigint, %(name)s::text, %(covers)s::bigint, %(freed)s::bigint,
        %(ttl_ms)s::int)
ON CONFLICT (process_id) DO NOTHING
RETURNING process_id
"""
RENEW: LiteralString = """
WITH before AS (
    SELECT process_id, covers FROM lease
    WHERE process_id = %(process_id)s::uuid AND ended_at IS NULL
    FOR UPDATE
)
UPDATE lease l
SET covers = greatest(l.covers, %(covers)s::bigint), freed = greatest(l.freed, %(freed)s::bigint), beats = l.beats + 1
FROM before
WHERE l.process_id = before.process_id AND l.ended_at IS NULL
RETURNING before.covers AS before, l.covers AS after
"""
IS_OPEN: LiteralString = """
SELECT FROM lease WHERE process_id = %(process_id)s::uuid AND ended_at IS NULL
"""
NOTIFY_ACK: LiteralString = "SELECT pg_notify('expunge_ack', %(payload)s::text)"
LISTEN_MODEL: LiteralString = "LISTEN expunge_model"
MARK_ENDED: LiteralString = """
UPDATE lease SET ended_at = clock_timestamp()
WHERE process_id = %(process_id)s::uuid AND ended_at IS NULL
RETURNING model_id
"""
MARK_FREED: LiteralString = """
UPDATE lease SET freed_at = clock_timestamp()
WHERE process_id = %(process_id)s::uuid AND freed_at IS NULL
"""
GET_TARGET: LiteralString = """
SELECT m.version, m.floor, m.recipe, v.assembly, a.body, m.min_shards, m.answers,
       m.stable, w.assembly AS stable_assembly, b.body AS stable_body,
       coalesce((m.canary ->> 'share')::int, 0) AS share
FROM model m
LEFT JOIN model_version v ON v.model_id = m.model_id AND v.version = m.version
LEFT JOIN assembly a ON a.digest = v.assembly
LEFT JOIN model_version w ON w.model_id = m.model_id AND w.version = m.stable
LEFT JOIN assembly b ON b.digest = w.assembly
WHERE m.model_id = %(model_id)s::bigint
"""
LIST_CLEAN_ARTIFACTS: LiteralString = (
    """
SELECT a.stage_key, a.digest, a.object_name
FROM stage s JOIN artifact a ON a.stage_key = s.stage_key
WHERE s.model_id = %(model_id)s::bigint AND a.kind = 'stage' AND a.state = 'live'
  AND NOT EXISTS (
      SELECT FROM stage_cell sc JOIN tombstone t ON t.cell_id = sc.cell_id
      WHERE sc.stage_key = s.stage_key AND t.lifted_at IS NULL
        AND """
    + HOLDS
    + """
        AND NOT EXISTS (SELECT FROM deferral d WHERE d.model_id = s.model_id AND d.record_id = t.record_id))
ORDER BY a.stage_key, a.object_name
"""
)


@dataclass(frozen=True, slots=True)
class Beat:
    """What the database says to a registration or a heartbeat: also the poll that replaces a lost NOTIFY."""

    version: int
    floor: int
    granted: bool
    """The lease runs until the moment *before* the call was sent, plus its time to live (rules 4 and 5)."""
    ended: bool = False
    """The row is ended or missing: the process stops answering, frees its weights and exits (rule 11)."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a model should serve now. `assembly` and `body` are None while nothing was ever published."""

    version: int
    floor: int
    recipe: dict[str, Any]
    assembly: str | None
    body: dict[str, Any] | None
    min_shards: int
    """With fewer live shards nothing is to be answered."""
    answers: str
    """How much answers tell: one of `service.domain.answers.Answers`."""
    stable: int | None = None
    """While `version` is a canary: the version that answers the rest of the requests."""
    stable_assembly: str | None = None
    stable_body: dict[str, Any] | None = None
    share: int = 0
    """Per cent of the requests that a canary gets."""

    def steps(self) -> list[Self]:
        """The versions to serve, each as a target of its own: the stable one first where there is a canary."""
        if self.stable is None:
            return [self]
        stable = replace(self, version=self.stable, assembly=self.stable_assembly, body=self.stable_body)
        return [stable, self]


@dataclass(frozen=True, slots=True)
class StageObject:
    """Where a stage's artefact lies."""

    stage_key: str
    digest: str
    object_name: str


@dataclass(frozen=True, slots=True)
class _Bounds:
    version: int
    floor: int


@dataclass(frozen=True, slots=True)
class _Renewal:
    before: int
    after: int


def register(
    connection: Connection,
    *,
    process_id: UUID,
    model_id: int,
    name: str,
    covers: int,
    freed: int,
    ttl_ms: int,
) -> Beat:
    """Insert the row of a process that has loaded version `covers`, unless that is below the floor (rule 3).

    Commit it synchronously. A call repeated after a broken commit finds its own row and changes nothing; if the row
    was ended meanwhile, the first heartbeat says so.
    """
    bounds = _bounds(connection, SHARE_MODEL, {"model_id": model_id, "ttl_ms": ttl_ms})
    if covers < bounds.floor:
        return Beat(bounds.version, bounds.floor, granted=False)
    values = {
        "process_id": process_id,
        "model_id": model_id,
        "name": name,
        "covers": covers,
        "freed": freed,
        "ttl_ms": ttl_ms,
    }
    if connection.execute(INSERT, values).fetchone() is not None:
        events.append(
            connection,
            EventKind.REPLICA_REGISTERED,
            model_id=model_id,
            process_id=str(process_id),
            covers=covers,
        )
    return Beat(bounds.version, bounds.floor, granted=True)


def beat(connection: Connection, *, process_id: UUID, model_id: int, covers: int, freed: int) -> Beat:
    """Renew the lease iff `covers` is not below the floor, both under one lock (rule 5).

    A risen `covers` is an acknowledgement: it rings the barrier and is recorded. A refusal changes nothing.
    """
    bounds = _bounds(connection, SHARE_MODEL_ASYNC, {"model_id": model_id, "process_id": process_id})
    if covers < bounds.floor:
        is_open = connection.execute(IS_OPEN, {"process_id": process_id}).fetchone() is not None
        return Beat(bounds.version, bounds.floor, granted=False, ended=not is_open)
    values = {"process_id": process_id, "covers": covers, "freed": freed}
    with connection.cursor(row_factory=class_row(_Renewal)) as cursor:
        renewal = cursor.execute(RENEW, values).fetchone()
    if renewal is None:
        return Beat(bounds.version, bounds.floor, granted=False, ended=True)
    if renewal.after > renewal.before:
        events.append(
            connection,
            EventKind.REPLICA_ACKNOWLEDGED,
            model_id=model_id,
            process_id=str(process_id),
            covers=renewal.after,
        )
        connection.execute(NOTIFY_ACK, {"payload": str(model_id)})
    return Beat(bounds.version, bounds.floor, granted=True)


def end(connection: Connection, process_id: UUID) -> bool:
    """End the caller's own row: it promises to answer nothing more, so no barrier needs to wait for it.

    False where the row was ended before, or never was. Rings the barrier.
    """
    row = connection.execute(MARK_ENDED, {"process_id": process_id}).fetchone()
    if row is None:
        return False
    events.append(connection, EventKind.REPLICA_ENDED, model_id=row[0], process_id=str(process_id))
    connection.execute(NOTIFY_ACK, {"payload": str(row[0])})
    return True


def mark_freed(connection: Connection, process_id: UUID) -> None:
    """The process holds no weights any more, and never will again (rule 11); also said of a row that was ended."""
    connection.execute(MARK_FREED, {"process_id": process_id})


def listen(connection: Connection) -> None:
    """Hear of published versions. Commit, *then* read the state: a notification is a hint (protocol.md section 4)."""
    connection.execute(LISTEN_MODEL)


def get_target(connection: Connection, model_id: int) -> Target:
    """Version, floor and assembly, read in one statement (rule 6).

    Raises:
        NotFoundError: no such model.
    """
    with connection.cursor(row_factory=class_row(Target)) as cursor:
        found = cursor.execute(GET_TARGET, {"model_id": model_id}).fetchone()
    if found is None:
        raise NotFoundError("there is no model with that id")
    return found


def list_clean_artifacts(connection: Connection, model_id: int) -> list[StageObject]:
    """Live artefacts of the model's stages whose lineage holds no record that is deleted or restricted.

    But for records that are deferred: what holds them serves until its replacement does.
    """
    with connection.cursor(row_factory=class_row(StageObject)) as cursor:
        return cursor.execute(LIST_CLEAN_ARTIFACTS, {"model_id": model_id}).fetchall()


def _bounds(connection: Connection, query: LiteralString, values: dict[str, Any]) -> _Bounds:
    with connection.cursor(row_factory=class_row(_Bounds)) as cursor:
        found = cursor.execute(query, values).fetchone()
    if found is None:
        raise NotFoundError("there is no model with that id")
    return found
