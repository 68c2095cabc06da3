"""`expunge doctor`: is the installation sound; and with a canary, does a text lie anywhere in it?"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.output import STATE, AsJson, CommandError, StateDir, show, table
from service.settings import Settings

FOUND, INCOMPLETE = 1, 2
"""Exit codes: something failed or was found; nothing was found, but not everything could be looked through."""


def doctor(
    *,
    canary: Annotated[
        str | None, typer.Option(help="Look for this text. `-` reads it from stdin, which no shell history keeps.")
    ] = None,
    canary_file: Annotated[Path | None, typer.Option(help="Look for the text in this file.")] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="Search this file or directory, too; may be repeated.")
    ] = None,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Check settings, stores and keys; with a canary, search every store, file and log for it in all encodings.

    Exit code 0: all checks passed, or the text lies nowhere. 1: a check failed, or it was found. 2: not found, but
    some places could not be searched. The text itself is never printed.
    """
    from service.doctor.sites import find_sites  # noqa: PLC0415 - pyarrow and psycopg, not for --help
    from service.standalone.errors import StandaloneError  # noqa: PLC0415

    settings = Settings()
    text = _text(canary, canary_file)
    if missing := [path for path in also or () if not path.exists()]:
        raise CommandError(f"{missing[0]} is not there: name a file or directory that is")
    try:
        sites = find_sites(state, settings, tuple(also or ()))
    except (StandaloneError, OSError) as error:
        raise CommandError(str(error)) from None
    code = _check(sites, settings, as_json=as_json) if text is None else _search(sites, text, as_json=as_json)
    raise typer.Exit(code)


def _text(canary: str | None, file: Path | None) -> str | None:
    if canary is not None and file is not None:
        raise CommandError("--canary and --canary-file exclude each other: give one of them")
    try:
        text = file.read_text() if file else sys.stdin.read() if canary == "-" else canary
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read the canary ({type(error).__name__}): give a readable file of UTF-8") from None
    return text


def _check(sites: Any, settings: Settings, *, as_json: bool) -> int:
    from service.doctor.checks import run_checks  # noqa: PLC0415

    checks = run_checks(sites, settings)
    passed = all(check.passed for check in checks)
    lines = [f"{'ok    ' if check.passed else 'FAILED'}  {check.name:<12}  {check.detail}" for check in checks]
    show({"passed": passed, "checks": [asdict(check) for check in checks]}, lines, as_json=as_json)
    return 0 if passed else FOUND


def _search(sites: Any, text: str, *, as_json: bool) -> int:
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn  # noqa: PLC0415

    from service.doctor.search import Search, total_bytes  # noqa: PLC0415
    from service.store.secrets import SecretsError, read_secrets  # noqa: PLC0415

    unsearched: list[tuple[str, str]] = []
    try:
        secrets = read_secrets(sites.keys_dir)
    except SecretsError:
        secrets = None
        unsearched.append(("forms", "hashes under the installation's keys: the keys cannot be read"))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json) as bars:
        bar = bars.add_task("searching", total=total_bytes(sites))
        try:
            search = Search(sites, text, secrets, lambda store, size: bars.update(bar, description=store, advance=size))
        except ValueError as error:
            raise CommandError(str(error)) from None
        report = search.run()
    unsearched += sorted(report.unsearched)
    found, kept = sorted(report.found), sorted(report.kept)
    body = {
        "found": [asdict(each) for each in found],
        "kept": [asdict(each) for each in kept],
        "unsearched": [{"store": store, "place": place} for store, place in unsearched],
        "searched": report.pieces,
        "forms": len(search.forms.forms),
    }
    rows = [(each.store, each.form, each.place) for each in found]
    lines = table(("STORE", "FORM", "FOUND IN"), rows) if rows else []
    lines += [f"not searched: {store}: {place}" for store, place in unsearched]
    lines += [f"kept on purpose (do-not-train list, tombstones): {each.form} in {each.place}" for each in kept]
    megabytes = sum(report.pieces.values()) / 1e6
    lines.append(f"{len(search.forms.forms)} forms in {megabytes:.1f} MB of {len(report.pieces)} stores:"
                 f" {f'FOUND in {len(found)} places' if found else 'found nowhere'}")  # fmt: skip
    show(body, lines, as_json=as_json)
    return FOUND if found else INCOMPLETE if unsearched else 0
