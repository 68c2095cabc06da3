"""`expunge lift`, `revoke`, `hold`, `holds`, `release`: what keeps a deletion from its usual end."""

from typing import Annotated, Any

import typer

from service.cli.client import Client
from service.cli.output import STATE, AsJson, StateDir, show, table
from service.cli.request_commands import REQUESTS, about, segment, summary

HOLDS = "/v1/holds"
HEADER = ("HOLD", "REASON", "RECORDS", "STOPS", "PLACED", "RELEASED")

Reason = Annotated[str, typer.Option("--reason", help="A code of your own, as litigation; no name or address.")]
RequestId = Annotated[str, typer.Argument(help="The request's id.")]


def lift(request_id: RequestId, *, reason: Reason, state: StateDir = STATE, as_json: AsJson = False) -> None:
    """End a restriction or an objection: the same records serve as before it."""
    with Client.of_state(state) as client:
        found = client.post(f"{REQUESTS}/{segment(request_id)}/lift", {"reason_code": reason})
    show(found, summary(found), as_json=as_json)


def revoke(request_id: RequestId, *, reason: Reason, state: StateDir = STATE, as_json: AsJson = False) -> None:
    """Take a request back, an erasure until erasing begins."""
    with Client.of_state(state) as client:
        found = client.post(f"{REQUESTS}/{segment(request_id)}/revoke", {"reason_code": reason})
    show(found, summary(found), as_json=as_json)


def hold(
    *,
    subject: Annotated[str, typer.Option(help="Whose records: type:value, as email:ann@example.org.")],
    reason: Reason,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Keep every record that concerns a person from being erased."""
    with Client.of_state(state) as client:
        found = client.post(HOLDS, {**about(subject, None, None, None), "reason_code": reason})
    show(found, table(HEADER, [_row(found)]), as_json=as_json)


def holds(
    *,
    every: Annotated[bool, typer.Option("--all", help="Released ones, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Holds that stand, newest first."""
    with Client.of_state(state) as client:
        page = client.get(HOLDS, {"limit": str(limit), **({} if every else {"open": "true"})})
    show(page, table(HEADER, [_row(each) for each in page["holds"]]), as_json=as_json)


def release(
    hold_id: Annotated[str, typer.Argument(help="The hold's id.")],
    *,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """End a hold; what it alone kept from erasure is erased."""
    with Client.of_state(state) as client:
        found = client.post(f"{HOLDS}/{segment(hold_id)}/release")
    show(found, table(HEADER, [_row(found)]), as_json=as_json)


def _row(found: dict[str, Any]) -> tuple[object, ...]:
    placed, released = found["created_at"][:19], found["released_at"]
    return (
        found["hold_id"],
        found["reason_code"],
        found["records"],
        found["waiting"],
        placed,
        released[:19] if released else None,
    )
