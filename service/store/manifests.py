"""Manifests of cells, put together again from the commitments of records and of tombstones.

Nothing is hashed here, inside a transaction: whoever makes paths of them compares their roots.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.evidence.rows import ManifestRow, RecordRow
from service.store.database import Connection

RECORDS: LiteralString = """
deletion_request_record q
JOIN tombstone t ON t.record_id = q.record_id
JOIN cell c ON c.cell_id = t.cell_id
WHERE q.request_id = %(request_id)s::uuid AND t.dataset_id = %(dataset_id)s::uuid
  AND (%(outcome)s::deletion_outcome = 'erased' OR t.erased_at IS NULL)  -- restricted, then erased for another request
"""
HELD: LiteralString = """
t.added <= m.generation AND (t.removed IS NULL OR m.generation < t.removed)
AND NOT EXISTS (SELECT FROM absence b WHERE b.record_id = t.record_id
                  AND b.removed <= m.generation AND m.generation < b.returned)
"""
LIST_RECORDS: LiteralString = (
    "SELECT t.record_id, t.commitment, c.shard, c.slice FROM " + RECORDS + " ORDER BY t.record_id"
)
# What stages read in the records' cells; per record the last manifest that held it; before and after a rewrite.
LIST_NEEDED: LiteralString = (
    """
WITH home AS (
    SELECT t.record_id, t.cell_id, t.added, t.removed FROM """
    + RECORDS
    + """
)
SELECT DISTINCT ON (n.cell_id, m.root) n.cell_id, c.shard, c.slice, n.generation, m.root
FROM (
    SELECT sc.cell_id, sc.generation FROM stage_cell sc
    WHERE sc.stage_key = ANY(%(stage_keys)s::text[]) AND sc.cell_id IN (SELECT cell_id FROM home)
    UNION ALL
    SELECT t.cell_id, max(m.generation) FROM home t JOIN cell_manifest m ON m.cell_id = t.cell_id
    WHERE NOT %(stages_only)s::boolean AND """
    + HELD
    + """
    GROUP BY t.record_id, t.cell_id
    UNION ALL
    SELECT l.cell_id, l.removed - s.back
    FROM (SELECT cell_id, max(removed) AS removed FROM home GROUP BY cell_id) l
    CROSS JOIN (VALUES (0), (1)) s (back)
    WHERE %(outcome)s::deletion_outcome = 'erased' AND NOT %(stages_only)s::boolean
) n
JOIN cell c ON c.cell_id = n.cell_id
JOIN cell_manifest m ON m.cell_id = n.cell_id AND m.generation = n.generation
ORDER BY n.cell_id, m.root, n.generation
"""
)
LIST_COMMITMENTS: LiteralString = """
SELECT c.commitment
FROM (SELECT r.record_id, r.commitment FROM record r
      WHERE r.cell_id = %(cell_id)s::bigint AND r.added <= %(generation)s::bigint
      UNION  -- tombstones keep what was erased since
      SELECT t.record_id, t.commitment FROM tombstone t
      WHERE t.cell_id = %(cell_id)s::bigint AND t.added <= %(generation)s::bigint) c
WHERE NOT EXISTS (SELECT FROM tombstone t WHERE t.record_id = c.record_id AND t.removed <= %(generation)s::bigint)
  AND NOT EXISTS (
      SELECT FROM absence b
      WHERE b.record_id = c.record_id
        AND b.removed <= %(generation)s::bigint AND %(generation)s::bigint < b.returned)
"""


@dataclass(frozen=True, slots=True)
class _Needed:
    cell_id: int
    shard: int
    slice: int
    generation: int
    root: str


def list_records(connection: Connection, request_id: UUID, dataset_id: UUID, outcome: str) -> tuple[RecordRow, ...]:
    """The request's records in a dataset, each with its cell."""
    values = {"request_id": request_id, "dataset_id": dataset_id, "outcome": outcome}
    with connection.cursor(row_factory=class_row(RecordRow)) as cursor:
        return tuple(cursor.execute(LIST_RECORDS, values).fetchall())


def list_manifests(
    connection: Connection,
    request_id: UUID,
    dataset_id: UUID,
    outcome: str,
    stage_keys: Iterable[str],
    *,
    stages_only: bool = False,
) -> tuple[ManifestRow, ...]:
    """The manifests of the records' cells that a certificate needs whole; `stages_only`: that these stages read."""
    values: dict[str, Any] = {
        "request_id": request_id,
        "dataset_id": dataset_id,
        "outcome": outcome,
        "stage_keys": list(stage_keys),
        "stages_only": stages_only,
    }
    with connection.cursor(row_factory=class_row(_Needed)) as cursor:
        needed = cursor.execute(LIST_NEEDED, values).fetchall()
    return tuple(_whole(connection, each) for each in needed)


def _whole(connection: Connection, needed: _Needed) -> ManifestRow:
    values = {"cell_id": needed.cell_id, "generation": needed.generation}
    with connection.cursor(row_factory=scalar_row, binary=True) as cursor:
        found: list[bytes] = cursor.execute(LIST_COMMITMENTS, values).fetchall()
    return ManifestRow(shard=needed.shard, slice=needed.slice, root=needed.root, commitments=tuple(sorted(found)))
