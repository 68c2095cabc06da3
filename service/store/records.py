"""Record rows: which ids are taken, who owns how many, and what an ingestion adds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.store.cells import LIST_COMMITMENTS
from service.store.database import Connection

LIST_TAKEN: LiteralString = """
SELECT record_id, false AS deleted FROM record WHERE record_id = ANY(%(record_ids)s::uuid[])
UNION ALL
SELECT record_id, true FROM tombstone WHERE record_id = ANY(%(record_ids)s::uuid[]) AND lifted_at IS NULL
"""
COUNT_OF_OWNERS: LiteralString = """
SELECT owner_id, count(*) AS rows
FROM record
WHERE owner_id = ANY(%(owner_ids)s::uuid[]) AND dataset_id = %(dataset_id)s::uuid
GROUP BY owner_id
"""
LIST_ERASED: LiteralString = """
SELECT record_id FROM tombstone WHERE cell_id = ANY(%(cell_ids)s::bigint[]) AND erased_at IS NOT NULL
"""
LIST_TOMBSTONED: LiteralString = """
SELECT record_id FROM tombstone WHERE record_id = ANY(%(record_ids)s::uuid[]) AND lifted_at IS NULL
"""
COPY: LiteralString = "COPY record (record_id, dataset_id, cell_id, owner_id, commitment, added) FROM STDIN"
COPY_SUBJECTS: LiteralString = "COPY record_subject (record_id, subject_id) FROM STDIN"


@dataclass(frozen=True, slots=True)
class RecordRow:
    """A record as Postgres knows it, with everybody whom it concerns."""

    record_id: UUID
    dataset_id: UUID
    cell_id: int
    owner_id: UUID
    commitment: bytes
    added: int
    subjects: tuple[UUID, ...]
    """The owner and the others, each once."""


@dataclass(frozen=True, slots=True)
class _Taken:
    record_id: UUID
    deleted: bool


@dataclass(frozen=True, slots=True)
class _Owned:
    owner_id: UUID
    rows: int


def list_taken(connection: Connection, record_ids: Iterable[UUID]) -> dict[UUID, bool]:
    """Which of the ids are in use, and whether by a deleted record: that id never comes back (rule 19)."""
    with connection.cursor(row_factory=class_row(_Taken)) as cursor:
        rows = cursor.execute(LIST_TAKEN, {"record_ids": list(record_ids)}).fetchall()
    taken: dict[UUID, bool] = {}
    for row in rows:
        taken[row.record_id] = row.deleted or taken.get(row.record_id, False)
    return taken


def count_of_owners(connection: Connection, dataset_id: UUID, owner_ids: Iterable[UUID]) -> dict[UUID, int]:
    """How many records each owner has in the dataset."""
    values = {"dataset_id": dataset_id, "owner_ids": list(owner_ids)}
    with connection.cursor(row_factory=class_row(_Owned)) as cursor:
        return {row.owner_id: row.rows for row in cursor.execute(COUNT_OF_OWNERS, values).fetchall()}


def list_erased(connection: Connection, cell_ids: Iterable[int]) -> set[UUID]:
    """Records of these cells whose payloads are erased: never to be copied again."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return set(cursor.execute(LIST_ERASED, {"cell_ids": list(cell_ids)}).fetchall())


def list_tombstoned(connection: Connection, record_ids: Iterable[UUID]) -> list[UUID]:
    """Those of the records that are out of service."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_TOMBSTONED, {"record_ids": list(record_ids)}).fetchall()


def list_commitments(connection: Connection, cell_id: int) -> list[bytes]:
    """Commitments of the cell's records without open tombstones."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return [bytes(found) for found in cursor.execute(LIST_COMMITMENTS, {"cell_id": cell_id}).fetchall()]


def insert_records(connection: Connection, rows: Sequence[RecordRow]) -> None:
    """Insert records and whom they concern.

    Raises:
        psycopg.errors.UniqueViolation: another transaction took one of the ids meanwhile.
    """
    with connection.cursor() as cursor:
        with cursor.copy(COPY) as copy:
            for row in rows:
                copy.write_row((row.record_id, row.dataset_id, row.cell_id, row.owner_id, row.commitment, row.added))
        with cursor.copy(COPY_SUBJECTS) as copy:
            for row in rows:
                for subject_id in row.subjects:
                    copy.write_row((row.record_id, subject_id))
