"""How requests are shown. Whether anything matched is for auditors and approvers alone."""

from datetime import datetime
from typing import Any
from uuid import UUID

from service.store import requests
from service.store.api_keys import ApiKey, Scope
from service.store.database import Connection
from service.store.requests import Request, RequestTarget


def sees_outcomes(caller: ApiKey) -> bool:
    """Whether the caller may learn if a subject was known, and what was touched."""
    return bool(caller.scopes & {Scope.AUDIT_READ, Scope.DELETION_APPROVE})


def read_view(connection: Connection, request_id: UUID, caller: ApiKey) -> dict[str, Any]:
    """A stored request, as its caller may see it.

    Raises:
        NotFoundError: there is none.
    """
    request = requests.get_request(connection, request_id)
    targets = requests.list_targets(connection, [request_id])[request_id]
    return request_view(request, targets, full=sees_outcomes(caller))


def request_view(request: Request, targets: list[RequestTarget], *, full: bool) -> dict[str, Any]:
    """A request as JSON. Unless `full`, a completed request says neither how it ended nor what it touched.

    Its states are shown to everybody: applications wait for `deactivated`. So whoever watches a request closely can
    tell from the time it takes whether there was anything to do.
    """
    path = f"/v1/deletion-requests/{request.request_id}"
    return {
        "request_id": str(request.request_id),
        "kind": request.kind,
        "state": request.state,
        "outcome": request.outcome if full else None,
        "regime": request.regime,
        "reference": request.reference,
        "received_at": request.received_at.isoformat(),
        "due_at": request.due_at.isoformat(),
        "created_at": request.created_at.isoformat(),
        "targets": [_target_view(target, full=full) for target in targets],
        "links": {"self": path, "events": f"{path}/events", "certificate": f"{path}/certificate"},
    }


def _target_view(target: RequestTarget, *, full: bool) -> dict[str, Any]:
    hidden: dict[str, Any] = {
        "version": target.version,
        "outcome": target.outcome,
        "deactivated_at": _moment(target.deactivated_at),
        "erased_at": _moment(target.erased_at),
        "attempts": target.attempts,
        "error": target.error,
        "deferred_until": _moment(target.deferred_until),
        "held": target.held,
    }
    return {
        "model": target.model,
        "state": target.state,
        **(hidden if full else dict.fromkeys(hidden)),
        "completed_at": _moment(target.completed_at),
    }


def _moment(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
