"""Deletion requests: intake in one statement, and what their callers may read of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row

from service.domain.errors import ConflictError, InvalidInputError, NotFoundError
from service.domain.requests import Kind, State
from service.store.database import Connection
from service.store.subjects import Alias

# One round trip: intake is the busiest write. A request without targets would never end, so none is made.
RECEIVE: LiteralString = """
WITH target AS (
    SELECT m.model_id, m.name FROM model m JOIN dataset d USING (dataset_id)
    WHERE d.deletable AND (%(model_ids)s::bigint[] IS NULL OR m.model_id = ANY(%(model_ids)s::bigint[]))
      AND (%(dataset_id)s::uuid IS NULL OR m.dataset_id = %(dataset_id)s::uuid)
), claim AS (
    INSERT INTO idempotency_key (api_key, key, body_digest, request_id)
    SELECT %(actor)s::text, %(key)s::text, %(body_digest)s::bytea, %(request_id)s::uuid
    WHERE %(key)s::text IS NOT NULL AND EXISTS (SELECT FROM target)
    ON CONFLICT DO NOTHING
    RETURNING key
), request AS (
    INSERT INTO deletion_request (request_id, kind, state, subject_id, subject_commitment, regime, reference,
                                  received_at, due_at, created_by)
    SELECT %(request_id)s::uuid, %(kind)s::deletion_kind, 'received',
           (SELECT subject_id FROM subject_alias
            WHERE type = %(type)s::text AND digest = ANY(%(digests)s::bytea[]) LIMIT 1),
           %(subject_commitment)s::bytea, %(regime)s::text, %(reference)s::text, %(received_at)s::timestamptz,
           %(due_at)s::timestamptz, %(actor)s::text
    WHERE EXISTS (SELECT FROM target) AND (%(key)s::text IS NULL OR EXISTS (SELECT FROM claim))
    RETURNING request_id, created_at
), named AS (  -- Postgres runs the last first: the event of targets, which holds the request, comes before its
    INSERT INTO deletion_request_record (request_id, record_id)
    SELECT request_id, record_id FROM request, unnest(%(record_ids)s::uuid[]) record_id
), made AS (
    INSERT INTO request_target (request_id, model_id, state)
    SELECT request_id, model_id, 'received' FROM request, target
), event AS (
    INSERT INTO event_pending (kind, request_id, body)
    SELECT 'request.received', request_id, jsonb_build_object(
        'kind', %(kind)s::text, 'subject_commitment', encode(%(subject_commitment)s::bytea, 'hex'),
        'actor', %(actor)s::text, 'models', (SELECT jsonb_agg(name ORDER BY model_id) FROM target))
    FROM request
)
SELECT model_id, name, (SELECT created_at FROM request) AS created_at FROM target ORDER BY model_id
"""
FIND_CLAIM: LiteralString = """
SELECT request_id, body_digest FROM idempotency_key
WHERE api_key = %(actor)s::text AND key = %(key)s::text
"""
GET: LiteralString = """
SELECT request_id, kind, state, outcome, regime, reference, received_at, due_at, created_at
FROM deletion_request WHERE request_id = %(request_id)s::uuid
"""
LIST: LiteralString = """
SELECT request_id, kind, state, outcome, regime, reference, received_at, due_at, created_at
FROM deletion_request
WHERE (%(state)s::deletion_state IS NULL OR state = %(state)s::deletion_state)
  AND (%(before)s::timestamptz IS NULL
       OR (created_at, request_id) < (%(before)s::timestamptz, %(before_id)s::uuid))
ORDER BY created_at DESC, request_id DESC
LIMIT %(limit)s::int
"""
LIST_TARGETS: LiteralString = """
SELECT t.request_id, t.model_id, m.name AS model, t.state, t.outcome, t.version, t.attempts, t.error,
       t.deactivated_at, t.erased_at, t.completed_at,
       CASE WHEN t.state = 'received' THEN t.deferred_until END AS deferred_until,
       t.state IN ('deactivated', 'erasing') AND t.erased_at IS NULL AND d.kind = 'erase' AND EXISTS (
           SELECT FROM deletion_request_record q
           JOIN record c ON c.record_id = q.record_id AND c.dataset_id = m.dataset_id
           JOIN record_subject s ON s.record_id = q.record_id
           JOIN hold h ON h.subject_id = s.subject_id AND h.released_at IS NULL
           WHERE q.request_id = t.request_id) AS held
FROM request_target t
JOIN model m ON m.model_id = t.model_id
JOIN deletion_request d ON d.request_id = t.request_id
WHERE t.request_id = ANY(%(request_ids)s::uuid[])
ORDER BY t.request_id, t.model_id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """A request as it is taken in; exactly one of `alias` and `record_ids` says whom or what it is about."""

    request_id: UUID
    kind: Kind
    actor: str
    """Prefix of the caller's API key."""
    subject_commitment: bytes
    """Opened by whoever knows the identifier and the pepper, guessed by nobody else."""
    received_at: datetime
    due_at: datetime
    alias: Alias | None = None
    record_ids: Sequence[UUID] = ()
    dataset_id: UUID | None = None
    """The dataset of `record_ids`: only its models are targets."""
    model_ids: Sequence[int] | None = None
    """None: every model whose dataset is deletable."""
    regime: str | None = None
    reference: str | None = None
    key: str | None = None
    """Keyed hash of the Idempotency-Key."""
    body_digest: bytes | None = None


@dataclass(frozen=True, slots=True)
class TargetModel:
    """A model that a request is about."""

    model_id: int
    name: str
    created_at: datetime | None
    """When the request was made; None: its idempotency key was taken, nothing was inserted."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request's row, as far as callers see it."""

    request_id: UUID
    kind: str
    state: str
    outcome: str | None
    regime: str | None
    reference: str | None
    received_at: datetime
    due_at: datetime
    created_at: datetime


@dataclass(frozen=True, slots=True)
class RequestTarget:
    """A request's way through one model."""

    request_id: UUID
    model_id: int
    model: str
    state: str
    outcome: str | None
    version: int | None
    attempts: int
    error: str | None
    deactivated_at: datetime | None
    erased_at: datetime | None
    completed_at: datetime | None
    deferred_until: datetime | None = None
    """Until when a `received` target may wait for its replacement (`rebuild_first`); None: it does not wait."""
    held: bool = False
    """Whether a hold keeps it from erasing."""


@dataclass(frozen=True, slots=True)
class _Claim:
    request_id: UUID
    body_digest: bytes


def receive(connection: Connection, new: NewRequest) -> list[TargetModel] | UUID:
    """Take a request in: its targets; or, where its idempotency key was used before, the id of that request.

    Raises:
        InvalidInputError: the key was used with another body.
        ConflictError: there is no model to delete from.
    """
    values = {
        "request_id": new.request_id,
        "kind": new.kind.value,
        "actor": new.actor,
        "subject_commitment": new.subject_commitment,
        "type": new.alias.type if new.alias else None,
        "digests": new.alias.digests if new.alias else [],
        "record_ids": list(new.record_ids),
        "dataset_id": new.dataset_id,
        "model_ids": None if new.model_ids is None else list(new.model_ids),
        "regime": new.regime,
        "reference": new.reference,
        "received_at": new.received_at,
        "due_at": new.due_at,
        "key": new.key,
        "body_digest": new.body_digest,
    }
    with connection.cursor(row_factory=class_row(TargetModel)) as cursor:
        targets = cursor.execute(RECEIVE, values).fetchall()
    if not targets:
        raise ConflictError("there is no model to delete from: no model is trained on a deletable dataset here")
    if targets[0].created_at:
        return targets
    made = find_claimed(connection, new.actor, new.key, new.body_digest)
    if made is None:
        raise AssertionError("a key that conflicts has a committed row")
    return made


def find_claimed(connection: Connection, actor: str, key: str | None, body_digest: bytes | None) -> UUID | None:
    """The request that an idempotency key made before, whatever has become of its models since.

    Raises:
        InvalidInputError: it made it with another body.
    """
    with connection.cursor(row_factory=class_row(_Claim)) as cursor:
        claim = cursor.execute(FIND_CLAIM, {"actor": actor, "key": key}).fetchone()
    if claim is None:
        return None
    if bytes(claim.body_digest) != body_digest:
        raise InvalidInputError(
            "this Idempotency-Key came with another body before: use a new key for a new request",
            field="Idempotency-Key",
        )
    return claim.request_id


def get_request(connection: Connection, request_id: UUID) -> Request:
    """One request.

    Raises:
        NotFoundError: no such request.
    """
    with connection.cursor(row_factory=class_row(Request)) as cursor:
        found = cursor.execute(GET, {"request_id": request_id}).fetchone()
    if found is None:
        raise NotFoundError("there is no deletion request with that id")
    return found


def list_requests(
    connection: Connection, *, state: State | None, before: tuple[datetime, UUID] | None, limit: int
) -> list[Request]:
    """Requests, newest first, from behind the one that `before` names."""
    moment, request_id = before or (None, None)
    values = {
        "state": state.value if state else None,
        "before": moment,
        "before_id": request_id,
        "limit": limit,
    }
    with connection.cursor(row_factory=class_row(Request)) as cursor:
        return cursor.execute(LIST, values).fetchall()


def list_targets(connection: Connection, request_ids: Sequence[UUID]) -> dict[UUID, list[RequestTarget]]:
    """The targets of each request, by model."""
    found: dict[UUID, list[RequestTarget]] = {request_id: [] for request_id in request_ids}
    with connection.cursor(row_factory=class_row(RequestTarget)) as cursor:
        for target in cursor.execute(LIST_TARGETS, {"request_ids": list(request_ids)}):
            found[target.request_id].append(target)
    return found
