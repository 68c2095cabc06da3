"""Which records requests are about, and their tombstones: out of service, and out of ingestion (rules 19, 23, 30)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.store.database import Connection

INSERT_RECORDS: LiteralString = """
INSERT INTO deletion_request_record (request_id, record_id)
SELECT q.request_id, rs.record_id
FROM unnest(%(request_ids)s::uuid[]) q (request_id)
JOIN deletion_request d ON d.request_id = q.request_id
JOIN record_subject rs ON rs.subject_id = d.subject_id
JOIN record r ON r.record_id = rs.record_id AND r.dataset_id = %(dataset_id)s::uuid
UNION  -- what older requests of the same subject are about and this model has not dealt with yet, erased or not
SELECT q.request_id, rr.record_id
FROM unnest(%(request_ids)s::uuid[]) q (request_id)
JOIN deletion_request d ON d.request_id = q.request_id
JOIN deletion_request o ON o.subject_id = d.subject_id AND o.request_id <> d.request_id
JOIN request_target g ON g.request_id = o.request_id AND g.model_id = %(model_id)s::bigint
     AND g.state NOT IN ('completed', 'lifted', 'revoked', 'rejected', 'expired')
JOIN deletion_request_record rr ON rr.request_id = o.request_id
ON CONFLICT DO NOTHING
"""
LIST_RECORDS: LiteralString = """
SELECT q.request_id, q.record_id, coalesce(r.cell_id, t.cell_id) AS cell_id
FROM deletion_request_record q
LEFT JOIN record r ON r.record_id = q.record_id AND r.dataset_id = %(dataset_id)s::uuid
LEFT JOIN tombstone t  -- another model's target was faster and has erased the record
    ON t.record_id = q.record_id AND t.dataset_id = %(dataset_id)s::uuid AND t.erased_at IS NOT NULL
WHERE q.request_id = ANY(%(request_ids)s::uuid[]) AND (r.record_id IS NOT NULL OR t.record_id IS NOT NULL)
ORDER BY q.request_id, q.record_id
"""
INSERT_TOMBSTONES: LiteralString = """
INSERT INTO tombstone (record_id, dataset_id, cell_id, commitment, added, request_id)
SELECT DISTINCT ON (r.record_id) r.record_id, r.dataset_id, r.cell_id, r.commitment, r.added, q.request_id
FROM unnest(%(record_ids)s::uuid[], %(request_ids)s::uuid[]) WITH ORDINALITY q (record_id, request_id, place)
JOIN record r ON r.record_id = q.record_id
ORDER BY r.record_id, q.place
ON CONFLICT (record_id) DO UPDATE  -- out again: a restriction of it was lifted before
SET lifted_at = NULL, request_id = EXCLUDED.request_id, created_at = EXCLUDED.created_at
WHERE tombstone.lifted_at IS NOT NULL AND tombstone.erased_at IS NULL
RETURNING record_id
"""
ARE_NEW: LiteralString = """
SELECT EXISTS (
    SELECT FROM unnest(%(record_ids)s::uuid[]) q (record_id)
    WHERE NOT EXISTS (
        SELECT FROM deletion_request_record o
        JOIN request_target g ON g.request_id = o.request_id AND g.model_id = %(model_id)s::bigint
        WHERE o.record_id = q.record_id AND g.version IS NOT NULL AND g.state NOT IN ('lifted', 'revoked')))
"""
INSERT_DO_NOT_TRAIN: LiteralString = """
INSERT INTO do_not_train (subject_id, dataset_id, request_id)
SELECT d.subject_id, %(dataset_id)s::uuid, d.request_id
FROM deletion_request d
WHERE d.request_id = ANY(%(request_ids)s::uuid[]) AND d.subject_id IS NOT NULL
ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A record that a request is about, and its cell."""

    request_id: UUID
    record_id: UUID
    cell_id: int


def list_places(connection: Connection, model_id: int, dataset_id: UUID, request_ids: Sequence[UUID]) -> list[Place]:
    """The records of the model's dataset that the requests are about; those of a subject are written down first."""
    values = {"request_ids": list(request_ids), "dataset_id": dataset_id, "model_id": model_id}
    connection.execute(INSERT_RECORDS, values)
    with connection.cursor(row_factory=class_row(Place)) as cursor:
        return cursor.execute(LIST_RECORDS, values).fetchall()


def insert_tombstones(connection: Connection, places: Sequence[Place]) -> None:
    """Take the records out of service; the first request wins, a later one finds them gone (rule 30)."""
    values = {"record_ids": [p.record_id for p in places], "request_ids": [p.request_id for p in places]}
    connection.execute(INSERT_TOMBSTONES, values)


def are_new(connection: Connection, model_id: int, places: Sequence[Place]) -> bool:
    """Whether one of the records was not out of this model's service before, whatever other models have done."""
    values = {"model_id": model_id, "record_ids": [place.record_id for place in places]}
    with connection.cursor(row_factory=scalar_row) as cursor:
        return bool(cursor.execute(ARE_NEW, values).fetchone())


def insert_do_not_train(connection: Connection, dataset_id: UUID, request_ids: Sequence[UUID]) -> None:
    """Refuse the requests' subjects at ingestion from now on."""
    connection.execute(INSERT_DO_NOT_TRAIN, {"dataset_id": dataset_id, "request_ids": list(request_ids)})
