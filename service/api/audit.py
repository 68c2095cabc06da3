"""The ledger over HTTP: events in their order, the log's files (C2SP tlog-tiles), and proofs for one request."""

import base64
import json
import re
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response

from service.api.auth import Auditor
from service.api.context import Here
from service.api.errors import RESPONSES
from service.domain.errors import ConflictError, NotFoundError
from service.evidence.leaves import parse_leaf
from service.evidence.tiles import CHECKPOINT
from service.evidence.tree_head import write_proof
from service.store import ledger, requests
from service.store.database import Connection, transaction
from service.store.ledger import Entry, SignedHead
from service.store.ledger_files import LedgerFiles

router = APIRouter(tags=["audit"], responses=RESPONSES)

TILE = re.compile(
    r"(entries|[0-9]|[1-5][0-9]|6[0-3])/(x[0-9]{3}/)*[0-9]{3}(\.p/([1-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5]))?"
)
LOG = "/v1/audit/log"


@router.get("/v1/audit/events")
def list_audit_events(
    here: Here,
    _caller: Auditor,
    start: Annotated[int, Query(ge=0, le=2**62, description="The first index.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    """What happened, in the order of the ledger. `next` is the `start` that continues, also for what is still to come.

    After its retention an event shows its kind and time alone: `opening` is null.
    """
    with transaction(here.pool) as connection:
        entries = ledger.list_opened(connection, start, limit=limit)
    return {"events": [_shown(entry) for entry in entries], "next": start + len(entries)}


@router.get(f"{LOG}/checkpoint", response_class=Response)
def get_checkpoint(here: Here, _caller: Auditor) -> Response:
    """The newest signed tree head whose tiles are there (C2SP tlog-checkpoint)."""
    found = LedgerFiles(here.artifacts).read(CHECKPOINT)
    if found is None:
        raise NotFoundError("nothing is in the ledger yet, or the loops do not run: try again in a second")
    return Response(found, media_type="text/plain; charset=utf-8")


@router.get(f"{LOG}/tile/{{tile:path}}", response_class=Response)
def get_tile(tile: Annotated[str, Path(max_length=100)], here: Here, _caller: Auditor) -> Response:
    """A tile of hashes, `L/N`, or a bundle of entries, `entries/N`, partial ones with `.p/W` (C2SP tlog-tiles)."""
    found = LedgerFiles(here.artifacts).read(f"tile/{tile}") if TILE.fullmatch(tile) else None
    if found is None:
        raise NotFoundError("there is no such tile; a partial one goes when the full one is there")
    return Response(found, media_type="application/octet-stream")


@router.get("/v1/deletion-requests/{request_id}/inclusion-proof")
def get_inclusion_proof(request_id: UUID, here: Here, _caller: Auditor) -> dict[str, Any]:
    """Every event of the request with its leaf, what opens it, and its proof (C2SP tlog-proof) under one tree head.

    It is checked without us: `expunge ledger proof FILE --key signing.pub`.
    """
    with transaction(here.pool) as connection:
        requests.get_request(connection, request_id)
        waiting = ledger.count_waiting_of_request(connection, request_id)  # before the leaves: none is missed between
        entries = ledger.list_of_request(connection, request_id)
        head = ledger.find_tree_head(connection)
        if not waiting and not entries:
            raise NotFoundError(
                "the request's events were erased when their retention ended; the ledger keeps kinds and times"
            )
        if waiting or head is None or entries[-1].index >= head.size:
            raise ConflictError("the newest events are not under a signed tree head yet: try again in a second")
        return prove(connection, request_id, entries, head)


def prove(connection: Connection, request_id: UUID, entries: list[Entry], head: SignedHead) -> dict[str, Any]:
    """Proofs of a request's leaves, all of them below `head.size`."""
    tree = ledger.tree(connection, head.size)
    return {
        "type": "expunge inclusion proof v1",
        "request_id": str(request_id),
        "checkpoint": head.note,
        "entries": [
            {
                "index": entry.index,
                "leaf": bytes(entry.leaf).decode(),
                "opening": bytes(entry.opening).decode() if entry.opening is not None else None,
                "proof": write_proof(entry.index, tree.inclusion(entry.index), head.note),
            }
            for entry in entries
        ],
    }


def _shown(entry: Entry) -> dict[str, Any]:
    leaf = parse_leaf(bytes(entry.leaf))
    opened: dict[str, Any] = json.loads(entry.opening) if entry.opening is not None else {}
    return {
        "index": leaf.index,
        "event_id": leaf.event_id,
        "kind": leaf.kind,
        "time": leaf.time,
        "request_id": opened.get("request_id"),
        "model_id": opened.get("model_id"),
        "body": opened.get("body"),
        "leaf": base64.b64encode(entry.leaf).decode(),
        "opening": base64.b64encode(entry.opening).decode() if entry.opening is not None else None,
    }
