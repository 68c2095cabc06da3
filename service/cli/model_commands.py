"""`expunge model`: declare, train, show, predict."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from service.cli.client import Client
from service.cli.output import STATE, AsJson, CommandError, StateDir, show, table

POLL_SECONDS = 0.2
MARKS = {"served": "#", "running": ">", "queued": "~", "inactive": "."}

app = typer.Typer(help="Models: shards trained apart, served together.", no_args_is_help=True)


@app.command()
def create(
    name: str,
    *,
    dataset: Annotated[str, typer.Option(help="The dataset to train on.")],
    recipe: Annotated[Path, typer.Option(help="Recipe file (JSON).")],
    evaluation: Annotated[str | None, typer.Option(help="Evaluation dataset.")] = None,
    erase_after: Annotated[int, typer.Option(help="Seconds before a deletion destroys anything.")] = 0,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Declare a model; `expunge model train` trains it."""
    try:
        content = json.loads(recipe.read_text())
    except OSError as error:
        raise CommandError(f"{recipe} cannot be read ({error.strerror})") from None
    except ValueError:
        raise CommandError(f"{recipe} is not valid JSON") from None
    body = {
        "name": name,
        "dataset": dataset,
        "recipe": content,
        "evaluation_dataset": evaluation,
        "erase_after_seconds": erase_after,
    }
    with Client.of_state(state) as client:
        made = client.post("/v1/models", body)
    lines = [f"model {name}, recipe {made['recipe_digest'][:16]}", f"train it with: expunge model train {name}"]
    show(made, lines, as_json=as_json)


@app.command()
def train(
    name: str,
    wait: Annotated[bool, typer.Option(help="Wait until the stages are trained and served.")] = True,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Train the stages that are missing on today's records (rebuild)."""
    with Client.of_state(state) as client:
        before = client.get(f"/v1/models/{name}")
        client.post(f"/v1/models/{name}/rebuild")
        after = _wait(client, name, before) if wait else client.get(f"/v1/models/{name}")
    show(after, [_summary(after)], as_json=as_json)


def _wait(client: Client, name: str, before: dict[str, Any]) -> dict[str, Any]:
    """Follow the jobs until nothing is left to train and the result is served."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("stages"), TimeElapsedColumn())
    ended = before["jobs"].get("done", 0)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        while True:
            now = client.get(f"/v1/models/{name}")
            jobs = now["jobs"]
            done = jobs.get("done", 0) - ended
            left = jobs.get("queued", 0) + jobs.get("running", 0)
            bar.update(task, completed=done, total=(done + left) or None)
            if not left and not now["building"]:
                break
            time.sleep(POLL_SECONDS)
    if jobs.get("failed", 0) or not now["version"]:
        raise CommandError(f"stages of {name} failed to train: the log of the train worker says why")
    return now


@app.command("show")
def show_(name: str, state: StateDir = STATE, as_json: AsJson = False) -> None:
    """A model's version and its grid of shards and slices."""
    with Client.of_state(state) as client:
        model = client.get(f"/v1/models/{name}")
        grid = client.get(f"/v1/models/{name}/shards")
    rows = [
        (
            shard["shard"],
            "".join(MARKS[each["state"]] for each in shard["slices"]),
            f"{shard['depth']}/{grid['slices']}",
            sum(each["rows"] for each in shard["slices"]),
        )
        for shard in grid["shards"]
    ]
    lines = [_summary(model), *table(("SHARD", "SLICES", "DEPTH", "RECORDS"), rows)]
    lines.append("  ".join(f"{mark} {state_}" for state_, mark in MARKS.items()))
    show({**model, "grid": grid["shards"]}, lines, as_json=as_json)


@app.command()
def predict(
    name: str,
    texts: Annotated[list[str], typer.Argument(help="Inputs.")],
    server: Annotated[str | None, typer.Option(help="URL of a model server.")] = None,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Ask a model server."""
    with Client.of_server(state, server) as client:
        answer = client.post(f"/v1/models/{name}/predict", {"inputs": texts})
    rows = [
        (output["label"], f"{output['probabilities'][output['label']]:.3f}", text)
        for output, text in zip(answer["outputs"], texts, strict=True)
    ]
    show(answer, table(("LABEL", "P", "TEXT"), rows), as_json=as_json)


def _summary(model: dict[str, Any]) -> str:
    depth = "/".join(str(depth) for depth in model["depths"])
    return (
        f"model {model['name']}: version {model['version']} (floor {model['floor']}, cleared {model['cleared']}),"
        f" depths {depth} of {model['slices']}"
    )
