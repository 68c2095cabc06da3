"""`expunge ledger`: check the ledger, or a proof from it, from files alone; be its witness."""

import json
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from service.cli.output import AsJson, CommandError, show
from service.cli.witness import witness
from service.evidence.events_check import check_events
from service.evidence.keys import KeyFileError, KeySet, load_signing_key, read_key_set
from service.evidence.leaves import open_leaf, parse_leaf
from service.evidence.ledger_check import Fetch, LedgerError, Report, check
from service.evidence.merkle import leaf_hash
from service.evidence.note import COSIGNATURE, NoteError, vkey
from service.evidence.signers import SignerAwayError
from service.evidence.tree_head import TreeHeadError, check_proof
from service.settings import Settings

app = typer.Typer(name="ledger", help="Check the ledger of events from its files; cosign its tree heads.")

Where = Annotated[str, typer.Argument(help="The log's directory or URL: where `checkpoint` and `tile/` lie.")]
Key = Annotated[Path, typer.Option(help="The operator's public key or key set, from somewhere else than the log.")]


@app.command("verify")
def verify_ledger(
    where: Where,
    key: Key,
    old: Annotated[
        Path | None, typer.Option(help="A checkpoint kept from before: nothing up to it may have changed.")
    ] = None,
    events: Annotated[
        Path | None, typer.Option(help="events.jsonl of an evidence bundle: each must be in the log.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hash every entry again, up to the signed root. Exit code 0 only if all of it holds."""
    public = _public(key)
    before = _read(old).decode(errors="replace") if old is not None else None
    with open_log(where) as fetch, _bar() as advance:
        try:
            report = check(fetch, public, old=before, on_leaves=advance)
            held = _events(events, fetch, report.head.size) if events is not None else None
        except (LedgerError, TreeHeadError) as error:
            raise CommandError(f"the ledger does NOT hold: {error}") from None
    lines = _lines(report)
    if held is not None:
        lines.insert(-1, f"ok  {held[0]} events of {events} are in it, {held[1]} of them opened")
    show(_as_json(report) | ({"events": held[0], "opened": held[1]} if held else {}), lines, as_json=as_json)


@app.command("proof")
def verify_proof(
    file: Annotated[Path, typer.Argument(help="What GET /v1/deletion-requests/{id}/inclusion-proof answered.")],
    key: Key,
    as_json: AsJson = False,
) -> None:
    """Check that events of one request are in the ledger. Exit code 0 only if every one is."""
    public = _public(key)
    shown: list[dict[str, Any]] = []
    try:
        for entry in json.loads(_read(file))["entries"]:
            leaf, opening = parse_leaf(entry["leaf"].encode()), entry["opening"]
            index, head = check_proof(entry["proof"], leaf_hash(entry["leaf"].encode()), public)
            if index != leaf.index:
                raise CommandError(f"the proof does NOT hold: leaf {leaf.index} lies at {index}")
            opened = open_leaf(leaf, opening.encode()) if opening is not None else {}
            shown.append({"index": index, "time": leaf.time, "kind": leaf.kind, "size": head.size, **opened})
    except (KeyError, TypeError, AttributeError):
        raise CommandError("not an inclusion proof: fetch it again") from None
    except ValueError as error:
        raise CommandError(f"the proof does NOT hold: {error}") from None
    if not shown:
        raise CommandError("the proof holds no entry: nothing was checked")
    lines = [f"ok  {each['index']:>8}  {each['time']}  {each['kind']}" for each in shown]
    show({"entries": shown}, [*lines, f"all {len(shown)} are under a tree head of this key"], as_json=as_json)


@app.command("witness")
def witness_ledger(
    where: Where,
    key: Key,
    name: Annotated[str, typer.Option(help="Your name as a witness, best a URL without its scheme.")],
    witness_key: Annotated[Path, typer.Option(help="Your Ed25519 key (PEM, mode 0600), for nothing else.")],
    state: Annotated[Path, typer.Option(help="Where you keep the last tree head that you cosigned.")],
) -> None:
    """Print the checkpoint with your cosignature, once it continues the last one that you saw."""
    try:
        mine = load_signing_key(witness_key)
        with open_log(where) as fetch:
            signed = witness(fetch, _public(key), name, mine, state, now=int(time.time()))
    except (KeyFileError, SignerAwayError, NoteError, LedgerError, TreeHeadError) as error:
        raise CommandError(f"not cosigned: {error}") from None
    typer.echo(f"checked with {vkey(name, mine.public_key(), COSIGNATURE)}", err=True)
    print(signed, end="")


@contextmanager
def open_log(where: str) -> Generator[Fetch]:
    """The log's files, from a directory or by HTTP.

    The API key goes to EXPUNGE_API_URL alone, and never to another host.
    """
    if not where.startswith(("http://", "https://")):
        directory = Path(where)
        if not directory.is_dir():
            raise CommandError(
                f"{where} is not a directory: give the log's, `ledger` in the artefact store, or its URL"
            )

        def read(name: str) -> bytes | None:
            try:
                return (directory / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None
            except OSError as error:
                raise CommandError(f"cannot read {directory / name}: {error.strerror}") from None

        yield read
        return
    settings = Settings()
    ours = settings.api_key and where.startswith(settings.api_url.rstrip("/") + "/")
    headers = {"Authorization": f"Bearer {settings.api_key}"} if ours else {}
    with httpx.Client(headers=headers, timeout=30) as client:

        def fetch(name: str) -> bytes | None:
            try:
                answer = client.get(f"{where.rstrip('/')}/{name}")
            except (httpx.TransportError, httpx.InvalidURL) as error:
                raise CommandError(f"{where} does not answer ({type(error).__name__})") from None
            if answer.status_code not in {200, 404}:
                raise CommandError(f"{where} answered {answer.status_code}: set EXPUNGE_API_URL and EXPUNGE_API_KEY")
            return answer.content if answer.status_code == 200 else None

        yield fetch


def _events(path: Path, fetch: Fetch, size: int) -> tuple[int, int]:
    try:
        with path.open("rb") as file:
            return check_events(file, fetch, size)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except LedgerError:
        raise
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from None


@contextmanager
def _bar() -> Generator[Callable[[int, int], None]]:
    columns = ("hashing leaves", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("leaves", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


def _lines(report: Report) -> list[str]:
    head, back = report.head, report.back
    lines = [f"ok  {head.size} leaves of {head.origin}, each in its place", f"ok  signed root {head.root.hex()}"]
    if report.since is not None:
        lines.append(f"ok  nothing up to {report.since} was changed")
    if back.total_seconds() >= 1:
        lines.append(
            f"note: a clock went back: leaf {report.back_at} is {back.total_seconds():.0f} s older than the one before"
        )
    return [*lines, "docs/ledger.md says what this does not prove"]


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "origin": report.head.origin,
        "size": report.head.size,
        "root": report.head.root.hex(),
        "continues": report.since.size if report.since else None,
        "clock_back_seconds": report.back.total_seconds(),
        "clock_back_at": report.back_at,
    }


def _public(path: Path) -> KeySet:
    try:
        return read_key_set(_read(path))
    except KeyFileError as error:
        raise CommandError(f"{path}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
