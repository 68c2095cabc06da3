"""What commands share: options, how results are printed, and the error that ends a command."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

StateDir = Annotated[Path, typer.Option("--state", help="State directory of `expunge up`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
STATE = Path(".expunge")


class CommandError(Exception):
    """A command failed; the message says what to do next. `main` prints it on stderr and exits with 1."""


def show(value: Any, lines: Iterable[str], *, as_json: bool) -> None:
    """Print the value as JSON, or the lines for people."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
        return
    for line in lines:
        print(line)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Columns as wide as they need; plain text, so that it can be piped."""
    cells = [list(header), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def complain(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"expunge: {message}\n")
