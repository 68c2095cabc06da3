"""`expunge dataset`: declare, upload, list."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from service.cli.client import Client
from service.cli.output import STATE, AsJson, CommandError, StateDir, show, table

CHUNK = 2**18

app = typer.Typer(help="Datasets: records in cells.", no_args_is_help=True)


@app.command()
def create(
    name: str,
    *,
    classes: Annotated[list[str] | None, typer.Option("--class", help="A label; give each one.")] = None,
    task: Annotated[str, typer.Option(help="classification, regression or completion.")] = "classification",
    input_kind: Annotated[str, typer.Option("--input", help="text, image or vector.")] = "text",
    width: Annotated[int | None, typer.Option(help="Numbers in each vector.")] = None,
    shards: Annotated[int, typer.Option(help="Parts that are trained apart.")] = 4,
    slices: Annotated[int, typer.Option(help="Steps in which a shard is trained.")] = 3,
    subject_row_cap: Annotated[int, typer.Option(help="Most records that one subject may own.")] = 1000,
    priors: Annotated[
        list[str] | None,
        typer.Option("--prior", help="A class of subjects, as name:slices or name:slices:expires; give each one."),
    ] = None,
    evaluation: Annotated[bool, typer.Option(help="An evaluation set: declared not deletable.")] = False,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Declare a dataset; nothing of it can change later."""
    body = {
        "name": name,
        "classes": classes or [],
        "task": task,
        "input": input_kind,
        "width": width,
        "shards": shards,
        "slices": slices,
        "subject_row_cap": subject_row_cap,
        "deletable": not evaluation,
        "priors": [_prior(each) for each in priors or ()],
    }
    with Client.of_state(state) as client:
        made = client.post("/v1/datasets", body)
    show(made, [f"dataset {name}: {shards} shards of {slices} slices"], as_json=as_json)


def _prior(option: str) -> dict[str, Any]:
    name, *rest = option.split(":")
    if not name or len(rest) not in {1, 2} or not rest[0].isdecimal() or rest[1:] not in ([], ["expires"]):
        raise CommandError("--prior must be name:slices or name:slices:expires, such as customers:3")
    return {"name": name, "slices": int(rest[0]), "expires": len(rest) == 2}


@app.command()
def ingest(
    name: str,
    file: Annotated[Path, typer.Argument(help="NDJSON, one record a line.")],
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Upload records, as a whole or not at all."""
    try:
        size = file.stat().st_size
        source = file.open("rb")
    except OSError as error:
        raise CommandError(f"{file} cannot be read ({error.strerror})") from None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with source, Client.of_state(state) as client, Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("upload", total=size)

        def chunks() -> Iterator[bytes]:
            while chunk := source.read(CHUNK):
                yield chunk
                bar.advance(task, len(chunk))
            bar.update(task, description="storing")

        done = client.send(f"/v1/datasets/{name}/records", chunks(), size)
    lines = [f"{done['accepted']} records of {done['subjects']} subjects in {done['cells']} cells"]
    if done["skipped"]:
        lines.append(f"{done['skipped']} lines skipped: their subjects are on the do-not-train list")
    show(done, lines, as_json=as_json)


@app.command("list")
def list_(state: StateDir = STATE, as_json: AsJson = False) -> None:
    """All datasets."""
    with Client.of_state(state) as client:
        found = client.get("/v1/datasets")
    rows = [
        (each["name"], each["rows"], each["shards"], each["slices"], "yes" if each["deletable"] else "no")
        for each in found["datasets"]
    ]
    show(found, table(("DATASET", "RECORDS", "SHARDS", "SLICES", "DELETABLE"), rows), as_json=as_json)
