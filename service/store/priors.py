"""Deletion priors: a dataset's classes of subjects, and each subject's class, fixed with its first record there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row

from service.store.database import Connection

INSERT: LiteralString = """
INSERT INTO prior_class (dataset_id, prior, name, slices, expires)
SELECT %(dataset_id)s::uuid, place - 1, name, slices, expires
FROM unnest(%(names)s::text[], %(slices)s::int[], %(expires)s::boolean[])
    WITH ORDINALITY AS new(name, slices, expires, place)
"""
LIST_OF_SUBJECTS: LiteralString = """
SELECT subject_id, prior FROM subject_prior
WHERE dataset_id = %(dataset_id)s::uuid AND subject_id = ANY(%(subject_ids)s::uuid[])
"""
INSERT_OF_SUBJECTS: LiteralString = """
INSERT INTO subject_prior (dataset_id, subject_id, prior)
SELECT %(dataset_id)s::uuid, subject_id, prior
FROM unnest(%(subject_ids)s::uuid[], %(priors)s::int[]) AS new(subject_id, prior)
ORDER BY subject_id
ON CONFLICT DO NOTHING
"""
FORGET: LiteralString = """
DELETE FROM subject_prior p
USING record r
WHERE r.record_id = ANY(%(record_ids)s::uuid[]) AND p.dataset_id = r.dataset_id AND p.subject_id = r.owner_id
  AND NOT EXISTS (SELECT FROM record o
                  WHERE o.owner_id = r.owner_id AND o.dataset_id = r.dataset_id
                    AND o.record_id <> ALL(%(record_ids)s::uuid[]))
"""


@dataclass(frozen=True, slots=True)
class Prior:
    """A class of subjects who are about as likely to be deleted; how likely, recipes declare."""

    name: str
    slices: int
    """How many slices of each shard are theirs; classes take consecutive ones in the order declared."""
    expires: bool = False
    """Of subjects with a known date of deletion."""


@dataclass(frozen=True, slots=True)
class _Fixed:
    subject_id: UUID
    prior: int


def spans(priors: Sequence[Prior]) -> list[range]:
    """The slices of each class."""
    found: list[range] = []
    for prior in priors:
        start = found[-1].stop if found else 0
        found.append(range(start, start + prior.slices))
    return found


def insert_priors(connection: Connection, dataset_id: UUID, priors: Sequence[Prior]) -> None:
    """Declare a dataset's classes."""
    values = {
        "dataset_id": dataset_id,
        "names": [prior.name for prior in priors],
        "slices": [prior.slices for prior in priors],
        "expires": [prior.expires for prior in priors],
    }
    connection.execute(INSERT, values)


def list_of_subjects(connection: Connection, dataset_id: UUID, subject_ids: Iterable[UUID]) -> dict[UUID, int]:
    """The classes, as indices, of those of the subjects who have one in the dataset."""
    if not (wanted := list(subject_ids)):
        return {}
    values = {"dataset_id": dataset_id, "subject_ids": wanted}
    with connection.cursor(row_factory=class_row(_Fixed)) as cursor:
        return {row.subject_id: row.prior for row in cursor.execute(LIST_OF_SUBJECTS, values).fetchall()}


def find_classes(
    connection: Connection, dataset_id: UUID, owners: Sequence[tuple[UUID, int | None]]
) -> tuple[dict[UUID, int], dict[UUID, int]]:
    """Each owner's class, and those of them that are not fixed yet.

    `owners` come with the class that a line names for them; their first line decides, and if it names none, class 0.
    """
    fixed = list_of_subjects(connection, dataset_id, {owner for owner, _ in owners})
    first: dict[UUID, int] = {}
    for owner, named in owners:
        if owner not in fixed:
            first.setdefault(owner, named or 0)
    return fixed | first, first


def insert_of_subjects(connection: Connection, dataset_id: UUID, first: Mapping[UUID, int]) -> bool:
    """Fix the classes of subjects at first sight; False where another transaction fixed one of them meanwhile."""
    if not first:
        return True
    values = {"dataset_id": dataset_id, "subject_ids": list(first), "priors": list(first.values())}
    return connection.execute(INSERT_OF_SUBJECTS, values).rowcount == len(first)


def forget(connection: Connection, record_ids: Iterable[UUID]) -> None:
    """Delete the classes of subjects who own nothing but these records, before the records' rows go.

    The caller holds the lock of the records' cell. All records of an owner lie in it, so nobody can add one meanwhile.
    """
    connection.execute(FORGET, {"record_ids": list(record_ids)})
