"""Rows of one dataclass as a file, made piece by piece: however long it is, only some thousand rows are in memory."""

import csv
import io
import json
import types
import typing
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import fields
from datetime import datetime
from itertools import islice
from operator import attrgetter
from typing import Any
from uuid import UUID

from service.evidence.leaves import moment
from service.reports.pieces import Pieces

ROWS = 500
"""Rows of a piece of text."""
GROUP = 5_000
"""Rows of a row group of Parquet."""
FORMULA = ("=", "+", "-", "@", "\0", "＝", "＋", "－", "＠")  # noqa: RUF001 - the full-width forms count, too
"""What spreadsheets take for the beginning of a formula (OWASP, CSV injection; ASVS 5.0, 1.2.10)."""

Rows = Iterable[Any]
"""Instances of one dataclass whose fields are texts, numbers, truth values, moments, UUIDs, or None."""


def write_jsonl(kind: type, rows: Rows, *, at_once: int = ROWS) -> Generator[bytes]:
    """JSON Lines: an object a line, every field of the class in each; `at_once`: lines of a piece."""
    names = [field.name for field in fields(kind)]
    for batch in _batches(rows, kind, at_once):
        yield b"".join(
            json.dumps(dict(zip(names, map(_plain, row), strict=True)), ensure_ascii=False).encode() + b"\n"
            for row in batch
        )


def write_csv(kind: type, rows: Rows) -> Generator[bytes]:
    """CSV (RFC 4180), UTF-8, with a header; every cell quoted, and none that a spreadsheet would calculate."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    writer.writerow([field.name for field in fields(kind)])
    for batch in _batches(rows, kind, ROWS):
        writer.writerows([_cell(value) for value in row] for row in batch)
        yield _drain(buffer)
    yield _drain(buffer)


def write_parquet(kind: type, rows: Rows) -> Generator[bytes]:
    """Parquet, a row group every `GROUP` rows; moments in UTC with microseconds, UUIDs as text."""
    # Deferred: half a second that no other format takes.
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    of: dict[type, Any] = {
        str: pa.string(),
        UUID: pa.string(),
        int: pa.int64(),
        float: pa.float64(),
        bool: pa.bool_(),
        datetime: pa.timestamp("us", tz="UTC"),
    }
    columns = [(name, of[base], base is UUID) for name, base in columns_of(kind)]
    schema = pa.schema([pa.field(name, type_) for name, type_, _ in columns])
    out = Pieces()
    with parquet.ParquetWriter(out, schema, compression="zstd") as writer:
        for batch in _batches(rows, kind, GROUP):
            arrays = [
                pa.array([str(v) if is_uuid and v is not None else v for v in values], type_)
                for values, (_, type_, is_uuid) in zip(zip(*batch, strict=True), columns, strict=True)
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema), row_group_size=GROUP)
            yield out.drain()
    yield out.drain()


WRITERS: dict[str, Callable[[type, Rows], Generator[bytes]]] = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
}


def columns_of(kind: type) -> list[tuple[str, type]]:
    """The table's columns: name and type, None left out."""
    hints = typing.get_type_hints(kind)
    return [(field.name, _base(hints[field.name])) for field in fields(kind)]


def _batches(rows: Rows, kind: type, size: int) -> Iterator[list[tuple[Any, ...]]]:
    values = attrgetter(*(field.name for field in fields(kind)))
    each = iter(rows)
    while batch := [values(row) for row in islice(each, size)]:
        yield batch


def _base(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return moment(value)
    return str(value) if isinstance(value, UUID) else value


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return str(_plain(value))
    # A quote in front makes it text. Spreadsheets look behind white space, so tab and line breaks count as well.
    return f"'{value}" if value[:1].isspace() or value.startswith(FORMULA) else value


def _drain(buffer: io.StringIO) -> bytes:
    text = buffer.getvalue()
    buffer.seek(0)
    buffer.truncate()
    return text.encode()
