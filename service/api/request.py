"""One deletion request: its state, its events, its certificate, another try, and its withdrawal."""

from collections.abc import Callable
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from service.api.auth import Auditor, DeletionApprover, DeletionReader, DeletionWriter
from service.api.context import Context, Here
from service.api.doorbell import Task
from service.api.errors import RESPONSES
from service.api.schemas import NAME_PATTERN, Withdrawal
from service.api.views import read_view
from service.api.waiting import BEFORE, LONGEST, Until
from service.domain.requests import State
from service.reports.certificate import compose
from service.reports.pdf import render
from service.store import certificates, events, lifts, refusals, request_steps, requests
from service.store.api_keys import ApiKey
from service.store.database import retrying, transaction
from service.store.refusals import Attempt
from shards.digest import canonical

router = APIRouter(prefix="/v1/deletion-requests", tags=["deletion requests"], responses=RESPONSES)
RequestId = Annotated[UUID, Path()]
Seconds = Annotated[float, Query(gt=0, le=LONGEST)]
ModelName = Annotated[str | None, Query(pattern=NAME_PATTERN)]


@router.get("/{request_id}")
async def get_request(
    request_id: RequestId, here: Here, caller: DeletionReader, wait: Until | None = None, seconds: Seconds = LONGEST
) -> dict[str, Any]:
    """Where the request stands, per model.

    With `wait` the answer is held until the request is that far, can get no further by itself, or `seconds` are over:
    its `state` says which.
    """

    def read() -> dict[str, Any]:
        with transaction(here.pool) as connection:
            return read_view(connection, request_id, caller)

    if wait is None:
        return await run_in_threadpool(read)
    with here.waiting.hold(request_id, BEFORE[wait], seconds) as held:
        view = await run_in_threadpool(read)
        while view["state"] in held.before and await held.changed():
            view = await run_in_threadpool(read)
    return view


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


@router.get("/{request_id}/certificate", response_class=Response)
def get_certificate(
    request_id: RequestId,
    here: Here,
    _caller: Auditor,
    model: ModelName = None,
    kind: Annotated[Literal["json", "pdf"] | None, Query(alias="format")] = None,
    accept: Annotated[str | None, Header()] = None,
) -> Response:
    """The signed certificate (DSSE) of a completed target, in canonical JSON: its SHA-256 is the certificate's digest.

    For auditors: it says what was touched. As a page for people with `format=pdf`, or where PDF is accepted.
    """
    with transaction(here.pool) as connection:
        requests.get_request(connection, request_id)
        found = certificates.get_certificate(connection, request_id, model)
    if kind == "pdf" or (kind is None and accept is not None and "application/pdf" in accept):
        return Response(render("certificate", compose(found.envelope)), media_type="application/pdf")
    return Response(canonical(found.envelope), media_type="application/vnd.dsse.envelope.v1+json")


@router.get("/{request_id}/certificate/supplements")
def list_supplements(request_id: RequestId, here: Here, _caller: Auditor, model: ModelName = None) -> dict[str, Any]:
    """What became of the certificate's open ends: signed statements (DSSE), each naming the certificate's digest."""
    with transaction(here.pool) as connection:
        requests.get_request(connection, request_id)
        certificate = certificates.get_certificate(connection, request_id, model)
        found = certificates.list_supplements(connection, request_id, certificate.model_id)
    return {
        "request_id": str(request_id),
        "model": certificate.model,
        "certificate": certificate.digest,
        "supplements": [
            {
                "number": each.number,
                "digest": each.digest,
                "issued_at": each.issued_at.isoformat(),
                "envelope": each.envelope,
            }
            for each in found
        ],
    }


@router.post("/{request_id}/retry", status_code=202)
def retry_request(request_id: RequestId, here: Here, caller: DeletionApprover) -> JSONResponse:
    """Put failed targets back to where they were before they failed."""

    def step() -> tuple[dict[str, Any], dict[int, State]]:
        with transaction(here.pool) as connection:
            requests.get_request(connection, request_id)
            resumed = request_steps.retry(connection, request_id, actor=caller.prefix)
            return read_view(connection, request_id, caller), resumed

    with refusals.recorded(here.pool, "retry", actor=caller.prefix, request_id=request_id):
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
    return _withdraw(lifts.lift, "lift", request_id, body, here, caller)


@router.post("/{request_id}/revoke", status_code=202)
def revoke_request(request_id: RequestId, body: Withdrawal, here: Here, caller: DeletionWriter) -> JSONResponse:
    """Take back a request that nothing was done for yet, and an erasure until erasing begins."""
    return _withdraw(lifts.revoke, "revoke", request_id, body, here, caller)


def _withdraw(
    verb: Callable[..., list[int]], attempt: Attempt, request_id: UUID, body: Withdrawal, here: Context, caller: ApiKey
) -> JSONResponse:
    def step() -> tuple[dict[str, Any], list[int]]:
        with transaction(here.pool) as connection:
            changed = verb(connection, request_id, actor=caller.prefix, reason_code=body.reason_code)
            return read_view(connection, request_id, caller), changed

    with refusals.recorded(here.pool, attempt, actor=caller.prefix, request_id=request_id):
        view, changed = retrying(step)
    for model_id in changed:
        here.doorbell.ring(Task.REBUILD, model_id)
    return JSONResponse(view, status_code=202)
