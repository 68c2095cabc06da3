"""`expunge verify`: check a deletion certificate with no torch, no database and no network."""

import sys
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from service.evidence.verify import Check, read_json
from service.evidence.verify import verify as run_checks


def verify(
    certificate: Annotated[Path, typer.Argument(help="The certificate: a DSSE envelope as JSON.")],
    key: Annotated[
        Path, typer.Option(help="The operator's public key (PEM), from somewhere else than the certificate.")
    ],
    artifacts: Annotated[
        Path | None, typer.Option(help="The artefact store's directory: look for what should be gone.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Check a deletion certificate offline. Exit code 0 only if every check passed, 2 if none was made."""
    pem = _read(key, "the public key")
    if artifacts is not None and not artifacts.is_dir():
        _stop(f"{artifacts} is not a directory: give the artefact store's, or leave --artifacts out")
    try:
        envelope: Any = read_json(_read(certificate, "the certificate"))
    except ValueError as error:
        refusal = f"not JSON: {error}; fetch the certificate again"
        checks = [Check("envelope", passed=False, detail=refusal, strength="checked offline")]
    else:
        checks = _checked(envelope, pem, artifacts)
    passed = all(check.passed for check in checks)
    if json:
        print(dumps({"passed": passed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print_lines(checks, passed=passed)
    raise typer.Exit(0 if passed else 1)


def _checked(envelope: Any, pem: bytes, artifacts: Path | None) -> list[Check]:
    columns = ("looking through the store", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=artifacts is None) as bar:
        task = bar.add_task("hash", total=None)
        return run_checks(
            envelope,
            pem,
            artifacts=artifacts,
            on_bytes=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _print_lines(checks: list[Check], *, passed: bool) -> None:
    for check in checks:
        result = "ok    " if check.passed else "FAILED"
        print(f"{result}  {check.name:<18}  {check.strength if check.passed else '':<18}  {check.detail}")
    failed = sum(not check.passed for check in checks)
    if passed:
        print(f"all {len(checks)} checks passed; docs/certificate.md says what must be trusted besides")
    else:
        print(f"{failed} of {len(checks)} checks FAILED: do not rely on this certificate")


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _stop(f"cannot read {what} {path}: {error.strerror}")


def _stop(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(2)
