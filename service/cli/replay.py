"""`expunge replay`: train stages again from nothing, from the files alone, and compare digests bit for bit."""

import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.output import CommandError
from service.domain.replays import ReplayOutcome, draw
from service.settings import Settings
from service.store.artifacts import KEY_STORE, ArtifactMissingError, Artifacts
from service.store.directory import Directory
from service.store.file_keys import FileKeys, FileKeysError, open_file_keys
from service.store.replay_files import Files, find_files
from shards.errors import ManifestMismatchError, ShardsError
from shards.recipe import Recipe
from shards.stages import Stage

EXIT = {ReplayOutcome.EQUAL: 0, ReplayOutcome.MISMATCH: 1, ReplayOutcome.SKIPPED: 2, ReplayOutcome.OTHER_PLATFORM: 3}
"""Exit code by what all stages together show."""
MARKS = {"equal": "equal   ", "mismatch": "DIFFERS ", "other_platform": "other   ", "skipped": "skipped "}


@dataclass(frozen=True, slots=True)
class Served:
    """What the API says of a stage that serves."""

    digest: str
    platform: dict[str, str]


def replay(
    artifacts: Annotated[
        Path | None, typer.Option(help="Directory of the artefact store. Default: the one of --state.")
    ] = None,
    file_keys: Annotated[
        Path | None, typer.Option(help="Directory of the artefact store's keys. Default: the one of --state.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe file. Default: the model's, asked of the API.")] = None,
    model: Annotated[str | None, typer.Option(help="Model whose recipe and served stages to ask for.")] = None,
    platforms: Annotated[
        Path | None, typer.Option(help="Kept answer of GET /v1/models/NAME/stages, where the API is not at hand.")
    ] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Stage key, or how it begins; may be repeated.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every stage that serves; the default.")] = False,
    sample: Annotated[int, typer.Option(min=0, help="Replay this many stages, chosen at random.")] = 0,
    seed: Annotated[str, typer.Option(help="Draws the same sample again. Default: a new one, which is shown.")] = "",
    state: Annotated[Path, typer.Option(help="State directory of `expunge up`.")] = Path(".expunge"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train stages again on the records that remain and compare with the artefacts that are served.

    Exit code 0: all equal. 1: a digest differs on the platform that made it. 3: made on another platform, so that
    digests are not comparable. 2: it could not be done.
    """
    seed = seed or secrets.token_hex(8)
    try:
        _check_one_of(bool(stage), every, bool(sample))
        body, served = _asked(recipe, model, platforms, state)
        url = "" if file_keys else Settings().file_keys_url
        keys = open_file_keys(url or (file_keys or state / "file-keys").absolute().as_uri())
        files = find_files(_open(artifacts or state / "artifacts", keys))
        chosen = _choose(files, served, Recipe.from_json(body), stage or [], sample, seed)
        results = _replay_all(files, served, Recipe.from_json(body), chosen, quiet=as_json)
    except (CommandError, ShardsError, ArtifactMissingError, FileKeysError, LookupError, OSError, ValueError) as error:
        typer.echo(f"replay: {error}", err=True)
        raise typer.Exit(2) from None
    outcome = _joint(result["outcome"] for result in results)
    if as_json:
        shown = {"stages": results, "equal": outcome is ReplayOutcome.EQUAL, "outcome": outcome.value}
        typer.echo(json.dumps({**shown, "seed": seed} if sample else shown))
    else:
        for line in _lines(results, f" (--seed {seed})" if sample else ""):
            typer.echo(line)
    if outcome is ReplayOutcome.MISMATCH:
        typer.echo("replay: a digest differs; keep the file, and take the stage out of service", err=True)
    raise typer.Exit(EXIT[outcome])


def _open(directory: Path, keys: FileKeys) -> Artifacts:
    if not (directory / KEY_STORE).is_file():  # opening would make one
        raise LookupError(f"{directory} holds no stages: is it the artefact store?")
    return Artifacts(Directory(directory), keys)


def _check_one_of(*given: bool) -> None:
    if sum(given) > 1:
        raise LookupError("--stage, --all and --sample exclude each other: give one of them")


def _asked(
    recipe: Path | None, model: str | None, platforms: Path | None, state: Path
) -> tuple[dict[str, Any], dict[str, Served]]:
    """The recipe, and the served stages as far as they are known: none where there are only files."""
    if recipe is None and model is None:
        raise LookupError("name the --model whose recipe to ask the API for, or give a --recipe file")
    listed: dict[str, Any] = json.loads(platforms.read_text()) if platforms is not None else {"stages": []}
    if recipe is not None:
        body = json.loads(recipe.read_text())
    else:
        from service.cli.client import Client  # noqa: PLC0415 - an auditor with files needs no HTTP client

        with Client.of_state(state) as client:
            body = client.get(f"/v1/models/{model}")["recipe"]
            listed = client.get(f"/v1/models/{model}/stages") if platforms is None else listed
    return body, {each["stage"]: Served(each["digest"], each["platform"]) for each in listed["stages"]}


def _choose(
    files: Files, served: dict[str, Served], recipe: Recipe, prefixes: Sequence[str], sample: int, seed: str
) -> list[Stage]:
    mine = {key: found for key, found in files.stages.items() if found.recipe == recipe.digest}
    if not mine:
        raise LookupError("the artefact store holds no stage of this recipe")
    if lost := [prefix for prefix in prefixes if not any(key.startswith(prefix) for key in mine)]:
        raise LookupError(f"no stage {lost[0]} in the artefact store; GET /v1/models/NAME/stages lists them")
    if gone := [key for key in served if key not in mine]:
        raise LookupError(f"the file of served stage {gone[0][:12]} is not there: is it the model's artefact store?")
    keys = (
        [key for key in mine if any(key.startswith(prefix) for prefix in prefixes)] if prefixes else [*served] or mine
    )
    if sample:
        keys = draw(keys, sample, seed)
    return sorted((mine[key] for key in keys), key=lambda found: (found.shard, found.prefix))


def replay_stages(files: Files, served: dict[str, Served], recipe: Recipe) -> list[dict[str, Any]]:
    """Train these served stages again; one result a file.

    Raises:
        LookupError: one of them is not there.
    """
    return _replay_all(files, served, recipe, _choose(files, served, recipe, [], 0, ""), quiet=True)


def _replay_all(
    files: Files, served: dict[str, Served], recipe: Recipe, chosen: Sequence[Stage], *, quiet: bool
) -> list[dict[str, Any]]:
    """One result a file, in the order of `chosen`; a stage that another one stands on is trained once with it."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415 - not where --help is all that is asked

    from shards.engine.determinism import prepare  # noqa: PLC0415 - torch costs seconds
    from shards.engine.registry import open_trainer  # noqa: PLC0415
    from shards.engine.replay import platform_of  # noqa: PLC0415

    prepare()
    settings = Settings()
    device = settings.device
    trainer = open_trainer(recipe, device, settings.commands)
    here = platform_of(trainer, device)
    results: dict[str, list[dict[str, Any]]] = {}
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as bars:
        whole = bars.add_task("stages", total=len(chosen))
        for one in sorted(chosen, key=lambda each: -each.depth):
            if one.key not in results:
                bar = bars.add_task(f"stage {one.key[:12]}", total=None)

                def progress(done: int, total: int, bar: Any = bar) -> None:
                    bars.update(bar, completed=done, total=total)

                found = _replay_line(files, served, trainer, one, here, progress, alone=len(chosen) == 1)
                results = found | results
                bars.remove_task(bar)
            bars.advance(whole)
    return [result for one in chosen for result in results[one.key]]


def _replay_line(
    files: Files,
    served: dict[str, Served],
    trainer: Any,
    stage: Stage,
    here: dict[str, str],
    progress: Callable[[int, int], None],
    *,
    alone: bool,
) -> dict[str, list[dict[str, Any]]]:
    """Platforms first, then the stage's line as far as they agree; results by stage key, one a file."""
    from shards.engine.replay import Comparison, comparable, replay  # noqa: PLC0415

    line = files.chain(stage)
    made_on = [served[each.key].platform if each.key in served else None for each in line]
    depth = comparable(made_on, here)
    try:
        found: list[str | None] = [*replay(trainer, line[:depth], files.records(stage), progress)] if depth else []
    except ManifestMismatchError as error:
        if alone:
            raise
        skipped = {"stage": stage.key, "outcome": "skipped", "equal": False, "reason": str(error)}
        return {stage.key: [skipped]}
    found += [None] * (len(line) - depth)
    return {
        each.key: [
            Comparison(each.key, expected, again, here, platform).to_json()
            for expected in ([served[each.key].digest] if each.key in served else files.digests[each.key])
        ]
        for each, again, platform in zip(line, found, made_on, strict=True)
    }


def _joint(outcomes: Iterable[str]) -> ReplayOutcome:
    """The one that matters most; skipped stages count where nothing else was found."""
    seen = set(outcomes)
    order = (ReplayOutcome.MISMATCH, ReplayOutcome.OTHER_PLATFORM, ReplayOutcome.EQUAL)
    return next((outcome for outcome in order if outcome in seen), ReplayOutcome.SKIPPED)


def _lines(results: Iterable[dict[str, Any]], drawn: str) -> Iterable[str]:
    for each in results:
        said = f"{MARKS[each['outcome']]} stage {each['stage'][:16]}"
        if each["outcome"] == "skipped":
            yield f"{said}  {each['reason']}"
        elif each["outcome"] == "other_platform":
            fields = ", ".join(each["differs"]) or "a stage that it stands on"
            yield f"{said}  made on another platform: differs in {fields}; digests are not comparable"
        else:
            known = "" if each["equal"] or each["made_on"] else "  (its platform is not known here: see --platforms)"
            yield f"{said}  served {each['expected'][:16]}  replayed {each['found'][:16]}{known}"
    if drawn:
        yield f"drawn at random{drawn}"
