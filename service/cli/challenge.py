"""`expunge challenge`: have stages replayed that a witness's cosignature draws, and check what came of it offline."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.client import Client
from service.cli.output import STATE, AsJson, CommandError, StateDir, show, table
from service.cli.request_commands import segment
from service.domain.replays import ReplayOutcome
from service.evidence.challenge import ChallengeError, Result, check
from service.evidence.keys import KeyFileError, load_public_key

app = typer.Typer(name="challenge", help="Challenge audits: stages drawn by a witness are trained again.")

ModelName = Annotated[str, typer.Argument(help="The model's name.")]
Witness = Annotated[str, typer.Option(help="The witness's public key, as `expunge ledger witness` shows it.")]
HEADER = ("CHALLENGE", "VERSION", "DRAWN", "ENDED", "EQUAL", "OPENED")


@app.command("open")
def open_challenge(
    model: ModelName,
    checkpoint: Annotated[Path, typer.Option(help="What `expunge ledger witness` printed just now.")],
    witness: Witness,
    stages: Annotated[int, typer.Option(min=1, max=1000, help="How many stages to draw.")] = 10,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Draw stages of what is served, and have them trained again from nothing."""
    body = {"checkpoint": _read(checkpoint).decode(errors="replace"), "witness": witness, "stages": stages}
    with Client.of_state(state) as client:
        found = client.post(f"/v1/models/{segment(model)}/challenges", body)
    lines = [f"challenge {found['challenge_id']}", f"then: expunge challenge fetch {model} {found['challenge_id']}"]
    show(found, lines, as_json=as_json)


@app.command("list")
def list_challenges(model: ModelName, state: StateDir = STATE, as_json: AsJson = False) -> None:
    """A model's challenges, the newest first."""
    with Client.of_state(state) as client:
        found = client.get(f"/v1/models/{segment(model)}/challenges")
    fields = ("challenge_id", "version", "drawn", "ended", "equal", "created_at")
    show(found, table(HEADER, [[each[name] for name in fields] for each in found["challenges"]]), as_json=as_json)


@app.command("fetch")
def fetch_challenge(
    model: ModelName,
    challenge: Annotated[str, typer.Argument(help="The challenge's id.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: CHALLENGE.json.")] = None,
    state: StateDir = STATE,
) -> None:
    """Save a challenge with its proofs, for `expunge challenge verify`."""
    with Client.of_state(state) as client:
        found = client.get(f"/v1/models/{segment(model)}/challenges/{segment(challenge)}")
    path = out or Path(f"{found['challenge_id']}.json")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    waiting = sum(each["outcome"] is None for each in found["drawn"])
    typer.echo(f"{path}: {len(found['drawn'])} stages drawn, {waiting} of them not replayed yet")


@app.command("verify")
def verify_challenge(
    file: Annotated[Path, typer.Argument(help="What `expunge challenge fetch` saved.")],
    key: Annotated[Path, typer.Option(help="The operator's public key (PEM), from somewhere else than the file.")],
    witness: Witness,
    checkpoint: Annotated[
        Path, typer.Option(help="What the challenge was opened with, as you kept it: nobody may choose another.")
    ],
    replayed: Annotated[
        Path | None, typer.Option(help="What `expunge replay --json` printed where you replayed them yourself.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a challenge without the operator. Exit code 0 only if each drawn stage gave the same bits again."""
    try:
        given = _read(checkpoint).decode(errors="replace")
        result = check(json.loads(_read(file)), load_public_key(_read(key)), witness, given)
        derived = _derived(result, json.loads(_read(replayed))) if replayed is not None else frozenset[str]()
    except KeyFileError as error:
        raise CommandError(f"{key}: {error}") from None
    except ChallengeError as error:
        raise CommandError(f"the challenge does NOT hold: {error}") from None
    except ValueError:
        raise CommandError("not JSON: fetch it again") from None
    show(_as_json(result, derived), _lines(result, derived), as_json=as_json)
    if result.equal < len(result.drawn):
        raise typer.Exit(1)


def _derived(result: Result, report: Any) -> frozenset[str]:
    """The drawn stages that the auditor trained again to the digest that was logged."""
    try:
        equal = {each["stage"]: each["digest"] for each in report["stages"] if each["outcome"] == ReplayOutcome.EQUAL}
        differing = [each["stage"] for each in report["stages"] if each["outcome"] == ReplayOutcome.MISMATCH]
    except (KeyError, TypeError):
        raise ChallengeError("the report is not what `expunge replay --json` prints") from None
    if wrong := [stage for stage in differing if stage in result.drawn]:
        raise ChallengeError(f"your own replay of stage {wrong[0][:12]} gave other bits")
    return frozenset(stage for stage, digest in result.drawn.items() if equal.get(stage) == digest)


def _lines(result: Result, derived: frozenset[str]) -> list[str]:
    when = datetime.fromtimestamp(result.cosigned, UTC).isoformat(timespec="seconds")
    lines = [
        f"ok  checked offline     {result.witness} cosigned {result.head} at {when}",
        f"ok  checked offline     version {result.version} with all its {result.stages} stages was published before",
        f"ok  checked offline     it draws these {len(result.drawn)}, of {result.asked} asked for",
        "ok  checked offline     their keys were logged before training, their digests after it",
    ]
    for stage, outcome in result.outcomes.items():
        strength = "re-derived" if stage in derived else "signed by operator"
        mark, said = ("ok ", outcome.value) if outcome is ReplayOutcome.EQUAL else ("NOT", _why(outcome))
        lines.append(f"{mark} {strength:<19} stage {stage[:12]} replayed after the draw: {said}")
    return [*lines, result.statement()]


def _why(outcome: ReplayOutcome | None) -> str:
    return outcome.value.replace("_", " ") if outcome else "waits; fetch the challenge again later"


def _as_json(result: Result, derived: frozenset[str]) -> dict[str, Any]:
    return {
        "size": result.head.size,
        "witness": result.witness,
        "cosigned": result.cosigned,
        "version": result.version,
        "stages": result.stages,
        "asked": result.asked,
        "drawn": [
            {"stage": stage, "digest": result.drawn[stage], "outcome": outcome, "re_derived": stage in derived}
            for stage, outcome in result.outcomes.items()
        ],
        "equal": result.equal,
        "unseen_at_a_tenth": result.unseen(0.1),
        "statement": result.statement(),
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
