"""Deferrals: what a model under `rebuild_first` goes on serving until its replacement is trained.

A deferred target stays `received`. Its records are out of every manifest and of every other model, and no stage that
reads them is trained or published any more; only this model's stages from before may serve on. They end with the one
publication that deactivates. Every change is made under the model's lock.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.store.database import Connection
from service.store.stages import HOLDS
from shards.stages import CellRoot

INSERT: LiteralString = """
INSERT INTO deferral (model_id, record_id)
SELECT %(model_id)s::bigint, q.record_id
FROM unnest(%(record_ids)s::uuid[]) q (record_id)
WHERE NOT EXISTS (  -- out of this model's service already: a later request never brings it back
    SELECT FROM deletion_request_record o
    JOIN request_target g ON g.request_id = o.request_id AND g.model_id = %(model_id)s::bigint
    WHERE o.record_id = q.record_id AND g.version IS NOT NULL AND g.state NOT IN ('lifted', 'revoked'))
ON CONFLICT DO NOTHING
"""
MARK_TARGETS: LiteralString = """
UPDATE request_target t SET deferred_until = q.until, attempts = 0, attempted_at = NULL
FROM unnest(%(request_ids)s::uuid[], %(limits)s::timestamptz[]) q (request_id, until)
WHERE t.request_id = q.request_id AND t.model_id = %(model_id)s::bigint AND t.state = 'received'
"""
RELEASE: LiteralString = """
DELETE FROM deferral
WHERE model_id = %(model_id)s::bigint AND record_id = ANY(%(record_ids)s::uuid[])
"""
RELEASE_UNCLAIMED: LiteralString = """
DELETE FROM deferral d
WHERE d.model_id = %(model_id)s::bigint AND NOT EXISTS (
    SELECT FROM deletion_request_record q
    JOIN request_target t ON t.request_id = q.request_id AND t.model_id = %(model_id)s::bigint
    WHERE q.record_id = d.record_id AND t.state = 'received' AND t.deferred_until IS NOT NULL)
"""
# Also where all its records went out for other requests: a target that waits is ended by the next publication.
MARK_MODEL: LiteralString = """
UPDATE model m SET deferring = EXISTS (SELECT FROM deferral d WHERE d.model_id = m.model_id)
    OR EXISTS (SELECT FROM request_target t
               WHERE t.model_id = m.model_id AND t.state = 'received' AND t.deferred_until > clock_timestamp())
WHERE m.model_id = %(model_id)s::bigint
RETURNING deferring
"""
END: LiteralString = """
UPDATE request_target SET deferred_until = clock_timestamp()
WHERE model_id = %(model_id)s::bigint AND state = 'received' AND deferred_until > clock_timestamp()
"""
COUNT: LiteralString = """
SELECT count(*) FROM request_target
WHERE model_id = %(model_id)s::bigint AND state = 'received' AND deferred_until IS NOT NULL
"""
# Model servers look for newly trained stages every five seconds: a swap before that would find them still loading.
IS_LOADED: LiteralString = """
SELECT NOT EXISTS (SELECT FROM lease l WHERE l.model_id = %(model_id)s::bigint AND l.ended_at IS NULL)
    OR NOT EXISTS (
        SELECT FROM stage_job j
        WHERE j.model_id = %(model_id)s::bigint AND j.state = 'done'
          AND j.ended_at > clock_timestamp() - make_interval(secs => %(seconds)s::float))
"""
LIST_TOUCHED: LiteralString = (
    """
SELECT DISTINCT c.shard, c.slice, m.root
FROM stage s
JOIN stage_cell sc ON sc.stage_key = s.stage_key
JOIN cell c ON c.cell_id = sc.cell_id
JOIN cell_manifest m ON m.cell_id = sc.cell_id AND m.generation = sc.generation
JOIN tombstone t ON t.cell_id = sc.cell_id AND t.lifted_at IS NULL
     AND """
    + HOLDS
    + """
WHERE s.stage_key = ANY(%(stage_keys)b::text[])
  AND NOT EXISTS (SELECT FROM deferral d WHERE d.model_id = %(model_id)s::bigint AND d.record_id = t.record_id)
"""
)
LOAD_SECONDS = 6.0


def defer(connection: Connection, model_id: int, limits: Mapping[UUID, datetime], record_ids: Iterable[UUID]) -> bool:
    """Let the locked model's stages serve on with these records, each request until its moment at most.

    Returns:
        Whether the model defers anything now.
    """
    values = {"model_id": model_id, "record_ids": list(record_ids)}
    connection.execute(INSERT, values)
    at = {"model_id": model_id, "request_ids": list(limits), "limits": list(limits.values())}
    connection.execute(MARK_TARGETS, at)
    return _mark_model(connection, model_id)


def release(connection: Connection, model_id: int, record_ids: Iterable[UUID]) -> bool:
    """Count these records as the tombstones say again; the locked model's next version must be published with it.

    Returns:
        Whether the model defers anything now.
    """
    connection.execute(RELEASE, {"model_id": model_id, "record_ids": list(record_ids)})
    return _mark_model(connection, model_id)


def end(connection: Connection, model_id: int) -> int:
    """Let the planner take all deferred targets of the locked model now; returns how many wait for it.

    What no target asks for any more, since it was withdrawn, is not deferred either.
    """
    connection.execute(END, {"model_id": model_id})
    connection.execute(RELEASE_UNCLAIMED, {"model_id": model_id})
    _mark_model(connection, model_id)
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(COUNT, {"model_id": model_id}).fetchone() or 0


def is_loaded(connection: Connection, model_id: int) -> bool:
    """Whether the model's servers have had the time to load the stages that were trained last."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        values = {"model_id": model_id, "seconds": LOAD_SECONDS}
        return bool(cursor.execute(IS_LOADED, values).fetchone())


def list_touched(connection: Connection, model_id: int, stage_keys: Iterable[str]) -> frozenset[CellRoot]:
    """As `stages.list_touched`, but for what this model may serve on: the manifests that bar a stage from service."""
    values = {"model_id": model_id, "stage_keys": list(stage_keys)}
    with connection.cursor(row_factory=class_row(CellRoot)) as cursor:
        return frozenset(cursor.execute(LIST_TOUCHED, values).fetchall())


def _mark_model(connection: Connection, model_id: int) -> bool:
    with connection.cursor(row_factory=scalar_row) as cursor:
        return bool(cursor.execute(MARK_MODEL, {"model_id": model_id}).fetchone())
