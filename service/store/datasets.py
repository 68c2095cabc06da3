"""Datasets: declared once, with their grid of cells."""

from dataclasses import dataclass
from datetime import datetime
from typing import LiteralString
from uuid import UUID, uuid4

from psycopg import errors
from psycopg.rows import class_row

from service.domain.errors import ConflictError, NotFoundError
from service.store import cells
from service.store.database import Connection

FIND: LiteralString = """
SELECT dataset_id, name, shards, slices, classes, deletable, subject_row_cap, created_at
FROM dataset WHERE name = %(name)s::text
"""
GET: LiteralString = """
SELECT dataset_id, name, shards, slices, classes, deletable, subject_row_cap, created_at
FROM dataset WHERE dataset_id = %(dataset_id)s::uuid
"""
LIST: LiteralString = """
SELECT dataset_id, name, shards, slices, classes, deletable, subject_row_cap, created_at
FROM dataset ORDER BY created_at, name
"""
COUNT_ROWS: LiteralString = """
SELECT c.dataset_id, sum(m.rows)::bigint AS rows
FROM cell c JOIN cell_manifest m USING (cell_id, generation)
WHERE c.dataset_id = ANY(%(dataset_ids)s::uuid[])
GROUP BY c.dataset_id
"""
INSERT: LiteralString = """
INSERT INTO dataset (dataset_id, name, shards, slices, classes, deletable, subject_row_cap)
VALUES (%(dataset_id)s::uuid, %(name)s::text, %(shards)s::int, %(slices)s::int, %(classes)s::text[],
        %(deletable)s::boolean, %(subject_row_cap)s::int)
"""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset's declaration; nothing of it changes."""

    dataset_id: UUID
    name: str
    shards: int
    slices: int
    classes: list[str]
    deletable: bool
    subject_row_cap: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class _Rows:
    dataset_id: UUID
    rows: int


def insert_dataset(
    connection: Connection,
    *,
    name: str,
    shards: int,
    slices: int,
    classes: list[str],
    deletable: bool,
    subject_row_cap: int,
) -> Dataset:
    """Declare a dataset, with all its cells empty.

    Raises:
        ConflictError: the name is taken.
    """
    dataset_id = uuid4()
    values = {
        "dataset_id": dataset_id,
        "name": name,
        "shards": shards,
        "slices": slices,
        "classes": classes,
        "deletable": deletable,
        "subject_row_cap": subject_row_cap,
    }
    try:
        connection.execute(INSERT, values)
    except errors.UniqueViolation:
        raise ConflictError("there is a dataset of that name already; choose another name") from None
    cells.insert_grid(connection, dataset_id, shards=shards, slices=slices)
    return get_dataset(connection, name)


def find_dataset(connection: Connection, name: str) -> Dataset | None:
    """The dataset of that name, or None."""
    with connection.cursor(row_factory=class_row(Dataset)) as cursor:
        return cursor.execute(FIND, {"name": name}).fetchone()


def get_dataset(connection: Connection, name: str) -> Dataset:
    """The dataset of that name.

    Raises:
        NotFoundError: no such dataset.
    """
    found = find_dataset(connection, name)
    if found is None:
        raise NotFoundError("there is no dataset of that name; GET /v1/datasets lists them")
    return found


def get_dataset_by_id(connection: Connection, dataset_id: UUID) -> Dataset:
    """The dataset with that id.

    Raises:
        NotFoundError: no such dataset.
    """
    with connection.cursor(row_factory=class_row(Dataset)) as cursor:
        found = cursor.execute(GET, {"dataset_id": dataset_id}).fetchone()
    if found is None:
        raise NotFoundError("there is no dataset with that id")
    return found


def list_datasets(connection: Connection) -> list[Dataset]:
    """All datasets, oldest first."""
    with connection.cursor(row_factory=class_row(Dataset)) as cursor:
        return cursor.execute(LIST).fetchall()


def count_rows(connection: Connection, dataset_ids: list[UUID]) -> dict[UUID, int]:
    """How many records each dataset's newest manifests hold."""
    with connection.cursor(row_factory=class_row(_Rows)) as cursor:
        rows = cursor.execute(COUNT_ROWS, {"dataset_ids": dataset_ids}).fetchall()
    return {row.dataset_id: row.rows for row in rows}
