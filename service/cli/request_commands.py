"""`expunge delete`, `preview`, `requests`, `certificate`: a deletion from asking to its paper."""

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer

from service.cli.client import Client
from service.cli.output import STATE, AsJson, CommandError, StateDir, show, table
from shards.digest import canonical

REQUESTS = "/v1/deletion-requests"
PASSED = {
    "deactivated": frozenset({"deactivated", "erasing", "completed"}),
    "completed": frozenset({"completed"}),
}
HELD_SECONDS = 4.0
"""How long the API holds an answer at most."""
DEAD = frozenset({"failed", "rejected", "revoked", "expired", "duplicate", "lifted"})
"""Where a request gets no further by itself: the API answers at once, so asking on would never pause."""

SubjectOption = Annotated[str | None, typer.Option(help="Whose records: type:value, as email:ann@example.org.")]
RecordOption = Annotated[list[str] | None, typer.Option("--record", help="A record by your own id.")]
DatasetOption = Annotated[str | None, typer.Option(help="The dataset of --record.")]
ModelOption = Annotated[list[str] | None, typer.Option("--model", help="Default: all models concerned.")]


class Until(StrEnum):
    """What `delete` may wait for."""

    DEACTIVATED = "deactivated"
    COMPLETED = "completed"


def delete(
    *,
    subject: SubjectOption = None,
    record: RecordOption = None,
    dataset: DatasetOption = None,
    model: ModelOption = None,
    kind: Annotated[
        str | None, typer.Option(help="erase (the default); restrict or object take out of service and erase nothing.")
    ] = None,
    regime: Annotated[str | None, typer.Option(help="gdpr, ccpa or voluntary: sets the due date.")] = None,
    reference: Annotated[str | None, typer.Option(help="Your ticket number; no name or address.")] = None,
    key: Annotated[str | None, typer.Option(help="Idempotency key: the same one never asks twice.")] = None,
    wait: Annotated[Until | None, typer.Option(help="Wait until the request is that far.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait at most.")] = 600.0,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Ask for a deletion, a restriction, or the weighing of an objection."""
    body = about(subject, record, dataset, model)
    named = (("kind", kind), ("regime", regime), ("reference", reference))
    body |= {name: value for name, value in named if value}
    with Client.of_state(state) as client:
        # A key of our own makes the call safe to repeat by whatever lies between.
        request = client.post(REQUESTS, body, {"Idempotency-Key": key or str(uuid4())})
        if wait is not None:
            request = _wait(client, request, wait, timeout)
    show(request, summary(request), as_json=as_json)


def preview(
    *,
    subject: SubjectOption = None,
    record: RecordOption = None,
    dataset: DatasetOption = None,
    model: ModelOption = None,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """What a deletion would touch and cost; changes nothing."""
    with Client.of_state(state) as client:
        found = client.post(f"{REQUESTS}:preview", about(subject, record, dataset, model))
    lines: list[str] = []
    for each in found["models"]:
        lines.append(f"model {each['model']}")
        lines.extend(f"  {name}: {_plain(value)}" for name, value in each.items() if name not in {"model", "policies"})
        lines.extend(f"  rebuild {kind}: {_work(planned)}" for kind, planned in each["policies"].items())
    show(found, lines or ["no model is concerned"], as_json=as_json)


def requests(
    request_id: Annotated[str | None, typer.Argument(help="One request; without it, the newest.")] = None,
    in_state: Annotated[str | None, typer.Option("--in", help="Only requests in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Requests and where they stand."""
    with Client.of_state(state) as client:
        if request_id is not None:
            found = client.get(f"{REQUESTS}/{segment(request_id)}")
            show(found, summary(found), as_json=as_json)
            return
        query = {"limit": str(limit), **({"state": in_state} if in_state else {})}
        page = client.get(REQUESTS, query)
    rows = [
        (each["request_id"], each["state"], each["outcome"], each["received_at"][:19], each["due_at"][:10])
        for each in page["requests"]
    ]
    show(page, table(("REQUEST", "STATE", "OUTCOME", "RECEIVED", "DUE"), rows), as_json=as_json)


def certificate(
    request_id: str,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write it to.")] = None,
    model: Annotated[str | None, typer.Option(help="Which model's, where there are several.")] = None,
    pdf: Annotated[
        Path | None, typer.Option(help="PDF to write it to: one page to read, with the signed file inside.")
    ] = None,
    supplements: Annotated[Path | None, typer.Option(help="File to write its supplements to.")] = None,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """The signed deletion certificate; `expunge verify` checks it offline."""
    with Client.of_state(state) as client:
        path = f"{REQUESTS}/{segment(request_id)}/certificate"
        chosen = {"model": model} if model else {}
        if pdf is not None:
            client.save(path, {**chosen, "format": "pdf"}, pdf)
            if output is None:
                show({"written": str(pdf)}, [f"written to {pdf}"], as_json=as_json)
                return
        envelope = client.get(path, chosen)
        if supplements is not None:
            _write(supplements, client.get(f"{path}/supplements", chosen))
    if output is None:
        show(envelope, [json.dumps(envelope, indent=1)], as_json=as_json)
        return
    _write(output, envelope)
    show({"written": str(output)}, [f"written to {output}"], as_json=as_json)


def _write(path: Path, value: Any) -> None:
    """In canonical JSON: SHA-256 of a certificate's file is its digest."""
    try:
        path.write_bytes(canonical(value))
    except OSError as error:
        raise CommandError(f"{path} cannot be written ({error.strerror})") from None


def about(
    subject: str | None, record: list[str] | None, dataset: str | None, model: list[str] | None
) -> dict[str, Any]:
    """Whom or what the options name, as the API takes it.

    Raises:
        CommandError: neither or both are named, or half of one.
    """
    if (subject is None) == (not record):
        raise CommandError("say whose data with --subject type:value, or which records with --record")
    body: dict[str, Any] = {"models": model} if model else {}
    if subject is not None:
        kind, colon, value = subject.partition(":")
        if not colon or not value:
            raise CommandError("--subject is written type:value, as email:ann@example.org")
        return {**body, "subject": {"type": kind, "value": value}}
    if dataset is None:
        raise CommandError("--record needs --dataset, whose ids they are")
    return {**body, "record_ids": record, "dataset": dataset}


def _wait(client: Client, request: dict[str, Any], until: Until, timeout: float) -> dict[str, Any]:
    end = time.monotonic() + timeout
    while request["state"] not in PASSED[until.value]:
        if request["state"] in DEAD:
            raise CommandError(
                f"request {request['request_id']} is {request['state']}: see `expunge requests"
                f" {request['request_id']}` and the workers' logs"
            )
        left = end - time.monotonic()
        if left <= 0:
            raise CommandError(
                f"request {request['request_id']} is still {request['state']} after {timeout:.0f} s; it goes on"
            )
        held = {"wait": until.value, "seconds": str(min(left, HELD_SECONDS))}
        request = client.get(request["links"]["self"], held)
    return request


def summary(request: dict[str, Any]) -> list[str]:
    """A request for people: one line, and its targets as a table."""
    outcome = f" ({request['outcome']})" if request["outcome"] else ""
    head = f"request {request['request_id']}: {request['state']}{outcome}, due {request['due_at'][:10]}"
    rows = [
        (each["model"], each["state"], each["version"], each["deactivated_at"], each["completed_at"], each["error"])
        for each in request["targets"]
    ]
    return [head, *table(("MODEL", "STATE", "VERSION", "DEACTIVATED", "COMPLETED", "ERROR"), rows)]


def _work(planned: dict[str, Any]) -> str:
    if not planned["stages"]:
        return "nothing to train"
    begin = f"from {planned['start'][:16]}" if planned["start"] else "at once"
    return f"{planned['stages']} stages, about {planned['seconds']:.0f} s, {begin}"


def _plain(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return " ".join("(" + ", ".join(str(part) for part in each.values()) + ")" for each in value)
    if isinstance(value, list):
        return "/".join(str(each) for each in value) or "-"
    return "-" if value is None else str(value)


def segment(text: str) -> str:
    """A path segment; anything but an id would be another path.

    Raises:
        CommandError: it is no id.
    """
    if not text or not all(char in "0123456789abcdef-" for char in text):
        raise CommandError("an id looks like 01234567-89ab-cdef-0123-456789abcdef")
    return text
