"""`expunge do-not-train`: who is refused at ingestion, without names; and the way back."""

from typing import Annotated, Any

import typer

from service.cli.client import Client
from service.cli.output import STATE, AsJson, StateDir, show, table
from service.cli.request_commands import about

app = typer.Typer(name="do-not-train", help="The list of subjects that are refused at ingestion.")

LIST = "/v1/do-not-train"
HEADER = ("ENTRY", "DATASET", "REQUEST", "SINCE", "UNTIL", "LIFTED")


@app.command("list")
def list_entries(
    *,
    every: Annotated[bool, typer.Option("--all", help="Lifted and past ones, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Entries, newest first. Never on whom they are."""
    params = {"limit": str(limit)} | ({} if every else {"open": "true"})
    with Client.of_state(state) as client:
        found = client.get(LIST, params)
    show(found, table(HEADER, map(_row, found["entries"])), as_json=as_json)


@app.command("lift")
def lift_entries(
    *,
    subject: Annotated[str, typer.Option(help="Who has consented anew: type:value, as email:ann@example.org.")],
    reason: Annotated[str, typer.Option("--reason", help="A code of your own, as new_consent; no name or address.")],
    dataset: Annotated[str | None, typer.Option(help="Into this dataset only.")] = None,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Let a person be ingested again. Records that come back need new ids."""
    body = {**about(subject, None, None, None), "reason_code": reason} | ({"dataset": dataset} if dataset else {})
    with Client.of_state(state) as client:
        found = client.post(f"{LIST}/lift", body)
    show(found, table(HEADER, map(_row, found["entries"])), as_json=as_json)


def _row(found: dict[str, Any]) -> tuple[object, ...]:
    times = [found[name][:19] if found[name] else None for name in ("since", "until", "lifted_at")]
    return (found["entry_id"], found["dataset"], found["request_id"], *times)
