"""`expunge verify certificates.jsonl`: every certificate of an evidence bundle, one after the other."""

import base64
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from service.evidence.verify import Check, Trusted, read_json, verify


def verify_lines(path: Path, trusted: list[Trusted], *, as_json: bool) -> bool:
    """Whether each certificate holds; prints those that do not, with their lines, and a line about all.

    Raises:
        OSError: the file cannot be read.
    """
    count, failed = 0, list[dict[str, Any]]()
    console = Console(stderr=True)
    columns = ("checking certificates", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with path.open("rb") as file, Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("check", total=path.stat().st_size)
        for name, checks in _checked(file, trusted):
            count += 1
            bar.update(task, completed=file.tell())
            wrong = [check for check in checks if not check.passed]
            if wrong:
                failed.append({"certificate": name, "checks": [asdict(check) for check in wrong]})
                if not as_json:
                    print(*(f"FAILED  {name}  {check.name}: {check.detail}" for check in wrong), sep="\n")
    if as_json:
        print(json.dumps({"passed": not failed, "certificates": count, "failed": failed}, indent=2))
    elif failed:
        print(f"{len(failed)} of {count} certificates FAILED: do not rely on them")
    elif not count:
        print("no certificate is in it: nothing was checked")
    else:
        print(f"all {count} certificates passed; docs/certificate.md says what must be trusted besides")
    return not failed


def _checked(file: BinaryIO, trusted: list[Trusted]) -> Iterator[tuple[str, list[Check]]]:
    for number, line in enumerate(iter(file.readline, b""), 1):
        try:
            body: Any = read_json(line)
            name = f"{body['request_id']} {body['model']}"
            checks = verify(body["certificate"], trusted, supplements=body["supplements"])
            if all(check.passed for check in checks):
                checks.append(_label(body, name))
            yield name, checks
        except (ValueError, KeyError, TypeError) as error:
            detail = f"not a line of certificates.jsonl ({type(error).__name__}): take the bundle again"
            yield f"line {number}", [Check("line", passed=False, detail=detail, strength="checked offline")]


def _label(body: Any, name: str) -> Check:
    said = read_json(base64.b64decode(body["certificate"]["payload"]))["predicate"]
    found = f"{said['request']['id']} {said['model']['name']}"
    return Check("line", passed=found == name, detail=f"the certificate is of {found}", strength="checked offline")
