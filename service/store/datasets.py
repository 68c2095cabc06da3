"""Datasets: declared once, with their grid of cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID, uuid4

from psycopg import errors
from psycopg.rows import class_row, kwargs_row

from service.domain.errors import ConflictError, NotFoundError
from service.store import cells
from service.store.database import Connection
from service.store.priors import Prior, insert_priors, spans

COLUMNS: LiteralString = """
    dataset_id, name, shards, slices, classes, task, input, width, deletable, subject_row_cap, created_at,
    coalesce((SELECT jsonb_agg(jsonb_build_object('name', p.name, 'slices', p.slices, 'expires', p.expires)
                               ORDER BY p.prior)
              FROM prior_class p WHERE p.dataset_id = dataset.dataset_id), '[]') AS priors
"""
FIND: LiteralString = "SELECT " + COLUMNS + " FROM dataset WHERE name = %(name)s::text"
GET: LiteralString = "SELECT " + COLUMNS + " FROM dataset WHERE dataset_id = %(dataset_id)s::uuid"
LIST: LiteralString = "SELECT " + COLUMNS + " FROM dataset ORDER BY created_at, name"
COUNT_ROWS: LiteralString = """
SELECT c.dataset_id, sum(m.rows)::bigint AS rows
FROM cell c JOIN cell_manifest m USING (cell_id, generation)
WHERE c.dataset_id = ANY(%(dataset_ids)s::uuid[])
GROUP BY c.dataset_id
"""
INSERT: LiteralString = """
INSERT INTO dataset (dataset_id, name, shards, slices, classes, task, input, width, deletable,
                     subject_row_cap)
VALUES (%(dataset_id)s::uuid, %(name)s::text, %(shards)s::int, %(slices)s::int, %(classes)s::text[],
        %(task)s::text, %(input)s::text, %(width)s::int, %(deletable)s::boolean, %(subject_row_cap)s::int)
"""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset's declaration; nothing of it changes."""

    dataset_id: UUID
    name: str
    shards: int
    slices: int
    classes: list[str]
    """Of a classification; else none."""
    task: str
    input: str
    width: int | None
    """Numbers in each record, where the input is a vector."""
    deletable: bool
    subject_row_cap: int
    created_at: datetime
    priors: tuple[Prior, ...] = ()
    """Classes of subjects by how likely they are to be deleted; none: all share all slices."""

    def span(self, prior: int | None) -> range | None:
        """The slices of a class of subjects; None: all of them."""
        return None if prior is None else spans(self.priors)[prior]


@dataclass(frozen=True, slots=True)
class _Rows:
    dataset_id: UUID
    rows: int


def _dataset(*, priors: list[dict[str, Any]], **columns: Any) -> Dataset:
    return Dataset(**columns, priors=tuple(Prior(**prior) for prior in priors))


def insert_dataset(
    connection: Connection,
    *,
    name: str,
    shards: int,
    slices: int,
    classes: list[str],
    deletable: bool,
    subject_row_cap: int,
    task: str = "classification",
    input: str = "text",  # noqa: A002 - the column's name
    width: int | None = None,
    priors: Sequence[Prior] = (),
) -> Dataset:
    """Declare a dataset, with all its cells empty. The slices of `priors` add up to `slices`.

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
        "task": task,
        "input": input,
        "width": width,
        "deletable": deletable,
        "subject_row_cap": subject_row_cap,
    }
    try:
        connection.execute(INSERT, values)
    except errors.UniqueViolation:
        raise ConflictError("there is a dataset of that name already; choose another name") from None
    if priors:
        insert_priors(connection, dataset_id, priors)
    cells.insert_grid(connection, dataset_id, shards=shards, slices=slices)
    return get_dataset(connection, name)


def find_dataset(connection: Connection, name: str) -> Dataset | None:
    """The dataset of that name, or None."""
    with connection.cursor(row_factory=kwargs_row(_dataset)) as cursor:
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
    with connection.cursor(row_factory=kwargs_row(_dataset)) as cursor:
        found = cursor.execute(GET, {"dataset_id": dataset_id}).fetchone()
    if found is None:
        raise NotFoundError("there is no dataset with that id")
    return found


def list_datasets(connection: Connection) -> list[Dataset]:
    """All datasets, oldest first."""
    with connection.cursor(row_factory=kwargs_row(_dataset)) as cursor:
        return cursor.execute(LIST).fetchall()


def count_rows(connection: Connection, dataset_ids: list[UUID]) -> dict[UUID, int]:
    """How many records each dataset's newest manifests hold."""
    with connection.cursor(row_factory=class_row(_Rows)) as cursor:
        rows = cursor.execute(COUNT_ROWS, {"dataset_ids": dataset_ids}).fetchall()
    return {row.dataset_id: row.rows for row in rows}
