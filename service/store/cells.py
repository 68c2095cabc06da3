"""Cells and their manifests: what each generation of a cell holds, and the one way to make the next one (rule 23)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.domain.errors import NotFoundError
from service.store.database import Connection
from shards.manifest import Manifest

LIST: LiteralString = """
SELECT cell_id, dataset_id, shard, slice, generation, object_name
FROM cell WHERE dataset_id = %(dataset_id)s::uuid
ORDER BY cell_id
"""
GET: LiteralString = """
SELECT cell_id, dataset_id, shard, slice, generation, object_name FROM cell WHERE cell_id = %(cell_id)s::bigint
"""
LOCK: LiteralString = """
SELECT cell_id, dataset_id, shard, slice, generation, object_name
FROM cell WHERE cell_id = ANY(%(cell_ids)s::bigint[])
ORDER BY cell_id
FOR UPDATE
"""
LOCK_SHARED: LiteralString = """
SELECT cell_id FROM cell WHERE cell_id = ANY(%(cell_ids)s::bigint[]) ORDER BY cell_id FOR SHARE
"""
INSERT: LiteralString = """
INSERT INTO cell (dataset_id, shard, slice)
SELECT %(dataset_id)s::uuid, shard, slice
FROM generate_series(0, %(shards)s::int - 1) shard, generate_series(0, %(slices)s::int - 1) slice
ORDER BY shard, slice
"""
INSERT_EMPTY_MANIFESTS: LiteralString = """
INSERT INTO cell_manifest (cell_id, generation, root, rows)
SELECT cell_id, 0, %(root)s::text, 0 FROM cell WHERE dataset_id = %(dataset_id)s::uuid
"""
LIST_COMMITMENTS: LiteralString = """
SELECT r.commitment
FROM record r
WHERE r.cell_id = %(cell_id)s::bigint
  AND NOT EXISTS (SELECT FROM tombstone t WHERE t.record_id = r.record_id AND t.lifted_at IS NULL)
"""
LIST_ACTIVE: LiteralString = """
SELECT r.record_id
FROM record r
WHERE r.cell_id = %(cell_id)s::bigint AND r.added <= %(generation)s::bigint
  AND NOT EXISTS (SELECT FROM tombstone t WHERE t.record_id = r.record_id AND t.removed <= %(generation)s::bigint)
  AND NOT EXISTS (
      SELECT FROM absence b
      WHERE b.record_id = r.record_id
        AND b.removed <= %(generation)s::bigint AND %(generation)s::bigint < b.returned)
"""
INSERT_MANIFEST: LiteralString = """
INSERT INTO cell_manifest (cell_id, generation, root, rows)
VALUES (%(cell_id)s::bigint, %(generation)s::bigint, %(root)s::text, %(rows)s::bigint)
"""
CLOSE_TOMBSTONES: LiteralString = """
UPDATE tombstone SET removed = %(generation)s::bigint
WHERE cell_id = %(cell_id)s::bigint AND removed IS NULL AND lifted_at IS NULL
"""
INSERT_ABSENCES: LiteralString = """
INSERT INTO absence (record_id, removed, returned)
SELECT record_id, removed, %(generation)s::bigint FROM tombstone
WHERE dataset_id = %(dataset_id)s::uuid AND cell_id = %(cell_id)s::bigint
  AND (removed IS NULL) = (lifted_at IS NULL) AND lifted_at IS NOT NULL
RETURNING record_id
"""
OPEN_LIFTED: LiteralString = """
UPDATE tombstone SET removed = NULL WHERE record_id = ANY(%(record_ids)s::uuid[])
"""
MARK_ADVANCED: LiteralString = """
UPDATE cell SET generation = %(generation)s::bigint, object_name = %(object_name)s::text
WHERE cell_id = %(cell_id)s::bigint AND generation = %(generation)s::bigint - 1
"""
LIST_SEALED: LiteralString = """
SELECT DISTINCT cell_id FROM tombstone
WHERE dataset_id = %(dataset_id)s::uuid AND (removed IS NULL) = (lifted_at IS NULL)
"""
LIST_GRID: LiteralString = """
SELECT c.cell_id, c.shard, c.slice, c.generation, m.root, m.rows
FROM cell c JOIN cell_manifest m USING (cell_id, generation)
WHERE c.dataset_id = %(dataset_id)s::uuid
ORDER BY c.shard, c.slice
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell's row: the newest generation and the object that holds its payloads."""

    cell_id: int
    dataset_id: UUID
    shard: int
    slice: int
    generation: int
    object_name: str | None


@dataclass(frozen=True, slots=True)
class GridCell:
    """A cell with its newest manifest."""

    cell_id: int
    shard: int
    slice: int
    generation: int
    root: str
    rows: int


def insert_grid(connection: Connection, dataset_id: UUID, *, shards: int, slices: int) -> None:
    """All cells of a new dataset, each with the manifest of no records."""
    connection.execute(INSERT, {"dataset_id": dataset_id, "shards": shards, "slices": slices})
    connection.execute(INSERT_EMPTY_MANIFESTS, {"dataset_id": dataset_id, "root": Manifest.of(()).root})


def list_cells(connection: Connection, dataset_id: UUID) -> list[Cell]:
    """The dataset's cells by id, unlocked: build files on this, then check again under `lock_cells`."""
    with connection.cursor(row_factory=class_row(Cell)) as cursor:
        return cursor.execute(LIST, {"dataset_id": dataset_id}).fetchall()


def get_cell(connection: Connection, cell_id: int) -> Cell:
    """One cell, unlocked.

    Raises:
        NotFoundError: no such cell.
    """
    with connection.cursor(row_factory=class_row(Cell)) as cursor:
        found = cursor.execute(GET, {"cell_id": cell_id}).fetchone()
    if found is None:
        raise NotFoundError("there is no such cell")
    return found


def list_grid(connection: Connection, dataset_id: UUID) -> list[GridCell]:
    """Today's manifests by shard and slice."""
    with connection.cursor(row_factory=class_row(GridCell)) as cursor:
        return cursor.execute(LIST_GRID, {"dataset_id": dataset_id}).fetchall()


def list_sealed(connection: Connection, dataset_id: UUID) -> list[int]:
    """Cells whose newest manifest still holds a record with an open tombstone, or lacks one that was lifted."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_SEALED, {"dataset_id": dataset_id}).fetchall()


def is_sealed(connection: Connection, cell: Cell) -> bool:
    """Whether the cell's newest manifest is not that of its active records."""
    return cell.cell_id in list_sealed(connection, cell.dataset_id)


def lock_cells(connection: Connection, cell_ids: Iterable[int]) -> list[Cell]:
    """Lock cells in id order and read them."""
    with connection.cursor(row_factory=class_row(Cell)) as cursor:
        return cursor.execute(LOCK, {"cell_ids": sorted(set(cell_ids))}).fetchall()


def share_cells(connection: Connection, cell_ids: Iterable[int]) -> None:
    """Lock cells FOR SHARE in id order: no tombstone can be set on their records until the transaction ends."""
    connection.execute(LOCK_SHARED, {"cell_ids": sorted(set(cell_ids))})


def hold_cells(connection: Connection, cell_ids: Iterable[int]) -> None:
    """Lock cells in id order without reading them."""
    connection.execute(LOCK, {"cell_ids": sorted(set(cell_ids))})


def share_unchanged(connection: Connection, cell: Cell) -> bool:
    """Lock a cell FOR SHARE and compare it with what was read.

    The row of a file built from it goes into the same transaction. So every file that may hold a payload has a row
    that is older than the payload's erasure, and erasure waits for it.
    """
    share_cells(connection, [cell.cell_id])
    return get_cell(connection, cell.cell_id) == cell


def list_active(connection: Connection, cell_id: int, generation: int) -> set[UUID]:
    """Ids of the records in a manifest of the cell, as long as none of them has been erased since."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return set(cursor.execute(LIST_ACTIVE, {"cell_id": cell_id, "generation": generation}).fetchall())


def advance(
    connection: Connection, cell: Cell, *, object_name: str | None, added: Sequence[bytes] = ()
) -> tuple[int, Manifest]:
    """Make the next generation of a locked cell: its records without open tombstones, and the `added` commitments.

    Insert the new record rows afterwards, with `added` set to the generation that is returned.
    """
    with connection.cursor(row_factory=scalar_row) as cursor:
        kept = cursor.execute(LIST_COMMITMENTS, {"cell_id": cell.cell_id}).fetchall()
    manifest = Manifest.of([*(bytes(commitment) for commitment in kept), *added])
    generation = cell.generation + 1
    at = {"cell_id": cell.cell_id, "generation": generation}
    connection.execute(INSERT_MANIFEST, {**at, "root": manifest.root, "rows": len(manifest.commitments)})
    connection.execute(CLOSE_TOMBSTONES, at)
    with connection.cursor(row_factory=scalar_row) as cursor:
        back = cursor.execute(INSERT_ABSENCES, {**at, "dataset_id": cell.dataset_id}).fetchall()
    if back:
        connection.execute(OPEN_LIFTED, {"record_ids": back})
    connection.execute(MARK_ADVANCED, {**at, "object_name": object_name})
    return generation, manifest
