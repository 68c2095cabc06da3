"""Targets: a request's way through one model (rule 26). Claims, steps, and the state that a request shows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.domain.requests import Outcome, State, joint_outcome, least_advanced
from service.evidence.events import EventKind
from service.store import events
from service.store.database import Connection

BATCH = 5000
"""Targets that one deactivation takes at most (rule 27)."""

CLAIM_RECEIVED: LiteralString = """
SELECT t.request_id, r.subject_id, r.created_at < clock_timestamp() - interval '5 seconds' AS overdue,
       r.kind, r.due_at, t.deferred_until IS NOT NULL AS deferred
FROM request_target t
JOIN deletion_request r ON r.request_id = t.request_id
WHERE t.model_id = %(model_id)s::bigint AND t.state = 'received'
  AND (t.deferred_until IS NULL OR t.deferred_until <= clock_timestamp())
ORDER BY r.created_at, t.request_id
LIMIT %(limit)s::int
FOR UPDATE OF t SKIP LOCKED
"""
LOCK_SUBJECTS: LiteralString = """
SELECT subject_id FROM subject WHERE subject_id = ANY(%(subject_ids)s::uuid[]) ORDER BY subject_id FOR UPDATE
"""
INSERT_TARGETS: LiteralString = """
INSERT INTO request_target (request_id, model_id, state)
SELECT q.request_id, m.model_id, 'received'
FROM unnest(%(request_ids)s::uuid[]) q (request_id)
CROSS JOIN model m
WHERE m.dataset_id = %(dataset_id)s::uuid
ON CONFLICT DO NOTHING
"""
MARK_DEACTIVATING: LiteralString = """
UPDATE request_target t
SET state = 'deactivating', version = %(version)s::bigint, plan = q.plan::jsonb, attempts = 0, attempted_at = NULL
FROM unnest(%(request_ids)s::uuid[], %(plans)s::text[]) q (request_id, plan)
WHERE t.request_id = q.request_id AND t.model_id = %(model_id)s::bigint AND t.state = 'received'
"""
MARK_NO_MATCH: LiteralString = """
UPDATE request_target SET state = 'completed', outcome = 'no_match', completed_at = clock_timestamp()
WHERE request_id = ANY(%(request_ids)s::uuid[]) AND model_id = %(model_id)s::bigint AND state = 'received'
"""
MARK_DEACTIVATED: LiteralString = """
UPDATE request_target
SET state = 'deactivated', deactivated_at = clock_timestamp(), attempts = 0, attempted_at = NULL
WHERE model_id = %(model_id)s::bigint AND state = 'deactivating' AND version <= %(floor)s::bigint
RETURNING request_id
"""
MARK_FAILED: LiteralString = """
UPDATE request_target SET state = 'failed', error = %(error)s::text, attempts = greatest(attempts, 1)
WHERE request_id = %(request_id)s::uuid AND model_id = %(model_id)s::bigint AND state = %(state)s::deletion_state
RETURNING attempts
"""
RAISE_ATTEMPTS: LiteralString = """
UPDATE request_target SET attempts = attempts + 1, attempted_at = clock_timestamp()
WHERE request_id = %(request_id)s::uuid AND model_id = %(model_id)s::bigint AND state = %(state)s::deletion_state
RETURNING attempts
"""
RAISE_OVERDUE: LiteralString = """
UPDATE request_target t SET attempts = attempts + 1, attempted_at = clock_timestamp()
FROM deletion_request r
WHERE r.request_id = t.request_id AND t.model_id = %(model_id)s::bigint AND t.state = 'received'
  AND t.request_id = ANY(%(request_ids)s::uuid[])
  AND (t.attempted_at IS NULL
       OR t.attempted_at + make_interval(secs => least(power(2, t.attempts), 60)::float) < clock_timestamp())
RETURNING t.request_id, t.attempts
"""
GET: LiteralString = """
SELECT t.request_id, t.model_id, t.state, t.outcome, t.version, t.plan, t.attempts, t.deactivated_at, t.erased_at,
       r.subject_id
FROM request_target t JOIN deletion_request r ON r.request_id = t.request_id
WHERE t.request_id = %(request_id)s::uuid AND t.model_id = %(model_id)s::bigint
"""
LOCK: LiteralString = GET + " FOR UPDATE OF t"
LOCK_REQUESTS: LiteralString = """
SELECT request_id FROM deletion_request WHERE request_id = ANY(%(request_ids)s::uuid[]) ORDER BY request_id FOR UPDATE
"""
LIST_STATES: LiteralString = """
SELECT request_id, state, outcome FROM request_target WHERE request_id = ANY(%(request_ids)s::uuid[])
"""
MARK_REQUESTS: LiteralString = """
WITH marked AS (
    UPDATE deletion_request d SET state = q.state::deletion_state, outcome = q.outcome::deletion_outcome
    FROM unnest(%(request_ids)s::uuid[], %(states)s::text[], %(outcomes)s::text[]) q (request_id, state, outcome)
    WHERE d.request_id = q.request_id AND (d.state, d.outcome) IS DISTINCT FROM
          (q.state::deletion_state, q.outcome::deletion_outcome)
    RETURNING d.request_id, d.state
)
SELECT pg_notify('expunge_request', request_id || ' ' || state) FROM marked -- service.store.notices
"""


@dataclass(frozen=True, slots=True)
class Claimed:
    """A received target in the planner's hands."""

    request_id: UUID
    subject_id: UUID | None
    overdue: bool
    """Received so long ago that earlier planners should have taken it."""
    kind: str
    due_at: datetime
    deferred: bool
    """Its replacement is trained, or it may not wait for that any longer."""


@dataclass(frozen=True, slots=True)
class Target:
    """A target's row."""

    request_id: UUID
    model_id: int
    state: str
    outcome: str | None
    version: int | None
    plan: dict[str, list[str]] | None
    attempts: int
    deactivated_at: object
    erased_at: object
    subject_id: UUID | None


@dataclass(frozen=True, slots=True)
class TargetState:
    """What one target adds to the state that its request shows."""

    request_id: UUID
    state: str
    outcome: str | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """How often a target was tried since its last step forward."""

    request_id: UUID
    attempts: int


def claim_received(connection: Connection, model_id: int) -> list[Claimed]:
    """Up to `BATCH` received targets of a model, locked; those that another planner holds are passed over."""
    with connection.cursor(row_factory=class_row(Claimed)) as cursor:
        return cursor.execute(CLAIM_RECEIVED, {"model_id": model_id, "limit": BATCH}).fetchall()


def lock_subjects(connection: Connection, subject_ids: Iterable[UUID]) -> None:
    """Lock subjects in id order: no record of theirs can be ingested until the transaction ends (rule 23)."""
    connection.execute(LOCK_SUBJECTS, {"subject_ids": sorted(set(subject_ids))})


def insert_targets(connection: Connection, dataset_id: UUID, request_ids: Sequence[UUID]) -> None:
    """Extend the requests to models that were declared on the dataset since: they may have learnt the records."""
    connection.execute(INSERT_TARGETS, {"dataset_id": dataset_id, "request_ids": list(request_ids)})


def mark_deactivating(connection: Connection, model_id: int, version: int, plans: dict[UUID, str]) -> None:
    """Freeze the plan (JSON) on each target, which now waits for the floor `version`; refresh the requests after."""
    values = {
        "model_id": model_id,
        "version": version,
        "request_ids": list(plans),
        "plans": list(plans.values()),
    }
    connection.execute(MARK_DEACTIVATING, values)


def mark_no_match(connection: Connection, model_id: int, request_ids: Sequence[UUID]) -> None:
    """Complete targets that the model's dataset holds nothing for."""
    connection.execute(MARK_NO_MATCH, {"model_id": model_id, "request_ids": list(request_ids)})
    refresh_requests(connection, request_ids)


def mark_deactivated(connection: Connection, model_id: int, floor: int) -> list[UUID]:
    """Targets whose floor is cleared; returns their requests."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        done = cursor.execute(MARK_DEACTIVATED, {"model_id": model_id, "floor": floor}).fetchall()
    refresh_requests(connection, done)
    return done


def mark_failed(connection: Connection, request_id: UUID, model_id: int, state: State, error: str) -> bool:
    """Show a target as failed, from `state`, and record it; False when it was not in that state any more.

    `error` is the name of an error class: a message could hold data.
    """
    values = {"request_id": request_id, "model_id": model_id, "state": state.value, "error": error}
    with connection.cursor(row_factory=scalar_row) as cursor:
        attempts: int | None = cursor.execute(MARK_FAILED, values).fetchone()
    if attempts is None:
        return False
    refresh_requests(connection, [request_id])
    events.append(
        connection,
        EventKind.TARGET_FAILED,
        request_id=request_id,
        model_id=model_id,
        error=error,
        attempts=attempts,
    )
    return True


def raise_attempts(connection: Connection, request_id: UUID, model_id: int, state: State) -> int | None:
    """Count an attempt before it is made, in a transaction of its own; None: the target is not in that state."""
    values = {"request_id": request_id, "model_id": model_id, "state": state.value}
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(RAISE_ATTEMPTS, values).fetchone()


def raise_overdue(connection: Connection, model_id: int, request_ids: Sequence[UUID]) -> list[Attempt]:
    """Count an attempt for overdue received targets, at growing distances; none on the usual path."""
    values = {"model_id": model_id, "request_ids": list(request_ids)}
    with connection.cursor(row_factory=class_row(Attempt)) as cursor:
        return cursor.execute(RAISE_OVERDUE, values).fetchall()


def get_target(connection: Connection, request_id: UUID, model_id: int, *, lock: bool = False) -> Target | None:
    """One target, locked if asked."""
    with connection.cursor(row_factory=class_row(Target)) as cursor:
        return cursor.execute(LOCK if lock else GET, {"request_id": request_id, "model_id": model_id}).fetchone()


def refresh_requests(connection: Connection, request_ids: Iterable[UUID]) -> None:
    """Let requests show their least advanced target, and an outcome once all have completed (rule 26)."""
    ids = sorted(set(request_ids))
    if not ids:
        return
    connection.execute(LOCK_REQUESTS, {"request_ids": ids})
    by_request: dict[UUID, list[TargetState]] = {}
    with connection.cursor(row_factory=class_row(TargetState)) as cursor:
        for row in cursor.execute(LIST_STATES, {"request_ids": ids}):
            by_request.setdefault(row.request_id, []).append(row)
    states: list[str] = []
    outcomes: list[str | None] = []
    for found in by_request.values():
        state = least_advanced([State(target.state) for target in found])
        states.append(state.value)
        ended = [Outcome(target.outcome) for target in found if target.outcome]
        outcomes.append(joint_outcome(ended).value if state is State.COMPLETED else None)
    connection.execute(MARK_REQUESTS, {"request_ids": list(by_request), "states": states, "outcomes": outcomes})
