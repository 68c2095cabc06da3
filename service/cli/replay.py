"""`expunge replay`: train stages again from nothing, from the files alone, and compare digests bit for bit."""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from service.store.replay_files import Files, find_files
from shards.errors import ShardsError
from shards.recipe import Recipe
from shards.stages import Stage


def replay(
    artifacts: Annotated[
        Path | None, typer.Option(help="Directory of the artefact store. Default: the one of --state.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe file. Default: the model's, asked of the API.")] = None,
    model: Annotated[str | None, typer.Option(help="Model whose recipe to ask for.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Stage key, or how it begins; may be repeated.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Replay this many stages, chosen at random.")] = 0,
    state: Annotated[Path, typer.Option(help="State directory of `expunge up`.")] = Path(".expunge"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train stages again on the records that remain and compare with the artefacts that are served.

    Without --stage or --sample every stage is replayed. Exit code 0 only if all of them are equal.
    """
    where = artifacts or state / "artifacts"
    try:
        body = _recipe_body(recipe, model, state)
        files = find_files(where)
        chosen = _choose(files, Recipe.from_json(body), stage or [], sample)
        results = _replay_all(files, Recipe.from_json(body), chosen, quiet=as_json)
    except (ShardsError, LookupError, OSError, ValueError) as error:
        typer.echo(f"replay: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps({"stages": results, "equal": all(each["equal"] for each in results)}))
    else:
        for each in results:
            mark = "equal   " if each["equal"] else "DIFFERS "
            digests = f"served {each['expected'][:16]}  replayed {each['found'][:16]}"
            typer.echo(f"{mark} stage {each['stage'][:16]}  {digests}")
    if not all(each["equal"] for each in results):
        typer.echo("replay: a digest differs; first compare the platform fingerprints (--json)", err=True)
        raise typer.Exit(1)


def _recipe_body(recipe: Path | None, model: str | None, state: Path) -> dict[str, Any]:
    if recipe is not None:
        return json.loads(recipe.read_text())
    if model is None:
        raise LookupError("name the --model whose recipe to ask the API for, or give a --recipe file")
    from service.cli.client import Client  # noqa: PLC0415 - an auditor with files needs no HTTP client

    return Client.of_state(state).get(f"/v1/models/{model}")["recipe"]


def _choose(files: Files, recipe: Recipe, prefixes: list[str], sample: int) -> list[Stage]:
    mine = {key: found for key, found in files.stages.items() if found.recipe == recipe.digest}
    if not mine:
        raise LookupError("the artefact store holds no stage of this recipe")
    if prefixes:
        keys = [key for key in mine if any(key.startswith(prefix) for prefix in prefixes)]
        if lost := [prefix for prefix in prefixes if not any(key.startswith(prefix) for key in mine)]:
            raise LookupError(f"no stage {lost[0]} in the artefact store; GET /v1/models/NAME/shards lists them")
    else:
        keys = list(mine)
    if sample and sample < len(keys):
        keys = random.SystemRandom().sample(keys, sample)
    return sorted((mine[key] for key in keys), key=lambda found: (found.shard, found.prefix))


def _replay_all(files: Files, recipe: Recipe, chosen: list[Stage], *, quiet: bool) -> list[dict[str, Any]]:
    from rich.progress import Progress  # noqa: PLC0415 - not where --help is all that is asked

    from shards.engine.determinism import fingerprint, prepare  # noqa: PLC0415 - torch costs seconds
    from shards.engine.replay import compare, replay  # noqa: PLC0415
    from shards.engine.s3t import S3T  # noqa: PLC0415

    prepare()
    engine = S3T(recipe)
    platform = fingerprint("cpu", recipe.precision) | {"trunk": engine.purity}
    results: list[dict[str, Any]] = []
    with Progress(disable=quiet, transient=True) as bars:
        for one in chosen:
            chain = files.chain(one)
            bar = bars.add_task(f"stage {one.key[:12]}", total=None)
            found = replay(
                engine, chain, files.records(one), lambda done, of, bar=bar: bars.update(bar, completed=done, total=of)
            )
            expected = [files.digests[each.key] for each in chain]
            results.append(compare(chain, expected, found, platform)[-1].to_json())
            bars.remove_task(bar)
    return results
