"""What waits to be done, read from the state tables alone: the relay's outbox (protocol.md section 4)."""

from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.store.database import Connection
from service.store.erasure import UNHINDERED

BACKOFF: LiteralString = """
(t.attempted_at IS NULL
 OR t.attempted_at + make_interval(secs => least(power(2, t.attempts), 60)::float) < clock_timestamp())
"""
LIST_TO_PLAN: LiteralString = """
SELECT DISTINCT model_id FROM request_target
WHERE state = 'received' AND (deferred_until IS NULL OR deferred_until <= clock_timestamp())
ORDER BY model_id
"""
LIST_TO_ERASE: LiteralString = (
    """
SELECT t.request_id, t.model_id
FROM request_target t
JOIN model m ON m.model_id = t.model_id
JOIN deletion_request r ON r.request_id = t.request_id
WHERE t.state IN ('deactivated', 'erasing') AND t.erased_at IS NULL AND r.kind = 'erase'
  AND """
    + UNHINDERED
    + " AND "
    + BACKOFF
    + """
ORDER BY t.deactivated_at
LIMIT 1000
"""
)
LIST_TO_CERTIFY: LiteralString = (
    """
SELECT t.request_id, t.model_id
FROM request_target t
JOIN deletion_request r ON r.request_id = t.request_id
WHERE (t.state = 'erasing' AND t.erased_at IS NOT NULL OR t.state = 'deactivated' AND r.kind <> 'erase')
  AND NOT EXISTS (  -- a certificate waits until its events are under a signed tree head (rule 17)
      SELECT FROM event_pending e LEFT JOIN ledger_leaf l ON l.event_id = e.event_id
      WHERE e.request_id = t.request_id AND (e.model_id IS NULL OR e.model_id = t.model_id)
        AND e.kind <> 'rows.changed'
        AND (l.index < (SELECT h.size FROM tree_head h ORDER BY h.size DESC LIMIT 1)) IS NOT TRUE)
  AND """
    + BACKOFF
    + """
ORDER BY t.erased_at, t.deactivated_at
LIMIT 1000
"""
)
LIST_TO_REBUILD: LiteralString = """
SELECT model_id FROM model
WHERE (rebuild_wanted OR rebuild_at <= clock_timestamp()) AND cleared = floor
ORDER BY model_id
"""
LIST_TO_PUBLISH: LiteralString = """
SELECT m.model_id FROM model m
WHERE (m.building OR (m.deferring AND NOT m.rebuild_wanted))
  AND NOT EXISTS (SELECT FROM stage_job j WHERE j.model_id = m.model_id AND j.state IN ('queued', 'running'))
   OR m.canary_until <= clock_timestamp()
ORDER BY m.model_id
"""
COUNT_TO_TRAIN: LiteralString = """
SELECT count(*) FROM stage_job j JOIN stage s ON s.stage_key = j.stage_key
WHERE j.state = 'queued'
  AND (j.attempts = 0
       OR j.beat_at + make_interval(secs => least(power(4, j.attempts), 60)::float) < clock_timestamp())
  AND (s.parent IS NULL OR EXISTS (
      SELECT FROM artifact a WHERE a.stage_key = s.parent AND a.kind = 'stage' AND a.state = 'live'))
"""


@dataclass(frozen=True, slots=True)
class TargetRef:
    """A target to be moved on."""

    request_id: UUID
    model_id: int


def list_to_plan(connection: Connection) -> list[int]:
    """Models with received targets, those that wait for their replacement only when it is there or their time is up."""
    return _ids(connection, LIST_TO_PLAN)


def list_to_erase(connection: Connection) -> list[TargetRef]:
    """Targets past `erase_after`, without a hold, whose erasure has not ended."""
    return _targets(connection, LIST_TO_ERASE)


def list_to_certify(connection: Connection) -> list[TargetRef]:
    """Targets that are erased, or restricted, and lack their certificate."""
    return _targets(connection, LIST_TO_CERTIFY)


def list_to_rebuild(connection: Connection) -> list[int]:
    """Models that may lack stages, or whose planned moment has come, and that have no floor to clear first."""
    return _ids(connection, LIST_TO_REBUILD)


def list_to_publish(connection: Connection) -> list[int]:
    """Models whose last job ended and whose result, or deferred deletion, is not served yet; those with a canary that
    has had its time.
    """
    return _ids(connection, LIST_TO_PUBLISH)


def count_to_train(connection: Connection) -> int:
    """Jobs that a training worker could take now."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(COUNT_TO_TRAIN).fetchone() or 0


def _ids(connection: Connection, query: LiteralString) -> list[int]:
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(query).fetchall()


def _targets(connection: Connection, query: LiteralString) -> list[TargetRef]:
    with connection.cursor(row_factory=class_row(TargetRef)) as cursor:
        return cursor.execute(query).fetchall()
