"""Leaves that come back from the ledger's files, each with what it records; and how far a restore is.

Its connections are the owner's and run in a mode of their own, in which triggers let the shut database change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import class_row, scalar_row
from psycopg.types.json import Jsonb

from service.evidence.events import EventKind
from service.evidence.leaves import Leaf
from service.store import ledger, mirror
from service.store.database import Connection

MODE = "-c expunge.mode=restoring"
"""Of a restore's connections."""
APPLYING: LiteralString = "SELECT set_config('expunge.mode', 'applying', true)"
LOCK: LiteralString = "SELECT pg_try_advisory_lock(7594881)"
BEGIN: LiteralString = """
INSERT INTO vetting (database, quarantine, progress)
VALUES (database_identity(), 'a restore is under way', %(progress)s::jsonb)
ON CONFLICT (one) DO UPDATE
SET quarantine = coalesce(vetting.quarantine, EXCLUDED.quarantine), published = 0,
    progress = coalesce(vetting.progress, EXCLUDED.progress)
"""
MARK_PROGRESS: LiteralString = "UPDATE vetting SET progress = progress || %(progress)s::jsonb"
ADD_RECOVERED: LiteralString = """
UPDATE vetting SET progress = jsonb_set(
    progress, '{recovered}', to_jsonb(coalesce((progress ->> 'recovered')::bigint, 0) + %(count)s::bigint))
"""
OPEN: LiteralString = "UPDATE vetting SET quarantine = NULL, progress = NULL, database = database_identity()"
INSERT_LEAVES: LiteralString = """
INSERT INTO ledger_leaf (index, event_id, hash, leaf)
SELECT * FROM unnest(%(indexes)s::bigint[], %(event_ids)s::uuid[], %(hashes)s::bytea[], %(leaves)s::bytea[])
"""
INSERT_EVENT: LiteralString = """
INSERT INTO event_pending (event_id, kind, request_id, model_id, body, created_at)
VALUES (%(event_id)s::uuid, %(kind)s::text, %(request_id)s::uuid, %(model_id)s::bigint, %(body)s::jsonb,
        %(created_at)s::timestamptz)
ON CONFLICT (event_id) DO NOTHING
RETURNING id
"""
INSERT_OPENING: LiteralString = """
INSERT INTO ledger_opening (index, opening, recorded_at)
VALUES (%(index)s::bigint, %(opening)s::bytea, %(recorded_at)s::timestamptz)
"""
DELETE_WAITING: LiteralString = """
DELETE FROM ledger_queue q USING event_pending e WHERE e.id = q.id AND e.event_id = ANY(%(event_ids)s::uuid[])
"""
INSERT_LOSS: LiteralString = """
INSERT INTO restore_loss (what, body) VALUES (%(what)s::text, %(body)s::jsonb) ON CONFLICT DO NOTHING
"""
LIST_LOSSES: LiteralString = "SELECT what, body FROM restore_loss ORDER BY loss_id"
FORGET_LOSSES: LiteralString = "DELETE FROM restore_loss"
INSERT_LOST_LEAVES: LiteralString = """
INSERT INTO event_pending (kind, body)
SELECT 'restore.leaf_lost', jsonb_build_object('of', number)
FROM generate_series(%(first)s::bigint, %(stop)s::bigint - 1) number ORDER BY number
"""


@dataclass(frozen=True, slots=True)
class Found:
    """A leaf of the ledger's files, with what opens it while that was not erased."""

    leaf: Leaf
    data: bytes
    hash: bytes
    opening: bytes | None
    opened: Mapping[str, Any] | None

    @property
    def at(self) -> datetime:
        """When it was recorded."""
        return datetime.fromisoformat(self.leaf.time)


@dataclass(frozen=True, slots=True)
class Loss:
    """Something that a restore could not bring back."""

    what: str
    body: dict[str, Any]


def lock(connection: Connection) -> bool:
    """Be the one restore of this database as long as the connection lives; False where another is."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return bool(cursor.execute(LOCK).fetchone())


def begin(connection: Connection, progress: Mapping[str, Any]) -> None:
    """Shut the database; what an interrupted restore found stays as it was."""
    connection.execute(BEGIN, {"progress": Jsonb(dict(progress))})


def mark_progress(connection: Connection, **progress: Any) -> None:
    """Note what was done, for the restore that goes on if this one dies."""
    connection.execute(MARK_PROGRESS, {"progress": Jsonb(progress)})


def add_recovered(connection: Connection, count: int) -> None:
    """Note that so many records got their rows again, in the transaction that inserts these."""
    connection.execute(ADD_RECOVERED, {"count": count})


def open_again(connection: Connection) -> None:
    """The database may work."""
    connection.execute(FORGET_LOSSES)
    connection.execute(OPEN)


def replay(connection: Connection, found: Sequence[Found]) -> int:
    """Insert leaves as they are behind the last one, and apply those that the database has not seen; how many.

    An event that is in the database was committed with what it records. What cannot be applied is noted as lost. The
    transaction records nothing by itself.
    """
    connection.execute(APPLYING)
    head = ledger.lock_head(connection)
    if [each.leaf.index for each in found] != list(range(head.size, head.size + len(found))):
        raise AssertionError("leaves are replayed in order, from the database's size on")
    event_ids, hashes = [UUID(each.leaf.event_id) for each in found], [each.hash for each in found]
    values = {
        "indexes": [each.leaf.index for each in found],
        "event_ids": event_ids,
        "hashes": hashes,
        "leaves": [each.data for each in found],
    }
    connection.execute(INSERT_LEAVES, values)
    ledger.grow(connection, head, hashes)
    applied = sum(_replay_one(connection, each) for each in found)
    connection.execute(DELETE_WAITING, {"event_ids": event_ids})
    return applied


def _replay_one(connection: Connection, found: Found) -> bool:
    leaf = found.leaf
    if found.opening is None or found.opened is None:
        insert_loss(connection, "opening", {"index": leaf.index, "kind": leaf.kind, "time": leaf.time})
        return False
    connection.execute(INSERT_OPENING, {"index": leaf.index, "opening": found.opening, "recorded_at": found.at})
    opened = found.opened
    row = {"event_id": UUID(leaf.event_id), "kind": leaf.kind, "created_at": found.at, "body": Jsonb(opened["body"])}
    row |= {"request_id": opened["request_id"], "model_id": opened["model_id"]}
    if connection.execute(INSERT_EVENT, row).fetchone() is None:
        return False
    try:
        with connection.transaction():
            apply(connection, leaf.kind, opened["body"])
    except psycopg.DatabaseError as error:
        if isinstance(error, psycopg.OperationalError):
            raise
        tables = [each["table"] for each in opened["body"].get("changes", ())]
        body = {"index": leaf.index, "kind": leaf.kind, "tables": tables, "error": error.sqlstate}
        insert_loss(connection, "refused", body)
    return True


def apply(connection: Connection, kind: str, body: Mapping[str, Any]) -> None:
    """Bring about what an event of that kind records; all but `rows.changed` are about rows that have their own.

    Raises:
        ValueError: an event of a newer version of this program: nothing may be passed over.
    """
    if kind not in set(EventKind):
        raise ValueError(f"the ledger holds events of kind {kind}, which this version does not know: use a newer one")
    if kind == EventKind.ROWS_CHANGED:
        for each in body["changes"]:
            mirror.apply(connection, each["table"], each["change"], each["rows"] or ())


def insert_loss(connection: Connection, what: str, body: dict[str, Any]) -> None:
    """Note what the operator must know; again is once."""
    connection.execute(INSERT_LOSS, {"what": what, "body": Jsonb(body)})


def list_losses(connection: Connection) -> list[Loss]:
    """What could not be brought back."""
    with connection.cursor(row_factory=class_row(Loss)) as cursor:
        return cursor.execute(LIST_LOSSES).fetchall()


def insert_lost_leaves(connection: Connection, first: int, stop: int) -> None:
    """An event for each leaf that was signed and is nowhere: no number is given to something else."""
    connection.execute(INSERT_LOST_LEAVES, {"first": first, "stop": stop})
