"""`expunge verify`: check a deletion certificate with no torch, no database and no network."""

import base64
import sys
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from service.cli.verify_lines import verify_lines
from service.evidence.verify import Check, Later, Trusted, read_json
from service.evidence.verify import verify as run_checks

OFFLINE = "checked offline"


def verify(
    certificate: Annotated[
        Path, typer.Argument(help="The certificate: a DSSE envelope as JSON; or a bundle's certificates.jsonl.")
    ],
    key: Annotated[
        list[Path],
        typer.Option(
            help="The operator's public key (PEM) or key set (keys.json), from somewhere else than the certificate."
        ),
    ],
    supplements: Annotated[
        Path | None, typer.Option(help="Its supplements: what /certificate/supplements answered, or a list.")
    ] = None,
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="A tree head of the ledger that you hold; may be repeated.")
    ] = None,
    ledger: Annotated[
        str | None, typer.Option(help="The ledger's directory or URL: its tree head must agree, and those you hold.")
    ] = None,
    artifacts: Annotated[
        Path | None, typer.Option(help="The artefact store's directory: look for what should be gone.")
    ] = None,
    file_keys: Annotated[
        Path | None, typer.Option(help="The key store's directory: look for keys that should be gone.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="The model's recipe: train what is served again, from both stores.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Check a deletion certificate offline. Exit code 0 only if every check passed, 2 if none was made."""
    trusted = [each for path in key for each in _trusted(_read(path, "the public key"))]
    for directory, option in ((artifacts, "--artifacts"), (file_keys, "--file-keys")):
        if directory is not None and not directory.is_dir():
            _stop(f"{directory} is not a directory: give the store's, or leave {option} out")
    if recipe is not None and (artifacts is None or file_keys is None):
        _stop("a replay needs the files and their keys: give --artifacts and --file-keys with --recipe")
    if certificate.suffix == ".jsonl":
        if supplements or checkpoint or ledger or artifacts or file_keys or recipe:
            _stop("certificates.jsonl is checked with --key alone: give one certificate as a file of its own for more")
        raise typer.Exit(0 if _lines_hold(certificate, trusted, as_json=json) else 1)
    try:
        envelope: Any = read_json(_read(certificate, "the certificate"))
    except ValueError as error:
        refusal = f"not JSON: {error}; fetch the certificate again"
        checks = [Check("envelope", passed=False, detail=refusal, strength=OFFLINE)]
    else:
        later = _later(envelope, ledger, checkpoint or [])
        checks = _checked(envelope, trusted, _supplements(supplements), later, artifacts, file_keys)
        if recipe is not None and artifacts is not None and file_keys is not None:
            checks += _replayed(envelope, checks, _read(recipe, "the recipe"), artifacts, file_keys)
    passed = all(check.passed for check in checks)
    if json:
        print(dumps({"passed": passed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print_lines(checks, passed=passed)
    raise typer.Exit(0 if passed else 1)


def _lines_hold(path: Path, trusted: list[Trusted], *, as_json: bool) -> bool:
    try:
        return verify_lines(path, trusted, as_json=as_json)
    except OSError as error:
        _stop(f"cannot read {path}: {error.strerror}")


def _trusted(data: bytes) -> list[Trusted]:
    """A key, or the keys of a set, each for the tree heads of its time."""
    if data.lstrip()[:1] != b"{":
        return [Trusted(data)]
    from service.evidence.keys import KeyFileError, public_pem, read_key_set  # noqa: PLC0415 - the writer's format

    try:
        found = read_key_set(data)
    except KeyFileError as error:
        _stop(str(error))
    ends = [each.size for each in found.handovers]
    return [
        Trusted(public_pem(key), since, until)
        for key, since, until in zip(found.keys, [-1, *ends], [*ends, None], strict=True)
    ]


def _supplements(path: Path | None) -> list[Any]:
    if path is None:
        return []
    try:
        found: Any = read_json(_read(path, "the supplements"))
        listed: list[Any] = found["supplements"] if isinstance(found, dict) else found
        return [each.get("envelope", each) for each in listed]
    except (ValueError, KeyError, TypeError, AttributeError):
        _stop(f"{path} holds no supplements: give what GET .../certificate/supplements answered")


def _later(envelope: Any, ledger: str | None, checkpoints: list[Path]) -> list[Later]:
    """What there is to compare with; nothing where the certificate says no tree head, which its own check tells."""
    mine = _said(envelope).get("ledger")
    if (ledger is None and not checkpoints) or not isinstance(mine, dict):
        return []
    from service.cli.later import find_later  # noqa: PLC0415 - an HTTP client, where a URL is given
    from service.cli.output import CommandError  # noqa: PLC0415

    texts = [(str(path), _read(path, "the checkpoint").decode(errors="replace")) for path in checkpoints]
    try:
        return find_later(mine, ledger, texts)
    except CommandError as error:
        _stop(str(error))
    except (KeyError, TypeError, AttributeError):
        return []


def _said(envelope: Any) -> dict[str, Any]:
    """The predicate, unchecked; nothing if there is none."""
    try:
        said: Any = read_json(base64.b64decode(envelope["payload"]))["predicate"]
    except (ValueError, KeyError, TypeError):
        return {}
    return said if isinstance(said, dict) else {}


def _checked(
    envelope: Any,
    trusted: list[Trusted],
    supplements: list[Any],
    later: list[Later],
    artifacts: Path | None,
    file_keys: Path | None,
) -> list[Check]:
    columns = ("looking through the store", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=artifacts is None) as bar:
        task = bar.add_task("hash", total=None)
        return run_checks(
            envelope,
            trusted,
            supplements=supplements,
            later=later,
            artifacts=artifacts,
            file_keys=file_keys,
            on_bytes=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _replayed(envelope: Any, checks: list[Check], recipe: bytes, artifacts: Path, file_keys: Path) -> list[Check]:
    """Train what the certificate says is served again, once the rest holds: an untrusted recipe is not run."""
    if not all(check.passed for check in checks):
        refusal = "not tried: the certificate does not hold"
        return [Check("replay", passed=False, detail=refusal, strength="re-derived")]
    from service.cli.replay_served import replay_served  # noqa: PLC0415 - torch, and both stores

    try:
        detail = replay_served(_said(envelope), recipe, artifacts, file_keys)
    except ValueError as error:
        return [Check("replay", passed=False, detail=str(error), strength="re-derived")]
    return [Check("replay", passed=True, detail=detail, strength="re-derived")]


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
