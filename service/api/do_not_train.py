"""The do-not-train list: look at it, and let somebody back who has consented anew."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from service.api.auth import DeletionApprover
from service.api.context import Here
from service.api.cursors import make_cursor, open_cursor
from service.api.errors import RESPONSES
from service.api.schemas import NewConsent
from service.store import datasets, do_not_train, refusals
from service.store.database import retrying, transaction
from service.store.do_not_train import Entry

PAGE = 50

router = APIRouter(prefix="/v1/do-not-train", tags=["do-not-train list"], responses=RESPONSES)


@router.get("")
def list_entries(
    here: Here,
    _caller: DeletionApprover,
    is_open: Annotated[bool | None, Query(alias="open")] = None,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = PAGE,
) -> dict[str, Any]:
    """Entries, newest first; `next` is the cursor of the following page, null on the last. Never on whom they are."""
    before = None if cursor is None else open_cursor(cursor)
    with transaction(here.pool) as connection:
        found = do_not_train.list_entries(connection, is_open=is_open, before=before, limit=limit + 1)
    page = found[:limit]
    following = make_cursor(page[-1].since, page[-1].entry_id) if len(found) > limit else None
    return {"entries": [_view(entry) for entry in page], "next": following}


@router.post("/lift")
def lift_entries(body: NewConsent, here: Here, caller: DeletionApprover) -> dict[str, Any]:
    """Let a subject be ingested again: into one dataset, or into all. Erased records never come back under their id."""
    alias = here.secrets.alias(body.subject.type, body.subject.value)

    def step() -> list[Entry]:
        with transaction(here.pool) as connection:
            dataset = datasets.get_dataset(connection, body.dataset) if body.dataset else None
            return do_not_train.lift(
                connection,
                alias,
                dataset.dataset_id if dataset else None,
                actor=caller.prefix,
                reason_code=body.reason_code,
            )

    with refusals.recorded(here.pool, "lift_do_not_train", actor=caller.prefix):
        return {"entries": [_view(entry) for entry in retrying(step)]}


def _view(entry: Entry) -> dict[str, Any]:
    return {
        "entry_id": str(entry.entry_id),
        "dataset": entry.dataset,
        "request_id": str(entry.request_id),
        "since": entry.since.isoformat(),
        "until": entry.until.isoformat() if entry.until else None,
        "lifted_at": entry.lifted_at.isoformat() if entry.lifted_at else None,
    }
