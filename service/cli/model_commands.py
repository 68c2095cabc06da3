"""`expunge model`: declare, train, show, predict."""

import io
import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from service.cli.client import Client
from service.cli.output import STATE, AsJson, CommandError, StateDir, show, table
from service.domain.answers import Answers

POLL_SECONDS = 0.2
MARKS = {"served": "#", "running": ">", "queued": "~", "inactive": "."}

RebuildOption = Annotated[
    str,
    typer.Option("--rebuild", help="When lost stages are trained: now, by_deadline, rebuild_first, spares, min_depth."),
]
SparesOption = Annotated[int, typer.Option(min=0, help="For spares: further orders kept per shard.")]
MinDepthOption = Annotated[int, typer.Option(min=0, help="For min_depth and spares: slices that are always served.")]

AnswersOption = Annotated[Answers, typer.Option(help="What answers tell: probabilities, or top1.")]

app = typer.Typer(help="Models: shards trained apart, served together.", no_args_is_help=True)


@app.command()
def create(
    name: str,
    *,
    dataset: Annotated[str, typer.Option(help="The dataset to train on.")],
    recipe: Annotated[Path, typer.Option(help="Recipe file (JSON).")],
    evaluation: Annotated[str | None, typer.Option(help="Evaluation dataset.")] = None,
    erase_after: Annotated[int, typer.Option(help="Seconds before a deletion destroys anything.")] = 0,
    rebuild: RebuildOption = "now",
    spares: SparesOption = 0,
    min_depth: MinDepthOption = 0,
    min_shards: Annotated[int, typer.Option(min=1, help="With fewer live shards it answers nothing.")] = 1,
    answers: AnswersOption = Answers.PROBABILITIES,
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
        "rebuild": {"kind": rebuild, "spares": spares, "min_depth": min_depth},
        "min_shards": min_shards,
        "answers": answers,
    }
    with Client.of_state(state) as client:
        made = client.post("/v1/models", body)
    lines = [f"model {name}, recipe {made['recipe_digest'][:16]}", f"train it with: expunge model train {name}"]
    show(made, lines, as_json=as_json)


@app.command()
def policy(
    name: str,
    kind: Annotated[str, typer.Argument(help="now, by_deadline, rebuild_first, spares or min_depth.")],
    spares: SparesOption = 0,
    min_depth: MinDepthOption = 0,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Set when the stages that deletions took are trained again."""
    body = {"rebuild": {"kind": kind, "spares": spares, "min_depth": min_depth}}
    with Client.of_state(state) as client:
        changed = client.patch(f"/v1/models/{name}", body)
    show(changed, [_summary(changed)], as_json=as_json)


@app.command("min-shards")
def limit(
    name: str,
    shards: Annotated[int, typer.Argument(min=1, help="How many shards must be live.")],
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Set with how few live shards the model still answers."""
    with Client.of_state(state) as client:
        changed = client.patch(f"/v1/models/{name}", {"min_shards": shards})
    show(changed, [f"model {name}: answers with {shards} live shards or more"], as_json=as_json)


@app.command()
def answers(
    name: str,
    told: Annotated[Answers, typer.Argument(help="probabilities, or top1: the label and a rounded score.")],
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Set how much the model's answers tell."""
    with Client.of_state(state) as client:
        changed = client.patch(f"/v1/models/{name}", {"answers": told})
    show(changed, [f"model {name}: answers tell {told}"], as_json=as_json)


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
            sum(each["stale"] for each in shard["slices"]),
        )
        for shard in grid["shards"]
    ]
    lines = [_summary(model), *table(("SHARD", "SLICES", "DEPTH", "RECORDS", "STALE"), rows)]
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
    rows = [(*_told(output), text) for output, text in zip(answer["outputs"], texts, strict=True)]
    show(answer, table(("ANSWER", "P", "TEXT"), rows), as_json=as_json)


def _told(output: dict[str, Any]) -> tuple[str, str]:
    """What the model says, and how probable it holds that to be."""
    if "value" in output:
        return str(output["value"]), ""
    label = output["label"]
    return label, f"{output['probabilities'][label]:.3f}" if "probabilities" in output else f"{output['score']:.2f}"


@app.command()
def export(
    name: str,
    *,
    out: Annotated[Path, typer.Option(help="Directory that gets the adapter's files; made if it is not there.")],
    recipient: Annotated[str, typer.Option(help="System or contract that receives it, for the register.")],
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Write what is served as one ordinary peft adapter, and enter it into the exports register."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(f"{out} is not an empty directory: name a new one")
    with Client.of_state(state) as client:
        data = client.download(f"/v1/models/{name}/exports", {"recipient": recipient})
    try:
        out.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            archive.extractall(out)
    except OSError as error:
        raise CommandError(f"{out} cannot be written ({error.strerror})") from None
    about = json.loads((out / "expunge.json").read_text())
    lines = [
        f"export {about['export']}: version {about['version']} of {name} in {out}, digest {about['digest'][:16]}",
        f'load it with: PeftModel.from_pretrained(base, "{out}")',
    ]
    show(about, lines, as_json=as_json)


@app.command()
def exports(
    name: Annotated[str | None, typer.Argument()] = None, state: StateDir = STATE, as_json: AsJson = False
) -> None:
    """The register of exports; OPEN ones hold a stage that a deletion has tainted since."""
    with Client.of_state(state) as client:
        found = list(_exports(client, name))
    rows = [
        (
            each["export"],
            each["model"],
            each["version"],
            each["recipient"],
            each["created_at"][:16],
            "OPEN" if each["open"] else "withdrawn" if each["withdrawn_at"] else "",
        )
        for each in found
    ]
    lines = table(("EXPORT", "MODEL", "VERSION", "RECIPIENT", "CREATED", "STATE"), rows)
    show({"exports": found}, lines, as_json=as_json)


def _exports(client: Client, model: str | None) -> Iterator[dict[str, Any]]:
    """The whole register: an open item of long ago must not stay on a last page."""
    asked = {"limit": "200"} | ({"model": model} if model else {})
    while True:
        page = client.get("/v1/exports", asked)
        yield from page["exports"]
        if page["next"] is None:
            return
        asked["cursor"] = page["next"]


@app.command()
def withdraw(export_id: str, state: StateDir = STATE, as_json: AsJson = False) -> None:
    """Record that an export's recipient has destroyed it."""
    with Client.of_state(state) as client:
        answer = client.post(f"/v1/exports/{export_id}/withdraw")
    show(answer, [f"export {export_id} is entered as withdrawn, on your word"], as_json=as_json)


def _summary(model: dict[str, Any]) -> str:
    depth = "/".join(str(depth) for depth in model["depths"])
    return (
        f"model {model['name']}: version {model['version']} (floor {model['floor']}, cleared {model['cleared']}),"
        f" depths {depth} of {model['slices']}, rebuild {_policy(model)}"
    )


def _policy(model: dict[str, Any]) -> str:
    rest = [f"{name} {value}" for name, value in model["rebuild"].items() if name != "kind"]
    if model["rebuild_at"]:
        rest.append(f"planned for {model['rebuild_at'][:16]}")
    if model["deferring"]:
        rest.append("a replacement is being trained")
    return ", ".join([model["rebuild"]["kind"], *rest])
