"""`expunge export`: requests, targets and events as files, the evidence about them, and the compliance report."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.client import Client
from service.cli.output import STATE, AsJson, StateDir, show
from service.cli.request_commands import segment
from service.domain.audit_exports import Format, What

SUFFIX = {"jsonl": "jsonl", "csv": "csv", "parquet": "parquet", "bundle": "zip", "pdf": "pdf"}


def export(
    *,
    form: Annotated[
        Format, typer.Option("--format", help="jsonl, csv, parquet; bundle: evidence as a zip; pdf: compliance report.")
    ] = Format.JSONL,
    what: Annotated[What | None, typer.Option(help="Which table of jsonl, csv, parquet.")] = None,
    since: Annotated[
        str | None, typer.Option("--from", help="Received from this day (UTC) or time with zone on.")
    ] = None,
    until: Annotated[str | None, typer.Option("--to", help="Received before this day (UTC) or time with zone.")] = None,
    request: Annotated[str | None, typer.Option(help="One request instead of a range.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; one here is replaced.")] = None,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Write what an auditor asks for into a file. No identifier and no text of a caller's is in it."""
    chosen = {
        "format": form.value,
        "what": what.value if what else None,
        "from": since,
        "to": until,
        "request": segment(request) if request else None,
    }
    default = "evidence" if form is Format.BUNDLE else "report" if form is Format.PDF else (what or What.REQUESTS).value
    target = output or Path(f"expunge-{default}.{SUFFIX[form]}")
    with Client.of_state(state) as client:
        saved = client.save("/v1/audit/export", {name: value for name, value in chosen.items() if value}, target)
    empty = "X-Expunge-Empty" in saved.headers
    found = {
        "written": str(target),
        "bytes": saved.size,
        "sha256": saved.digest,
        "export": saved.headers["X-Expunge-Export"],
        "empty": empty,
    }
    lines = [
        f"written to {target}: {saved.size:,} bytes, SHA-256 {saved.digest}",
        f"export {found['export']} is in the ledger with that digest",
    ]
    show(found, [*lines, "nothing is in that range"] if empty else lines, as_json=as_json)
