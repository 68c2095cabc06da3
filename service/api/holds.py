"""Holds: place, list, release."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query
from fastapi.responses import JSONResponse

from service.api.auth import DeletionApprover
from service.api.context import Here
from service.api.cursors import make_cursor, open_cursor
from service.api.errors import RESPONSES
from service.api.schemas import NewHold
from service.store import holds, refusals
from service.store.database import retrying, transaction
from service.store.holds import Hold

PAGE = 50

router = APIRouter(prefix="/v1/holds", tags=["holds"], responses=RESPONSES)
HoldId = Annotated[UUID, Path()]


@router.post("", status_code=201)
def place_hold(body: NewHold, here: Here, caller: DeletionApprover) -> JSONResponse:
    """Keep every record that concerns a subject from being erased; it is deactivated all the same.

    Placing the same hold again gives the one that stands. For approvers: the answer says whether anybody is known.
    """
    alias = here.secrets.alias(body.subject.type, body.subject.value)

    def step() -> Hold:
        with transaction(here.pool) as connection:
            return holds.place(connection, alias, actor=caller.prefix, reason_code=body.reason_code)

    view = _view(retrying(step))
    return JSONResponse(view, status_code=201, headers={"Location": view["links"]["self"]})


@router.get("")
def list_holds(
    here: Here,
    _caller: DeletionApprover,
    is_open: Annotated[bool | None, Query(alias="open")] = None,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = PAGE,
) -> dict[str, Any]:
    """Holds, newest first; `next` is the cursor of the following page, null on the last. Never on whom they are."""
    before = None if cursor is None else open_cursor(cursor)
    with transaction(here.pool) as connection:
        found = holds.list_holds(connection, is_open=is_open, before=before, limit=limit + 1)
    page = found[:limit]
    following = make_cursor(page[-1].created_at, page[-1].hold_id) if len(found) > limit else None
    return {"holds": [_view(hold) for hold in page], "next": following}


@router.get("/{hold_id}")
def get_hold(hold_id: HoldId, here: Here, _caller: DeletionApprover) -> dict[str, Any]:
    """One hold, and how many erasures it stops."""
    with transaction(here.pool) as connection:
        return _view(holds.get(connection, hold_id))


@router.post("/{hold_id}/release")
def release_hold(hold_id: HoldId, here: Here, caller: DeletionApprover) -> dict[str, Any]:
    """End a hold; erasures that it alone stopped go on."""

    def step() -> Hold:
        with transaction(here.pool) as connection:
            return holds.release(connection, hold_id, actor=caller.prefix)

    with refusals.recorded(here.pool, "release_hold", actor=caller.prefix):
        return _view(retrying(step))


def _view(hold: Hold) -> dict[str, Any]:
    return {
        "hold_id": str(hold.hold_id),
        "reason_code": hold.reason_code,
        "created_by": hold.created_by,
        "created_at": hold.created_at.isoformat(),
        "released_at": hold.released_at.isoformat() if hold.released_at else None,
        "records": hold.records,
        "waiting": hold.waiting,
        "links": {"self": f"/v1/holds/{hold.hold_id}"},
    }
