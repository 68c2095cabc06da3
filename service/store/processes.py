"""The model server processes of a deactivation, as a certificate accounts for them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row

from service.evidence.events import EventKind
from service.evidence.rows import EvidenceError, ReplicaRow
from service.store import events
from service.store.database import Connection

LIST_LEASES: LiteralString = """
SELECT l.process_id, l.covers, l.freed, l.freed_at, l.started_at, l.ended_at
FROM lease l
WHERE l.model_id = %(model_id)s::bigint AND l.started_at <= %(until)s::timestamptz
  AND (l.ended_at IS NULL OR l.ended_at >= %(since)s::timestamptz)
ORDER BY l.process_id
"""
LIST_REPLICA_EVENTS: LiteralString = """
SELECT id, event_id, kind, request_id, model_id, body, created_at
FROM event_pending
WHERE body ->> 'process_id' = ANY(%(processes)s::text[]) AND kind LIKE 'replica.%%'
  AND created_at <= %(until)s::timestamptz
ORDER BY id
"""


@dataclass(frozen=True, slots=True)
class _Lease:
    process_id: UUID
    covers: int
    freed: int
    freed_at: datetime | None
    started_at: datetime
    ended_at: datetime | None


def list_replicas(
    connection: Connection, model_id: int, *, version: int, since: datetime, until: datetime
) -> tuple[tuple[ReplicaRow, ...], list[UUID]]:
    """Per process that ran between a request's receipt and its `deactivated`: how it came to cover the version.

    The second: ids of the events that say so.

    Raises:
        EvidenceError: a process that ran is unaccounted for.
    """
    values: dict[str, Any] = {"model_id": model_id, "until": until, "since": since}
    with connection.cursor(row_factory=class_row(_Lease)) as cursor:
        leases = cursor.execute(LIST_LEASES, values).fetchall()
    values["processes"] = [str(lease.process_id) for lease in leases]
    with connection.cursor(row_factory=class_row(events.Event)) as cursor:
        told = cursor.execute(LIST_REPLICA_EVENTS, values).fetchall()
    how: dict[str, tuple[str, events.Event]] = {}
    for event in told:
        process = event.body["process_id"]
        if process in how:
            continue
        if event.kind in {EventKind.REPLICA_REGISTERED, EventKind.REPLICA_ACKNOWLEDGED}:
            if event.body["covers"] >= version:
                how[process] = ("acknowledged", event)
        else:
            how[process] = (
                "fenced_by_expiry" if event.kind == EventKind.REPLICA_FENCED else "ended",
                event,
            )
    if any(str(lease.process_id) not in how for lease in leases):
        raise EvidenceError("a process ran during the deactivation and no event says what became of it")
    rows = tuple(
        ReplicaRow(
            process_id=lease.process_id,
            covers=lease.covers,
            how=how[str(lease.process_id)][0],
            at=how[str(lease.process_id)][1].created_at,
            freed=lease.freed >= version or lease.freed_at is not None,
            freed_at=lease.freed_at,
        )
        for lease in leases
    )
    return rows, [event.event_id for _, event in how.values()]
