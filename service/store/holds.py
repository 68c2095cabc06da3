"""Holds: legal reasons not to erase. One stops `erasing` of every record that concerns its subject, whoever owns it."""

from dataclasses import dataclass
from datetime import datetime
from typing import LiteralString
from uuid import UUID, uuid4

from psycopg.rows import class_row, scalar_row

from service.domain.errors import ConflictError, NotFoundError
from service.evidence.events import EventKind
from service.store import cells, events, subjects, targets
from service.store.database import Connection
from service.store.subjects import Alias

LIST_CELLS: LiteralString = """
SELECT DISTINCT r.cell_id
FROM record_subject s JOIN record r ON r.record_id = s.record_id
WHERE s.subject_id = %(subject_id)s::uuid
"""
INSERT: LiteralString = """
INSERT INTO hold (hold_id, subject_id, reason_code, created_by)
VALUES (%(hold_id)s::uuid, %(subject_id)s::uuid, %(reason_code)s::text, %(actor)s::text)
ON CONFLICT DO NOTHING
RETURNING hold_id
"""
FIND_OPEN: LiteralString = """
SELECT hold_id FROM hold
WHERE subject_id = %(subject_id)s::uuid AND reason_code = %(reason_code)s::text AND released_at IS NULL
"""
RELEASE: LiteralString = """
UPDATE hold SET released_at = clock_timestamp()
WHERE hold_id = %(hold_id)s::uuid AND released_at IS NULL
RETURNING reason_code
"""
LIST: LiteralString = """
SELECT h.hold_id, h.reason_code, h.created_by, h.created_at, h.released_at,
       (SELECT count(*) FROM record_subject s WHERE s.subject_id = h.subject_id) AS records,
       (SELECT count(DISTINCT t.request_id)
        FROM record_subject s
        JOIN deletion_request_record q ON q.record_id = s.record_id
        JOIN deletion_request d ON d.request_id = q.request_id AND d.kind = 'erase'
        JOIN request_target t ON t.request_id = q.request_id AND t.state IN ('deactivated', 'erasing')
        WHERE s.subject_id = h.subject_id AND h.released_at IS NULL) AS waiting
FROM hold h
WHERE (%(hold_id)s::uuid IS NULL OR h.hold_id = %(hold_id)s::uuid)
  AND (%(is_open)s::boolean IS NULL OR (h.released_at IS NULL) = %(is_open)s::boolean)
  AND (%(before)s::timestamptz IS NULL
       OR (h.created_at, h.hold_id) < (%(before)s::timestamptz, %(before_id)s::uuid))
ORDER BY h.created_at DESC, h.hold_id DESC
LIMIT %(limit)s::int
"""


@dataclass(frozen=True, slots=True)
class Hold:
    """A hold, without saying on whom."""

    hold_id: UUID
    reason_code: str
    created_by: str
    """Prefix of the API key."""
    created_at: datetime
    released_at: datetime | None
    records: int
    """Records that concern its subject now."""
    waiting: int
    """Erasures that it stops."""


def place(connection: Connection, alias: Alias, *, actor: str, reason_code: str) -> Hold:
    """Keep a subject's records from erasure; again for the same reason is the same hold.

    From its commit on none of them is erased: erasure looks for holds under the locks that are taken here.

    Raises:
        ConflictError: nobody is known under the alias, so there is nothing to hold.
    """
    subject_id = subjects.find_subjects(connection, [alias]).get(alias)
    if subject_id is None:
        raise ConflictError("no record here concerns that subject: there is nothing to hold; check type and value")
    targets.lock_subjects(connection, [subject_id])
    with connection.cursor(row_factory=scalar_row) as cursor:
        cells.share_cells(connection, cursor.execute(LIST_CELLS, {"subject_id": subject_id}).fetchall())
    values = {"hold_id": uuid4(), "subject_id": subject_id, "reason_code": reason_code, "actor": actor}
    with connection.cursor(row_factory=scalar_row) as cursor:
        hold_id: UUID | None = cursor.execute(INSERT, values).fetchone()
        if hold_id is None:
            hold_id = cursor.execute(FIND_OPEN, values).fetchone()
        else:
            _tell(connection, EventKind.HOLD_PLACED, hold_id, actor, reason_code)
    if hold_id is None:
        raise AssertionError("a hold that conflicts is open, and its subject is locked")
    return get(connection, hold_id)


def release(connection: Connection, hold_id: UUID, *, actor: str) -> Hold:
    """End a hold; the relay then goes on with the erasures that no other hold stops.

    Raises:
        NotFoundError: no such hold.
        ConflictError: it was released before.
    """
    with connection.cursor(row_factory=scalar_row) as cursor:
        reason_code = cursor.execute(RELEASE, {"hold_id": hold_id}).fetchone()
    found = get(connection, hold_id)
    if reason_code is None:
        raise ConflictError("the hold was released before: there is nothing to release")
    _tell(connection, EventKind.HOLD_RELEASED, hold_id, actor, reason_code)
    return found


def get(connection: Connection, hold_id: UUID) -> Hold:
    """One hold.

    Raises:
        NotFoundError: no such hold.
    """
    found = _list(connection, hold_id=hold_id, limit=1)
    if not found:
        raise NotFoundError("there is no hold with that id; GET /v1/holds lists them")
    return found[0]


def list_holds(
    connection: Connection, *, is_open: bool | None, before: tuple[datetime, UUID] | None, limit: int
) -> list[Hold]:
    """Holds, newest first, from behind the one that `before` names."""
    moment, hold_id = before or (None, None)
    return _list(connection, is_open=is_open, before=moment, before_id=hold_id, limit=limit)


def _list(connection: Connection, **values: object) -> list[Hold]:
    every = dict.fromkeys(("hold_id", "is_open", "before", "before_id", "limit")) | values
    with connection.cursor(row_factory=class_row(Hold)) as cursor:
        return cursor.execute(LIST, every).fetchall()


def _tell(connection: Connection, kind: EventKind, hold_id: UUID, actor: str, reason_code: str) -> None:
    events.append(connection, kind, hold_id=str(hold_id), actor=actor, reason_code=reason_code)
