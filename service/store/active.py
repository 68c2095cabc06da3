"""The manifests of the active records, also while a cell waits for its next one.

Which stage serves must follow from the active records alone (design.md 2.5). A cell's newest manifest lags behind them
between a deactivation or a lift and the next rebuild, and hashing a large cell anew takes longer than a heartbeat may
wait. But of the manifests that stages read, one that holds no record that is out, and as many as are active, is the
active records' own.
"""

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row

from service.store.database import Connection, ask
from shards.stages import CellRoot

LIST_CELLS: LiteralString = """
SELECT c.cell_id, c.shard, c.slice, m.root,
       m.rows - coalesce(u.leaving, 0) + coalesce(u.coming, 0) - coalesce(w.rows, 0) AS active,
       u.cell_id IS NULL AND w.cell_id IS NULL AS settled
FROM cell c
JOIN cell_manifest m USING (cell_id, generation)
LEFT JOIN (
    SELECT t.cell_id, count(*) FILTER (WHERE t.lifted_at IS NULL) AS leaving,
           count(*) FILTER (WHERE t.lifted_at IS NOT NULL) AS coming
    FROM tombstone t
    WHERE t.dataset_id = %(dataset_id)s::uuid AND (t.removed IS NULL) = (t.lifted_at IS NULL)
    GROUP BY t.cell_id) u ON u.cell_id = c.cell_id
LEFT JOIN (
    SELECT r.cell_id, count(*) AS rows FROM record r
    WHERE r.record_id = ANY(%(without)s::uuid[])
    GROUP BY r.cell_id) w ON w.cell_id = c.cell_id
WHERE c.dataset_id = %(dataset_id)s::uuid
ORDER BY c.shard, c.slice
"""
LIST_MANIFESTS: LiteralString = """
SELECT DISTINCT sc.cell_id, m.root, m.rows
FROM stage_cell sc JOIN cell_manifest m ON m.cell_id = sc.cell_id AND m.generation = sc.generation
WHERE sc.stage_key = ANY(%(stage_keys)b::text[]) AND sc.cell_id = ANY(%(cell_ids)s::bigint[])
"""

UNKNOWN = ""
"""Stands for the root of active records that no stage was trained on: equal to none."""


@dataclass(frozen=True, slots=True)
class ActiveCell:
    """A cell, its newest manifest, and how many of its records are in service."""

    cell_id: int
    shard: int
    slice: int
    root: str
    active: int
    settled: bool
    """Whether the newest manifest is that of the active records."""


@dataclass(frozen=True, slots=True)
class _Manifest:
    cell_id: int
    root: str
    rows: int


def ask_cells(
    connection: Connection, dataset_id: UUID, *, without: Sequence[UUID] = ()
) -> Callable[[], list[ActiveCell]]:
    """The dataset's cells, counted without the active records `without`; see `database.ask`."""
    return ask(connection, LIST_CELLS, {"dataset_id": dataset_id, "without": list(without)}, class_row(ActiveCell))


def list_roots(
    connection: Connection, cells: Sequence[ActiveCell], stage_keys: Iterable[str], touched: AbstractSet[CellRoot]
) -> dict[int, dict[int, str]]:
    """Roots of the active records' manifests: shard -> slice -> root, `UNKNOWN` where no stage reads that manifest.

    Args:
        connection: under the model's lock. What another model's planner changes between these reads can only rank
            stages wrongly that are clean, and until this model's own planner has run.
        cells: what `ask_cells` gave for the model's dataset.
        stage_keys: the stages to choose from.
        touched: the manifests in their lineage that hold a record with an open tombstone (`stages.list_touched`),
            or one that the cells are counted without.
    """
    unsettled = [cell.cell_id for cell in cells if not cell.settled]
    read: dict[int, list[_Manifest]] = {cell_id: [] for cell_id in unsettled}
    if unsettled:
        values = {"stage_keys": list(stage_keys), "cell_ids": unsettled}
        with connection.cursor(row_factory=class_row(_Manifest)) as cursor:
            for manifest in cursor.execute(LIST_MANIFESTS, values):
                read[manifest.cell_id].append(manifest)
    roots: dict[int, dict[int, str]] = {}
    for cell in cells:
        roots.setdefault(cell.shard, {})[cell.slice] = cell.root if cell.settled else _root(cell, read, touched)
    return roots


def _root(cell: ActiveCell, read: dict[int, list[_Manifest]], touched: AbstractSet[CellRoot]) -> str:
    """The clean manifest with as many records as are active: it holds active ones only, so it holds them all."""
    for manifest in read[cell.cell_id]:
        if manifest.rows == cell.active and CellRoot(cell.shard, cell.slice, manifest.root) not in touched:
            return manifest.root
    return UNKNOWN
