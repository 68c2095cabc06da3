"""One deletion request: its state, its events, its certificate, another try, and its withdrawal."""

from collections.abc import Callable
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse

from service.api.auth import Auditor, DeletionApprover, DeletionReader, DeletionWriter
from service.api.context import Context, Here
from service.api.doorbell import Task
from service.api.errors import RESPONSES
from service.api.schemas import NAME_PATTERN, Withdrawal
from service.api.views import request_view, sees_outcomes
from service.domain.requests import State
from service.store import events, lifts, request_steps, requests
from service.store.api_keys import ApiKey
from service.store.database import retrying, transaction

router = APIRouter(prefix="/v1/deletion-requests", tags=["deletion requests"], responses=RESPONSES)
RequestId = Annotated[UUID, Path()]


@router.get("/{request_id}")
def get_request(request_id: RequestId, here: Here, caller: DeletionReader) -> dict[str, Any]:
    """Where the request stands, per model."""
    with transaction(here.pool) as connection:
        request = requests.get_request(connection, request_id)
        targets = requests.list_targets(connection, [request_id])[request_id]
    return request_view(request, targets, full=sees_outcomes(caller))


@router.get("/{request_id}/events")
def list_events(request_id: RequestId, here: Here, _caller: Auditor) -> dict[str, Any]:
    """Every recorded step, in order. For auditors: the steps show whether anything matched."""
    with transaction(here.pool) as connection:
        requests.get_request(connection, request_id)
        found = events.list_of_request(connection, request_id)
        names = {
            target.model_id: target.model for target in requests.list_targets(connection, [request_id])[request_id]
        }
    shown = [
        {
            "event_id": str(event.event_id),
            "kind": event.kind,
            "model": names.get(event.model_id or 0),
            "body": event.body,
            "created_at": event.created_at.isoformat(),
        }
        for event in found
    ]
    return {"request_id": str(request_id), "events": shown}


@router.get("/{request_id}/certificate")
def get_certificate(
    request_id: RequestId,
    here: Here,
    _caller: Auditor,
    model: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
) -> JSONResponse:
    """The signed certificate (DSSE) of a completed target. For auditors: it says what was touched."""
    with transaction(here.pool) as connection:
        requests.get_request(connection, request_id)
        found = request_steps.get_certificate(connection, request_id, model)
    return JSONResponse(found.envelope, media_type="application/vnd.dsse.envelope.v1+json")


@router.post("/{request_id}/retry", status_code=202)
def retry_request(request_id: RequestId, here: Here, caller: DeletionApprover) -> JSONResponse:
    """Put failed targets back to where they were before they failed."""

    def step() -> tuple[dict[str, Any], dict[int, State]]:
        with transaction(here.pool) as connection:
            requests.get_request(connection, request_id)
            resumed = request_steps.retry(connection, request_id, actor=caller.prefix)
            request = requests.get_request(connection, request_id)
            targets = requests.list_targets(connection, [request_id])[request_id]
            return request_view(request, targets, full=sees_outcomes(caller)), resumed

    view, resumed = retrying(step)
    for model_id, state in resumed.items():
        if state is State.RECEIVED:  # the other states are the loops' and the relay's business
            here.doorbell.ring(Task.PLAN, model_id)
    return JSONResponse(view, status_code=202)


@router.post("/{request_id}/lift", status_code=202)
def lift_request(request_id: RequestId, body: Withdrawal, here: Here, caller: DeletionApprover) -> JSONResponse:
    """End a restriction (kinds `restrict` and `object`): the same records serve again as before it.

    Records that another request is about stay out until that one is withdrawn, too.
    """
    return _withdraw(lifts.lift, request_id, body, here, caller)


@router.post("/{request_id}/revoke", status_code=202)
def revoke_request(request_id: RequestId, body: Withdrawal, here: Here, caller: DeletionWriter) -> JSONResponse:
    """Take back a request that nothing was done for yet, and an erasure until erasing begins."""
    return _withdraw(lifts.revoke, request_id, body, here, caller)


def _withdraw(
    verb: Callable[..., list[int]], request_id: UUID, body: Withdrawal, here: Context, caller: ApiKey
) -> JSONResponse:
    def step() -> tuple[dict[str, Any], list[int]]:
        with transaction(here.pool) as connection:
            changed = verb(connection, request_id, actor=caller.prefix, reason_code=body.reason_code)
            request = requests.get_request(connection, request_id)
            targets = requests.list_targets(connection, [request_id])[request_id]
            return request_view(request, targets, full=sees_outcomes(caller)), changed

    view, changed = retrying(step)
    for model_id in changed:
        here.doorbell.ring(Task.REBUILD, model_id)
    return JSONResponse(view, status_code=202)
