"""Withdrawn requests: their records come back, but for those that another request keeps out (design.md section 4).

What is served stays a function of the active records: a record is out as long as any request stands that is about it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.domain.errors import ConflictError, NotFoundError
from service.domain.requests import Kind, Outcome, State, check_transition
from service.evidence.events import EventKind
from service.store import cells, deferrals, events, models, publish, targets
from service.store.database import Connection
from service.store.models import Model

STANDING: LiteralString = """
    g.state NOT IN ('awaiting_identity', 'awaiting_approval', 'rejected', 'revoked', 'expired', 'duplicate', 'lifted')
    AND (g.version IS NOT NULL OR g.deferred_until IS NOT NULL)
"""
GET_REQUEST: LiteralString = """
SELECT kind, subject_id FROM deletion_request WHERE request_id = %(request_id)s::uuid
"""
LIST_MODELS: LiteralString = """
SELECT model_id FROM request_target WHERE request_id = %(request_id)s::uuid ORDER BY model_id
"""
LIST_CELLS: LiteralString = """
SELECT DISTINCT t.cell_id
FROM deletion_request_record q JOIN tombstone t ON t.record_id = q.record_id
WHERE q.request_id = %(request_id)s::uuid
"""
LOCK_TARGETS: LiteralString = """
SELECT model_id, state, outcome
FROM request_target
WHERE request_id = %(request_id)s::uuid
ORDER BY model_id
FOR UPDATE
"""
MARK_WITHDRAWN: LiteralString = """
UPDATE request_target
SET state = %(state)s::deletion_state, outcome = NULL, attempts = 0, attempted_at = NULL, error = NULL
WHERE request_id = %(request_id)s::uuid AND model_id = %(model_id)s::bigint
"""
LIFT_TOMBSTONES: LiteralString = (
    """
UPDATE tombstone t SET lifted_at = clock_timestamp()
WHERE t.record_id IN (SELECT record_id FROM deletion_request_record WHERE request_id = %(request_id)s::uuid)
  AND t.lifted_at IS NULL AND t.erased_at IS NULL
  AND NOT EXISTS (
      SELECT FROM deletion_request_record q
      JOIN request_target g ON g.request_id = q.request_id
      JOIN model m ON m.model_id = g.model_id AND m.dataset_id = t.dataset_id
      WHERE q.record_id = t.record_id AND """
    + STANDING
    + """)
RETURNING t.record_id, t.dataset_id
"""
)
LIFT_DO_NOT_TRAIN: LiteralString = """
UPDATE do_not_train SET lifted_at = clock_timestamp()
WHERE request_id = %(request_id)s::uuid AND lifted_at IS NULL
"""
RENEW_DO_NOT_TRAIN: LiteralString = (
    """
INSERT INTO do_not_train (subject_id, dataset_id, request_id)
SELECT DISTINCT ON (m.dataset_id) d.subject_id, m.dataset_id, d.request_id
FROM deletion_request d
JOIN request_target g ON g.request_id = d.request_id
JOIN model m ON m.model_id = g.model_id
WHERE d.subject_id = %(subject_id)s::uuid AND (g.state = 'completed' OR """
    + STANDING
    + """)
ORDER BY m.dataset_id, d.created_at, d.request_id
ON CONFLICT DO NOTHING
"""
)

UNTOUCHED = frozenset({State.RECEIVED, State.AWAITING_IDENTITY, State.AWAITING_APPROVAL})
"""States of a target that has done nothing yet, but for a deferral."""


@dataclass(frozen=True, slots=True)
class _Request:
    kind: str
    subject_id: UUID | None


@dataclass(frozen=True, slots=True)
class _Target:
    model_id: int
    state: str
    outcome: str | None


@dataclass(frozen=True, slots=True)
class _Lifted:
    record_id: UUID
    dataset_id: UUID


def lift(connection: Connection, request_id: UUID, *, actor: str, reason_code: str) -> list[int]:
    """End a restriction: the same records serve as before it, from the same stages. Models that changed.

    Raises:
        NotFoundError: no such request.
        ConflictError: it is no restriction, or not one that stands.
    """
    request = _get_request(connection, request_id)
    if request.kind == Kind.ERASE:
        raise ConflictError("this request asks for erasure: revoke it, as long as erasing has not begun")
    return _withdraw(connection, request_id, request, State.LIFTED, actor=actor, reason_code=reason_code)


def revoke(connection: Connection, request_id: UUID, *, actor: str, reason_code: str) -> list[int]:
    """Take back a request before anything of it was done, an erasure also until `erasing`. Models that changed.

    Raises:
        NotFoundError: no such request.
        ConflictError: it has gone too far (rule 28); nothing was changed.
    """
    request = _get_request(connection, request_id)
    return _withdraw(connection, request_id, request, State.REVOKED, actor=actor, reason_code=reason_code)


def _get_request(connection: Connection, request_id: UUID) -> _Request:
    with connection.cursor(row_factory=class_row(_Request)) as cursor:
        found = cursor.execute(GET_REQUEST, {"request_id": request_id}).fetchone()
    if found is None:
        raise NotFoundError("there is no deletion request with that id")
    return found


def _withdraw(
    connection: Connection, request_id: UUID, request: _Request, verb: State, *, actor: str, reason_code: str
) -> list[int]:
    at = {"request_id": request_id}
    with connection.cursor(row_factory=scalar_row) as cursor:
        model_ids: list[int] = cursor.execute(LIST_MODELS, at).fetchall()
    locked = [models.lock_model(connection, model_id) for model_id in model_ids]
    if request.subject_id:
        targets.lock_subjects(connection, [request.subject_id])
    with connection.cursor(row_factory=scalar_row) as cursor:
        cells.hold_cells(connection, cursor.execute(LIST_CELLS, at).fetchall())
    with connection.cursor(row_factory=class_row(_Target)) as cursor:
        found = cursor.execute(LOCK_TARGETS, at).fetchall()
    if [target.model_id for target in found] != model_ids:
        raise ConflictError("a model was declared on the dataset just now: try again")
    if request.kind == Kind.ERASE and all(target.state == State.COMPLETED for target in found):
        # The same whether anything matched: not all who may revoke may know.
        raise ConflictError("the request is completed: there is no way back from it")
    states = {target.model_id: _after(target, request.kind, verb) for target in found}
    if verb is State.LIFTED and verb not in states.values():
        raise ConflictError("the restriction has not begun: revoke the request")
    for model_id, state in states.items():
        connection.execute(MARK_WITHDRAWN, {**at, "model_id": model_id, "state": state.value})
    targets.refresh_requests(connection, [request_id])
    with connection.cursor(row_factory=class_row(_Lifted)) as cursor:
        lifted = cursor.execute(LIFT_TOMBSTONES, at).fetchall()
    connection.execute(LIFT_DO_NOT_TRAIN, at)
    connection.execute(RENEW_DO_NOT_TRAIN, {"subject_id": request.subject_id})
    changed: list[int] = []
    for model in locked:
        back = [each.record_id for each in lifted if each.dataset_id == model.dataset_id]
        if back:
            changed.append(model.model_id)
        events.append(
            connection,
            EventKind.TARGET_LIFTED if states[model.model_id] is State.LIFTED else EventKind.TARGET_REVOKED,
            request_id=request_id,
            model_id=model.model_id,
            actor=actor,
            reason_code=reason_code,
            records=len(back),
            version=_serve(connection, model, back) if back else None,
        )
    return changed


def _after(target: _Target, kind: str, verb: State) -> State:
    """The state that a target goes to.

    Raises:
        ConflictError: there is no way there; it says what to do.
    """
    state = State(target.state)
    if state is State.FAILED:
        raise ConflictError("a target of the request has failed: retry it first, then withdraw the request")
    if state is State.DEACTIVATING:
        raise ConflictError("the request is deactivating, which takes a moment: try again when it is deactivated")
    if state is State.ERASING or target.outcome in {Outcome.ERASED, Outcome.PARTIAL}:
        raise ConflictError(f"the request is {state}: erasing has begun, and there is no way back from it")
    if state in UNTOUCHED:
        return State.REVOKED
    if state not in {State.DEACTIVATED, State.COMPLETED}:
        raise ConflictError(f"the request is {state} already: there is nothing to withdraw")
    if kind != Kind.ERASE and verb is State.REVOKED:
        raise ConflictError(f"the restriction is {state}: lift it instead of revoking the request")
    check_transition(state, verb)
    return verb


def _serve(connection: Connection, model: Model, back: Iterable[UUID]) -> int | None:
    """Publish what the records that are back bring back; the floor stays, since nothing became unservable.

    The cells' next manifests, and stages whose training was cancelled, are the rebuild's.
    """
    if model.deferring:
        deferrals.release(connection, model.model_id, back)
    models.mark_rebuild_wanted(connection, model.model_id)
    if model.version == 0:
        return None
    model = models.get_model_by_id(connection, model.model_id)
    found = publish.candidate(connection, model)
    if found.assembly.digest == models.find_served(connection, model.model_id, model.stable or model.version):
        if found.waiting:  # what came back may be what a gate is to look at
            models.mark_unpublished(connection, model.model_id)
        return None
    return publish.publish(connection, model, found, cause="lift")
