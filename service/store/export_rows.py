"""What an export holds, row by row through server-side cursors: requests, targets, events, certificates.

Fields are closed: no identifier, no commitment of one, nothing that a caller wrote. A row's class is the table's
schema in every format.
"""

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, LiteralString, TypeVar
from uuid import UUID

from psycopg.rows import class_row

from service.evidence.events import EventKind
from service.evidence.leaves import parse_leaf
from service.store import models
from service.store.database import Connection

BATCH = 2000
"""Rows of one FETCH."""
LARGE = 20
"""The same of certificates, each of which may have megabytes."""
T = TypeVar("T")

# The sort comes before the look-ups, which then run only as far as rows are fetched.
LIST_REQUESTS: LiteralString = """
SELECT d.request_id, d.kind, d.regime, d.state, d.outcome, w.reason_code, d.received_at, d.due_at, d.created_at,
       d.created_by, t.deactivated_at, t.erased_at, e.ended_at,
       coalesce(e.ended_at, clock_timestamp()) > d.due_at AS overdue,
       (extract(epoch FROM e.ended_at - d.received_at) / 86400)::float8 AS days, t.models::int
FROM (
    SELECT * FROM deletion_request
    WHERE (%(since)s::timestamptz IS NULL OR received_at >= %(since)s::timestamptz)
      AND (%(until)s::timestamptz IS NULL OR received_at < %(until)s::timestamptz)
      AND (%(request_id)s::uuid IS NULL OR request_id = %(request_id)s::uuid)
    ORDER BY received_at, request_id
) d
CROSS JOIN LATERAL (
    SELECT CASE WHEN bool_and(deactivated_at IS NOT NULL OR outcome IS NOT DISTINCT FROM 'no_match')
                THEN max(deactivated_at) END AS deactivated_at,
           CASE WHEN bool_and(erased_at IS NOT NULL OR outcome IS NOT DISTINCT FROM 'no_match')
                THEN max(erased_at) END AS erased_at,
           max(completed_at) AS completed_at, count(*) AS models
    FROM request_target WHERE request_id = d.request_id
) t
LEFT JOIN LATERAL (
    SELECT body ->> 'reason_code' AS reason_code, created_at FROM event_pending
    WHERE d.state IN ('rejected', 'revoked', 'expired', 'lifted') AND request_id = d.request_id
    ORDER BY body ? 'reason_code' DESC, id DESC LIMIT 1
) w ON true
CROSS JOIN LATERAL (
    SELECT CASE d.state WHEN 'completed' THEN t.completed_at ELSE w.created_at END AS ended_at
) e
ORDER BY d.received_at, d.request_id
"""
LIST_TARGETS: LiteralString = """
SELECT d.request_id, m.name AS model, t.state, t.outcome, t.version, t.deactivated_at, t.erased_at, t.completed_at,
       t.attempts, t.error, c.digest AS certificate
FROM (
    SELECT request_id, received_at FROM deletion_request
    WHERE (%(since)s::timestamptz IS NULL OR received_at >= %(since)s::timestamptz)
      AND (%(until)s::timestamptz IS NULL OR received_at < %(until)s::timestamptz)
      AND (%(request_id)s::uuid IS NULL OR request_id = %(request_id)s::uuid)
    ORDER BY received_at, request_id
) d
JOIN request_target t ON t.request_id = d.request_id
JOIN model m ON m.model_id = t.model_id
LEFT JOIN certificate c ON c.request_id = t.request_id AND c.model_id = t.model_id
ORDER BY d.received_at, d.request_id, t.model_id
"""
# A leaf's time is its own: events are erased when their retention ends, leaves never.
LIST_EVENTS: LiteralString = """
SELECT l.index, l.leaf, o.opening
FROM ledger_leaf l
LEFT JOIN ledger_opening o ON o.index = l.index
WHERE (%(before)s::bigint IS NULL OR l.index < %(before)s::bigint)
  AND (%(since)s::timestamptz IS NULL
       OR (convert_from(l.leaf, 'UTF8')::json ->> 'time')::timestamptz >= %(since)s::timestamptz)
  AND (%(until)s::timestamptz IS NULL
       OR (convert_from(l.leaf, 'UTF8')::json ->> 'time')::timestamptz < %(until)s::timestamptz)
  AND (%(request_id)s::uuid IS NULL OR l.event_id IN (
       SELECT event_id FROM event_pending WHERE request_id = %(request_id)s::uuid))
ORDER BY l.index
"""
LIST_CERTIFICATES: LiteralString = """
SELECT d.request_id, m.name AS model, c.envelope AS certificate,
       ARRAY(SELECT s.envelope FROM certificate_supplement s
             WHERE s.request_id = c.request_id AND s.model_id = c.model_id ORDER BY s.number) AS supplements
FROM deletion_request d
JOIN certificate c ON c.request_id = d.request_id
JOIN model m ON m.model_id = c.model_id
WHERE (%(since)s::timestamptz IS NULL OR d.received_at >= %(since)s::timestamptz)
  AND (%(until)s::timestamptz IS NULL OR d.received_at < %(until)s::timestamptz)
  AND (%(request_id)s::uuid IS NULL OR d.request_id = %(request_id)s::uuid)
ORDER BY d.received_at, d.request_id, c.model_id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """What an export is about: one request, or what was received (of events: what happened) from `since` on, before
    `until`; None is without end.
    """

    since: datetime | None = None
    until: datetime | None = None
    request_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request."""

    request_id: UUID
    kind: str
    regime: str | None
    state: str
    outcome: str | None
    reason_code: str | None
    """Why it was rejected, revoked or lifted; None after the retention of events."""
    received_at: datetime
    due_at: datetime
    created_at: datetime
    created_by: str
    """Prefix of the API key that sent it."""
    deactivated_at: datetime | None
    """When the last of its models was."""
    erased_at: datetime | None
    ended_at: datetime | None
    """When it was completed, rejected, revoked, expired or lifted."""
    overdue: bool
    """Ended after it was due, or due and not ended."""
    days: float | None
    """From `received_at` to `ended_at`."""
    models: int


@dataclass(frozen=True, slots=True)
class TargetRow:
    """A request's way through one model."""

    request_id: UUID
    model: str
    state: str
    outcome: str | None
    version: int | None
    deactivated_at: datetime | None
    erased_at: datetime | None
    completed_at: datetime | None
    attempts: int
    error: str | None
    """A class of error."""
    certificate: str | None
    """SHA-256 of the signed certificate in canonical JSON, as its event in the ledger has it."""


@dataclass(frozen=True, slots=True)
class EventRow:
    """One event of the ledger."""

    index: int
    event_id: UUID
    time: datetime
    kind: str
    request_id: UUID | None
    model: str | None
    body: str | None
    """JSON; None after the retention of events, when a leaf says a kind and a time alone, and of `rows.changed`."""


@dataclass(frozen=True, slots=True)
class LeafRow:
    """A leaf with what opens it."""

    index: int
    leaf: bytes
    opening: bytes | None


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """A signed certificate and what was signed about it later, in order."""

    request_id: UUID
    model: str
    certificate: dict[str, Any]
    supplements: list[dict[str, Any]]


def list_requests(connection: Connection, chosen: Range) -> Iterator[RequestRow]:
    """Requests by the time of their receipt."""
    return _rows(connection, RequestRow, LIST_REQUESTS, chosen)


def list_targets(connection: Connection, chosen: Range) -> Iterator[TargetRow]:
    """Targets, in the order of their requests."""
    return _rows(connection, TargetRow, LIST_TARGETS, chosen)


def list_leaves(connection: Connection, chosen: Range, *, before: int | None = None) -> Iterator[LeafRow]:
    """Leaves in the order of the ledger, up to before an index."""
    for row in _rows(connection, LeafRow, LIST_EVENTS, chosen, before=before):
        # What a restore applies: whole rows, with what callers wrote. The leaf stays, its opening is not handed out.
        withheld = parse_leaf(bytes(row.leaf)).kind == EventKind.ROWS_CHANGED
        yield replace(row, opening=None) if withheld else row


def list_events(connection: Connection, chosen: Range) -> Iterator[EventRow]:
    """Events in the order of the ledger; one that is not numbered yet comes with a later export."""
    names = {model.model_id: model.name for model in models.list_models(connection)}
    for row in list_leaves(connection, chosen):
        leaf = parse_leaf(bytes(row.leaf))
        opened: dict[str, Any] = json.loads(row.opening) if row.opening is not None else {}
        yield EventRow(
            index=row.index,
            event_id=UUID(leaf.event_id),
            time=datetime.fromisoformat(leaf.time),
            kind=leaf.kind,
            request_id=UUID(opened["request_id"]) if opened.get("request_id") else None,
            model=names.get(opened.get("model_id") or 0),
            body=json.dumps(opened["body"], sort_keys=True) if opened else None,
        )


def list_certificates(connection: Connection, chosen: Range) -> Iterator[CertificateRow]:
    """Signed certificates, in the order of their requests."""
    return _rows(connection, CertificateRow, LIST_CERTIFICATES, chosen, batch=LARGE)


def _rows(
    connection: Connection,
    kind: type[T],
    query: LiteralString,
    chosen: Range,
    *,
    batch: int = BATCH,
    **more: object,
) -> Generator[T]:
    values = {"since": chosen.since, "until": chosen.until, "request_id": chosen.request_id, **more}
    with connection.cursor(name="export", row_factory=class_row(kind)) as cursor:
        cursor.itersize = batch
        yield from cursor.execute(query, values)
