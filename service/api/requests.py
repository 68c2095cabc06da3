"""Deletion requests: receive, preview, list."""

from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse

from service.api.auth import Auditor, DeletionReader, DeletionWriter
from service.api.context import Context, Here
from service.api.cursors import make_cursor, open_cursor
from service.api.doorbell import Task
from service.api.errors import RESPONSES
from service.api.schemas import About, NewRequest
from service.api.views import read_view, request_view, sees_outcomes
from service.domain.deadlines import due_at
from service.domain.errors import InvalidInputError
from service.domain.requests import State
from service.store import datasets, request_steps, requests
from service.store.api_keys import ApiKey
from service.store.database import Connection, retrying, transaction
from service.store.requests import RequestTarget
from shards.digest import canonical, keyed
from shards.partition import dataset_key, record_id_of

PAGE = 50

router = APIRouter(tags=["deletion requests"], responses=RESPONSES)
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


@router.post("/v1/deletion-requests", status_code=202)
def receive_request(body: NewRequest, here: Here, caller: DeletionWriter, key: Key = None) -> JSONResponse:
    """Take a deletion request in: durable with the answer, deactivated tens of milliseconds later.

    An unknown subject is answered in the same way. With an `Idempotency-Key` the same body gives the same request
    again, another body is refused.
    """
    request_id = uuid4()

    def step() -> tuple[dict[str, Any], list[int]]:
        claim, digest = _claim(here, body, key)
        with transaction(here.pool) as connection:
            if claim and (made := requests.find_claimed(connection, caller.prefix, claim, digest)):
                return read_view(connection, made, caller), []
            new = _new_request(connection, here, caller, body, request_id=request_id, claim=claim, digest=digest)
            received = requests.receive(connection, new)
            if isinstance(received, UUID):
                return read_view(connection, received, caller), []
        return _received_view(new, received, caller), [target.model_id for target in received]

    view, ring = retrying(step)
    for model_id in ring:
        here.doorbell.ring(Task.PLAN, model_id)
    return JSONResponse(view, status_code=202, headers={"Location": view["links"]["self"]})


@router.post("/v1/deletion-requests:preview")
def preview_request(body: About, here: Here, _caller: Auditor) -> dict[str, Any]:
    """What a deletion would touch and cost, and accuracy before and after where it was measured; changes nothing."""
    # Deferred: it loads pyarrow, which no other call of this module needs.
    from service.store.preview import Draft, preview  # noqa: PLC0415

    drafts: list[Draft] = []
    with transaction(here.pool) as connection:
        dataset_id, external = _named_records(connection, here, body)
        for model in request_steps.list_deletable(connection, body.models):
            if body.subject is not None:
                alias = here.secrets.alias(body.subject.type, body.subject.value)
                record_ids = request_steps.list_records_of(connection, model.dataset_id, alias)
            elif model.dataset_id == dataset_id:
                record_ids = external
            else:
                continue
            drafts.append(preview(connection, model, record_ids))
    return {"models": [draft.measured(here.artifacts).to_json() for draft in drafts]}


@router.get("/v1/deletion-requests")
def list_requests(
    here: Here,
    caller: DeletionReader,
    state: State | None = None,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = PAGE,
) -> dict[str, Any]:
    """Requests, newest first; `next` is the cursor of the following page, null on the last."""
    before = None if cursor is None else open_cursor(cursor)
    with transaction(here.pool) as connection:
        found = requests.list_requests(connection, state=state, before=before, limit=limit + 1)
        page = found[:limit]
        targets = requests.list_targets(connection, [request.request_id for request in page])
    following = make_cursor(page[-1].created_at, page[-1].request_id) if len(found) > limit else None
    views = [request_view(each, targets[each.request_id], full=sees_outcomes(caller)) for each in page]
    return {"requests": views, "next": following}


def _new_request(
    connection: Connection,
    here: Context,
    caller: ApiKey,
    body: NewRequest,
    *,
    request_id: UUID,
    claim: str | None,
    digest: bytes | None,
) -> requests.NewRequest:
    pepper = here.secrets.pepper
    received_at = body.received_at or datetime.now(UTC)
    dataset_id, record_ids = _named_records(connection, here, body)
    return requests.NewRequest(
        request_id=request_id,
        kind=body.kind,
        actor=caller.prefix,
        subject_commitment=keyed(pepper, b"request", request_id.bytes, *body.commitment_parts()),
        received_at=received_at,
        due_at=due_at(received_at, body.regime),
        alias=here.secrets.alias(body.subject.type, body.subject.value) if body.subject else None,
        record_ids=record_ids,
        dataset_id=dataset_id,
        model_ids=None if body.models is None else request_steps.get_model_ids(connection, body.models),
        regime=body.regime.value if body.regime else None,
        reference=body.reference,
        key=claim,
        body_digest=digest,
    )


def _claim(here: Context, body: NewRequest, key: str | None) -> tuple[str | None, bytes | None]:
    """What is kept of an idempotency key and its body.

    Both keyed: callers put identifiers into keys, and a bare digest of a short body can be guessed.
    """
    if key is None:
        return None, None
    pepper = here.secrets.pepper
    text = canonical(body.model_dump(mode="json", exclude_unset=True))
    return keyed(pepper, b"idempotency key", key.encode()).hex(), keyed(pepper, b"idempotency body", text)


def _named_records(connection: Connection, here: Context, body: About) -> tuple[UUID | None, list[UUID]]:
    """The dataset and our ids of the records that the body names; (None, none) where it names a subject."""
    if body.record_ids is None or body.dataset is None:
        return None, []
    dataset = datasets.find_dataset(connection, body.dataset)
    if dataset is None:
        raise InvalidInputError("there is no dataset of that name", field="dataset")
    if not dataset.deletable:
        raise InvalidInputError("the dataset is declared not deletable", field="dataset")
    key = dataset_key(here.secrets.partition, dataset.dataset_id)
    return dataset.dataset_id, sorted({record_id_of(key, each) for each in body.record_ids})


def _fresh_target(request_id: UUID, target: requests.TargetModel) -> RequestTarget:
    return RequestTarget(
        request_id=request_id,
        model_id=target.model_id,
        model=target.name,
        state=State.RECEIVED.value,
        outcome=None,
        version=None,
        attempts=0,
        error=None,
        deactivated_at=None,
        erased_at=None,
        completed_at=None,
    )


def _received_view(new: requests.NewRequest, received: list[requests.TargetModel], caller: ApiKey) -> dict[str, Any]:
    request = requests.Request(
        request_id=new.request_id,
        kind=new.kind.value,
        state=State.RECEIVED.value,
        outcome=None,
        regime=new.regime,
        reference=new.reference,
        received_at=new.received_at,
        due_at=new.due_at,
        created_at=received[0].created_at or new.received_at,
    )
    targets = [_fresh_target(new.request_id, target) for target in received]
    return request_view(request, targets, full=sees_outcomes(caller))
