"""Rows of records that a database lost, read back from their cell's payload file: who was ingested is in no event."""

from collections.abc import Sequence
from typing import LiteralString
from uuid import UUID

from psycopg.rows import scalar_row

from service.store import cells, priors, records
from service.store.cells import Cell
from service.store.database import Connection
from service.store.payloads import StoredRecord, Whose
from service.store.records import RecordRow
from shards.errors import ManifestMismatchError
from shards.manifest import Manifest

LIST_KNOWN: LiteralString = """
SELECT record_id FROM record WHERE record_id = ANY(%(record_ids)s::uuid[])
UNION ALL
SELECT record_id FROM tombstone WHERE record_id = ANY(%(record_ids)s::uuid[]) AND erased_at IS NOT NULL
"""
INSERT_SUBJECTS: LiteralString = """
INSERT INTO subject (subject_id) SELECT unnest(%(subject_ids)s::uuid[]) ON CONFLICT DO NOTHING
"""
# One that is another subject's already is a contradiction, and fails.
INSERT_ALIASES: LiteralString = """
INSERT INTO subject_alias (subject_id, type, digest)
SELECT * FROM unnest(%(subject_ids)s::uuid[], %(types)s::text[], %(digests)s::bytea[])
EXCEPT SELECT subject_id, type, digest FROM subject_alias WHERE subject_id = ANY(%(subject_ids)s::uuid[])
"""
LIST_COMMITMENTS: LiteralString = """
SELECT commitment FROM record WHERE record_id = ANY(%(record_ids)s::uuid[])
"""
FIND_ROOT: LiteralString = """
SELECT root FROM cell_manifest WHERE cell_id = %(cell_id)s::bigint AND generation = %(generation)s::bigint
"""


def insert_missing(connection: Connection, cell: Cell, stored: Sequence[StoredRecord]) -> int:
    """Insert the rows of a cell's records that the database does not know; never of one that is erased. How many.

    Raises:
        psycopg.IntegrityError: they contradict rows that are there.
        ManifestMismatchError: with them the cell does not hold what the ledger says of its newest generation, so that
            a tombstone may be missing, too.
    """
    ids = [each.record.record_id for each in stored]
    with connection.cursor(row_factory=scalar_row) as cursor:
        known = set(cursor.execute(LIST_KNOWN, {"record_ids": ids}).fetchall())
    missing = [(each, each.whose) for each in stored if each.whose and each.record.record_id not in known]
    if missing:
        _insert_subjects(connection, cell, [whose for _, whose in missing])
        records.insert_records(connection, [_row(cell, each, whose) for each, whose in missing])
        _check(connection, cell)
    return len(missing)


def _insert_subjects(connection: Connection, cell: Cell, whose: Sequence[Whose]) -> None:
    aliases = sorted({alias for each in whose for alias in each.aliases})
    subject_ids, types, digests = (list(column) for column in zip(*aliases, strict=True))
    connection.execute(INSERT_SUBJECTS, {"subject_ids": subject_ids})
    connection.execute(INSERT_ALIASES, {"subject_ids": subject_ids, "types": types, "digests": digests})
    priors.insert_of_subjects(connection, cell.dataset_id, {w.owner: w.prior for w in whose if w.prior is not None})


def _row(cell: Cell, stored: StoredRecord, whose: Whose) -> RecordRow:
    return RecordRow(
        record_id=stored.record.record_id,
        dataset_id=cell.dataset_id,
        cell_id=cell.cell_id,
        owner_id=whose.owner,
        commitment=stored.record.commitment,
        added=stored.generation,
        subjects=tuple(whose.subjects),
    )


def _check(connection: Connection, cell: Cell) -> None:
    active: list[UUID] = list(cells.list_active(connection, cell.cell_id, cell.generation))
    at = {"cell_id": cell.cell_id, "generation": cell.generation}
    with connection.cursor(row_factory=scalar_row) as cursor:
        held = cursor.execute(LIST_COMMITMENTS, {"record_ids": active}).fetchall()
        (root,) = cursor.execute(FIND_ROOT, at).fetchall()
    if Manifest.of(map(bytes, held)).root != root:
        raise ManifestMismatchError(f"the rows of cell {cell.cell_id} and its file do not give manifest {root[:12]}")
