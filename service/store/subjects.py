"""Subjects and their aliases: an identifier comes in, only its keyed hash is looked up or kept."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.store.database import Connection
from shards.digest import keyed

TYPE_PATTERN = r"^[a-z][a-z0-9_]{0,31}$"
VALUE_LIMIT = 1024
"""Longest identifier, in characters."""

RESOLVE: LiteralString = """
SELECT a.type, a.digest, a.subject_id
FROM unnest(%(types)s::text[], %(digests)s::bytea[]) AS wanted(type, digest)
JOIN subject_alias a USING (type, digest)
"""
LIST_ALIASES: LiteralString = """
SELECT type, digest, subject_id FROM subject_alias WHERE subject_id = ANY(%(subject_ids)s::uuid[])
ORDER BY type, digest
"""
INSERT: LiteralString = """
INSERT INTO subject (subject_id)
SELECT id FROM unnest(%(subject_ids)s::uuid[]) id ORDER BY id
"""
INSERT_ALIASES: LiteralString = """
INSERT INTO subject_alias (type, digest, subject_id)
SELECT type, digest, subject_id
FROM unnest(%(types)s::text[], %(digests)s::bytea[], %(subject_ids)s::uuid[]) AS new(type, digest, subject_id)
ORDER BY type, digest
ON CONFLICT DO NOTHING
"""
LOCK: LiteralString = """
SELECT subject_id FROM subject WHERE subject_id = ANY(%(subject_ids)s::uuid[])
ORDER BY subject_id
FOR KEY SHARE
"""
LIST_DO_NOT_TRAIN: LiteralString = """
SELECT DISTINCT subject_id FROM do_not_train
WHERE subject_id = ANY(%(subject_ids)s::uuid[]) AND lifted_at IS NULL
  AND (until IS NULL OR until > clock_timestamp())
  AND (dataset_id IS NULL OR dataset_id = %(dataset_id)s::uuid)
"""


@dataclass(frozen=True, slots=True, order=True)
class Alias:
    """One way in which callers name a subject; says nothing without the pepper."""

    type: str
    digest: bytes
    older: tuple[bytes, ...] = field(default=(), compare=False)
    """The digest under each pepper from before: the subject may be known by one of them."""

    @property
    def digests(self) -> list[bytes]:
        """All by which the subject may be known."""
        return [self.digest, *self.older]


@dataclass(frozen=True, slots=True)
class _Known:
    type: str
    digest: bytes
    subject_id: UUID


def normalise(kind: str, value: str) -> str:
    """The form that is hashed: without space around it, e-mail addresses in lower case."""
    return value.strip().lower() if kind == "email" else value.strip()


def alias_of(pepper: bytes, kind: str, value: str, *, older: Sequence[bytes] = ()) -> Alias:
    """The alias of an identifier, and what it was under peppers from before."""
    newest, *others = (
        keyed(each, b"alias", kind.encode(), normalise(kind, value).encode()) for each in (pepper, *older)
    )
    return Alias(kind, newest, tuple(others))


def find_subjects(connection: Connection, aliases: Iterable[Alias]) -> dict[Alias, UUID]:
    """Those of the aliases that are known, with their subjects."""
    named = {(alias.type, digest): alias for alias in aliases for digest in alias.digests}
    values = {"types": [kind for kind, _ in named], "digests": [digest for _, digest in named]}
    with connection.cursor(row_factory=class_row(_Known)) as cursor:
        rows = cursor.execute(RESOLVE, values).fetchall()
    return {named[row.type, bytes(row.digest)]: row.subject_id for row in rows}


def list_aliases(connection: Connection, subject_ids: Iterable[UUID]) -> dict[UUID, list[Alias]]:
    """The aliases of each of the subjects."""
    found: dict[UUID, list[Alias]] = {}
    with connection.cursor(row_factory=class_row(_Known)) as cursor:
        for row in cursor.execute(LIST_ALIASES, {"subject_ids": list(subject_ids)}):
            found.setdefault(row.subject_id, []).append(Alias(row.type, bytes(row.digest)))
    return found


def insert_subjects(connection: Connection, new: Mapping[Alias, UUID]) -> bool:
    """Insert new subjects, one alias each; False where another transaction named one of them meanwhile."""
    if not new:
        return True
    connection.execute(INSERT, {"subject_ids": list(new.values())})
    values = {
        "types": [alias.type for alias in new],
        "digests": [alias.digest for alias in new],
        "subject_ids": list(new.values()),
    }
    return connection.execute(INSERT_ALIASES, values).rowcount == len(new)


def share_subjects(connection: Connection, subject_ids: Iterable[UUID]) -> None:
    """Lock subjects FOR KEY SHARE in id order: it conflicts with the planner's FOR UPDATE (rule 23)."""
    connection.execute(LOCK, {"subject_ids": sorted(subject_ids)})


def list_do_not_train(connection: Connection, dataset_id: UUID, subject_ids: Iterable[UUID]) -> set[UUID]:
    """Those of the subjects that may not be ingested into the dataset now."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        values = {"subject_ids": list(subject_ids), "dataset_id": dataset_id}
        return set(cursor.execute(LIST_DO_NOT_TRAIN, values).fetchall())
