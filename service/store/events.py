"""Events waiting to be sequenced: append and read, nothing else (rule 13)."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from service.evidence.events import EventKind, event_body
from service.store.database import Connection

APPEND: LiteralString = """
INSERT INTO event_pending (kind, request_id, model_id, body)
VALUES (%(kind)s::text, %(request_id)s::uuid, %(model_id)s::bigint, %(body)s::jsonb)
"""
LIST_OF_REQUEST: LiteralString = """
SELECT id, event_id, kind, request_id, model_id, body, created_at
FROM event_pending
WHERE request_id = %(request_id)s::uuid
ORDER BY id
"""


@dataclass(frozen=True, slots=True)
class Event:
    """One recorded step."""

    id: int
    event_id: UUID
    kind: str
    request_id: UUID | None
    model_id: int | None
    body: dict[str, Any]
    created_at: datetime


def append(
    connection: Connection,
    kind: EventKind,
    *,
    request_id: UUID | None = None,
    model_id: int | None = None,
    **fields: Any,
) -> None:
    """Record an event in the caller's transaction.

    Raises:
        ValueError: fields other than the kind's own.
    """
    body = Jsonb(event_body(kind, fields))
    connection.execute(APPEND, {"kind": kind.value, "request_id": request_id, "model_id": model_id, "body": body})


def list_of_request(connection: Connection, request_id: UUID) -> list[Event]:
    """All events of a request, in the order of their transactions' writes."""
    with connection.cursor(row_factory=class_row(Event)) as cursor:
        return cursor.execute(LIST_OF_REQUEST, {"request_id": request_id}).fetchall()
