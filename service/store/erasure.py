"""Erasure's reads and marks: what may be erased, and the record rows that go with the payloads."""

from collections.abc import Iterable
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.store import priors, targets
from service.store.database import Connection
from service.store.objects import Object

UNHINDERED: LiteralString = """
    m.erase_after + t.deactivated_at <= clock_timestamp()
    AND NOT EXISTS (
        SELECT FROM deletion_request_record q
        JOIN record c ON c.record_id = q.record_id AND c.dataset_id = m.dataset_id
        JOIN record_subject s ON s.record_id = q.record_id
        JOIN hold h ON h.subject_id = s.subject_id AND h.released_at IS NULL
        WHERE q.request_id = t.request_id)
    AND NOT EXISTS (  -- payloads are shared: another model's time to revoke is kept too
        SELECT FROM request_target o
        JOIN model n ON n.model_id = o.model_id AND n.dataset_id = m.dataset_id AND n.erase_after > interval '0'
        WHERE o.request_id = t.request_id AND o.state IN ('received', 'deactivating', 'deactivated')
          AND (o.deactivated_at IS NULL OR o.deactivated_at + n.erase_after > clock_timestamp()))
"""
"""What must hold before a target `t` of model `m` is erased."""
MAY_ERASE: LiteralString = (
    """
SELECT r.kind = 'erase' AND """
    + UNHINDERED
    + """
FROM request_target t
JOIN model m ON m.model_id = t.model_id
JOIN deletion_request r ON r.request_id = t.request_id
WHERE t.request_id = %(request_id)s::uuid AND t.model_id = %(model_id)s::bigint
"""
)
SHARE_SUBJECTS: LiteralString = """
SELECT subject_id FROM subject
WHERE subject_id IN (
    SELECT s.subject_id
    FROM deletion_request_record q JOIN record_subject s ON s.record_id = q.record_id
    WHERE q.request_id = %(request_id)s::uuid)
ORDER BY subject_id
FOR KEY SHARE
"""
MARK_ERASING: LiteralString = """
UPDATE request_target SET state = 'erasing'
WHERE request_id = %(request_id)s::uuid AND model_id = %(model_id)s::bigint AND state = 'deactivated'
"""
LIST_CELLS: LiteralString = """
SELECT DISTINCT t.cell_id
FROM deletion_request_record q
JOIN tombstone t ON t.record_id = q.record_id
JOIN model m ON m.model_id = %(model_id)s::bigint AND m.dataset_id = t.dataset_id
WHERE q.request_id = %(request_id)s::uuid AND t.erased_at IS NULL AND t.lifted_at IS NULL
ORDER BY t.cell_id
"""
LIST_DOOMED_PAYLOADS: LiteralString = """
SELECT DISTINCT a.object_name, a.digest, a.stage_key, a.cell_id
FROM deletion_request_record q
JOIN tombstone t ON t.record_id = q.record_id
JOIN model m ON m.model_id = %(model_id)s::bigint AND m.dataset_id = t.dataset_id
JOIN artifact a ON a.cell_id = t.cell_id AND a.state = 'doomed'
WHERE q.request_id = %(request_id)s::uuid
"""
LIST_ERASABLE: LiteralString = """
SELECT t.record_id
FROM tombstone t
WHERE t.cell_id = %(cell_id)s::bigint AND t.erased_at IS NULL AND t.lifted_at IS NULL
  AND EXISTS (
      SELECT FROM deletion_request_record q
      JOIN request_target g ON g.request_id = q.request_id AND g.state = 'erasing'
      JOIN model m ON m.model_id = g.model_id AND m.dataset_id = t.dataset_id
      WHERE q.record_id = t.record_id)
  AND NOT EXISTS (
      SELECT FROM record_subject s
      JOIN hold h ON h.subject_id = s.subject_id AND h.released_at IS NULL
      WHERE s.record_id = t.record_id)
"""
MARK_TOMBSTONES: LiteralString = """
UPDATE tombstone SET erased_at = clock_timestamp()
WHERE cell_id = %(cell_id)s::bigint AND record_id = ANY(%(record_ids)s::uuid[]) AND erased_at IS NULL
"""
DELETE_RECORDS: LiteralString = "DELETE FROM record WHERE record_id = ANY(%(record_ids)s::uuid[])"
MARK_ERASED: LiteralString = """
UPDATE request_target t
SET erased_at = clock_timestamp(), attempts = 0, attempted_at = NULL
WHERE t.request_id = %(request_id)s::uuid AND t.model_id = %(model_id)s::bigint AND t.state = 'erasing'
  AND t.erased_at IS NULL
  AND NOT EXISTS (
      SELECT FROM deletion_request_record q
      JOIN tombstone b ON b.record_id = q.record_id
      JOIN model m ON m.model_id = t.model_id AND m.dataset_id = b.dataset_id
      WHERE q.request_id = t.request_id AND b.erased_at IS NULL AND b.lifted_at IS NULL)
  AND NOT EXISTS (  -- an older file of such a cell, or one that an ingestion is writing, may hold the payload still
      SELECT FROM deletion_request_record q
      JOIN tombstone b ON b.record_id = q.record_id
      JOIN model m ON m.model_id = t.model_id AND m.dataset_id = b.dataset_id
      JOIN artifact a ON a.cell_id = b.cell_id AND a.state IN ('writing', 'doomed') AND a.created_at <= b.erased_at
      WHERE q.request_id = t.request_id)
  AND NOT EXISTS (
      SELECT FROM artifact a
      WHERE a.stage_key IN (SELECT jsonb_array_elements_text(t.plan -> 'stages')) AND a.state <> 'destroyed')
RETURNING t.request_id
"""


def may_erase(connection: Connection, request_id: UUID, model_id: int) -> bool:
    """Whether every `erase_after` has passed and no hold stands on a subject of the request's records."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return bool(cursor.execute(MAY_ERASE, {"request_id": request_id, "model_id": model_id}).fetchone())


def share_subjects(connection: Connection, request_id: UUID) -> None:
    """Lock everybody whom the request's records concern: no hold is placed until the transaction ends."""
    connection.execute(SHARE_SUBJECTS, {"request_id": request_id})


def mark_erasing(connection: Connection, request_id: UUID, model_id: int) -> None:
    """From here there is no way back."""
    connection.execute(MARK_ERASING, {"request_id": request_id, "model_id": model_id})
    targets.refresh_requests(connection, [request_id])


def list_cells(connection: Connection, request_id: UUID, model_id: int) -> list[int]:
    """Cells of the model's dataset that still hold payloads of the request's records."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_CELLS, {"request_id": request_id, "model_id": model_id}).fetchall()


def list_doomed_payloads(connection: Connection, request_id: UUID, model_id: int) -> list[Object]:
    """Files, replaced or given up, of the cells that the request's records lay in."""
    with connection.cursor(row_factory=class_row(Object)) as cursor:
        return cursor.execute(LIST_DOOMED_PAYLOADS, {"request_id": request_id, "model_id": model_id}).fetchall()


def list_erasable(connection: Connection, cell_id: int) -> set[UUID]:
    """Records of the cell that an `erasing` target asks for and no hold keeps, of every request at once."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return set(cursor.execute(LIST_ERASABLE, {"cell_id": cell_id}).fetchall())


def mark_records_erased(connection: Connection, cell_id: int, record_ids: Iterable[UUID]) -> None:
    """Payloads are gone: the tombstones say so for ever; the records' rows, their subjects' links and priors go."""
    gone = list(record_ids)
    values = {"cell_id": cell_id, "record_ids": gone}
    connection.execute(MARK_TOMBSTONES, values)
    priors.forget(connection, gone)
    connection.execute(DELETE_RECORDS, values)


def mark_erased(connection: Connection, request_id: UUID, model_id: int) -> bool:
    """End the erasure if nothing of the plan is left; False when something is, or another worker was faster."""
    values = {"request_id": request_id, "model_id": model_id}
    return connection.execute(MARK_ERASED, values).fetchone() is not None
