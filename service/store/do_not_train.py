"""The do-not-train list: who may not be ingested, where and until when. Entries end on the record, or by age."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.domain.errors import ConflictError, NotFoundError
from service.evidence.events import EventKind
from service.store import events, subjects, targets
from service.store.database import Connection
from service.store.subjects import Alias

LIST: LiteralString = """
SELECT e.entry_id, d.name AS dataset, e.request_id, e.since, e.until, e.lifted_at
FROM do_not_train e LEFT JOIN dataset d USING (dataset_id)
WHERE (%(is_open)s::boolean IS NULL
       OR (e.lifted_at IS NULL AND (e.until IS NULL OR e.until > clock_timestamp())) = %(is_open)s::boolean)
  AND (%(entry_ids)s::uuid[] IS NULL OR e.entry_id = ANY(%(entry_ids)s::uuid[]))
  AND (%(before)s::timestamptz IS NULL
       OR (e.since, e.entry_id) < (%(before)s::timestamptz, %(before_id)s::uuid))
ORDER BY e.since DESC, e.entry_id DESC
LIMIT %(limit)s::int
"""
FIND_UNENDED: LiteralString = """
SELECT t.state, d.kind
FROM deletion_request d JOIN request_target t USING (request_id) JOIN model m USING (model_id)
WHERE d.subject_id = %(subject_id)s::uuid
  AND (%(dataset_id)s::uuid IS NULL OR m.dataset_id = %(dataset_id)s::uuid)
  AND (t.state IN ('received', 'awaiting_identity', 'awaiting_approval', 'deactivating', 'deactivated', 'erasing',
                   'failed')
       OR t.state = 'completed' AND t.outcome = 'restricted')
ORDER BY d.created_at LIMIT 1
"""
LIFT: LiteralString = """
UPDATE do_not_train SET lifted_at = clock_timestamp()
WHERE subject_id = %(subject_id)s::uuid AND lifted_at IS NULL
  AND (%(dataset_id)s::uuid IS NULL OR dataset_id = %(dataset_id)s::uuid)
RETURNING entry_id
"""
MARK_ENDS: LiteralString = """
UPDATE do_not_train SET until = since + make_interval(days => %(days)s::int) WHERE until IS NULL
"""
ERASE: LiteralString = "SELECT erase_do_not_train()"
ERASE_CERTIFICATES: LiteralString = "SELECT erase_certificates(%(days)s::int)"


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry, without saying on whom."""

    entry_id: UUID
    dataset: str | None
    """Where the subject is refused; None: everywhere."""
    request_id: UUID
    """The request that put the subject there."""
    since: datetime
    until: datetime | None
    lifted_at: datetime | None


@dataclass(frozen=True, slots=True)
class _Unended:
    state: str
    kind: str


def list_entries(
    connection: Connection, *, is_open: bool | None, before: tuple[datetime, UUID] | None, limit: int
) -> list[Entry]:
    """Entries, newest first, from behind the one that `before` names."""
    moment, entry_id = before or (None, None)
    return _list(connection, is_open=is_open, before=moment, before_id=entry_id, limit=limit)


def lift(connection: Connection, alias: Alias, dataset_id: UUID | None, *, actor: str, reason_code: str) -> list[Entry]:
    """Let a subject be ingested again, who has consented anew; `dataset_id` None: into every dataset.

    What was erased stays so: a record that comes back needs a new id (rule 19).

    Raises:
        NotFoundError: nobody is on the list under that alias.
        ConflictError: a request of the subject has not ended, or restricts; it says what to do.
    """
    subject_id = subjects.find_subjects(connection, [alias]).get(alias)
    if subject_id is None:
        raise NotFoundError("no entry is about that subject: check type and value")
    targets.lock_subjects(connection, [subject_id])
    at = {"subject_id": subject_id, "dataset_id": dataset_id}
    with connection.cursor(row_factory=class_row(_Unended)) as cursor:
        unended = cursor.execute(FIND_UNENDED, at).fetchone()
    if unended is not None and unended.kind != "erase":
        raise ConflictError("a restriction of the subject stands: lift that request, which ends the entry with it")
    if unended is not None:
        raise ConflictError(f"an erasure of the subject is {unended.state}: wait until it has completed, or revoke it")
    with connection.cursor(row_factory=scalar_row) as cursor:
        lifted: list[UUID] = cursor.execute(LIFT, at).fetchall()
    if not lifted:
        raise NotFoundError("no entry is about that subject: check type and value")
    events.append(
        connection,
        EventKind.DO_NOT_TRAIN_LIFTED,
        entries=sorted(map(str, lifted)),
        actor=actor,
        reason_code=reason_code,
    )
    return _list(connection, entry_ids=lifted, limit=len(lifted))


def end_by_age(connection: Connection, *, days: int | None) -> int:
    """Give entries without an end the one that the retention says, and erase those that are past theirs; how many."""
    if days is not None:
        connection.execute(MARK_ENDS, {"days": days})
    with connection.cursor(row_factory=scalar_row) as cursor:
        erased = cursor.execute(ERASE).fetchone() or 0
    if erased:
        events.append(connection, EventKind.DO_NOT_TRAIN_ENDED, entries=erased)
    return erased


def erase_certificates(connection: Connection, *, days: int) -> int:
    """Erase certificates that are older; how many. Their holders keep theirs, and the ledger its digest."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        erased = cursor.execute(ERASE_CERTIFICATES, {"days": days}).fetchone() or 0
    if erased:
        events.append(connection, EventKind.CERTIFICATES_ERASED, certificates=erased, days=days)
    return erased


def _list(
    connection: Connection, *, limit: int, entry_ids: Sequence[UUID] | None = None, **values: object
) -> list[Entry]:
    every = dict.fromkeys(("is_open", "before", "before_id")) | values | {"entry_ids": entry_ids, "limit": limit}
    with connection.cursor(row_factory=class_row(Entry)) as cursor:
        return cursor.execute(LIST, every).fetchall()
