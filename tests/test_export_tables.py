"""Rows as files: what spreadsheets would calculate is text, moments are UTC, pieces stay small, nothing is lost."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from random import Random
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from service.reports.bundle import File, write_zip
from service.reports.readme import readme
from service.reports.tables import GROUP, ROWS, WRITERS, columns_of

HOSTILE = [
    *"=+-@",
    "=1+1",
    '=HYPERLINK("http://x","y")',
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\0=1",
    "  =1",
    "＝1",  # noqa: RUF001 - full-width
    "＋1",  # noqa: RUF001
    "－1",  # noqa: RUF001
    "＠x",  # noqa: RUF001
]


@dataclass(frozen=True, slots=True)
class Row:
    key: UUID
    text: str | None
    whole: int
    share: float | None
    yes: bool
    at: datetime | None


def row(text: str | None, number: int = 1) -> Row:
    at = datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    return Row(UUID(int=number), text, -number, None if number % 2 else -0.5, number % 3 == 0, at)


def parsed(form: str, data: bytes) -> list[dict[str, Any]]:
    if form == "jsonl":
        return [json.loads(line) for line in data.decode().split("\n") if line]
    if form == "csv":
        return list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    return parquet.read_table(io.BytesIO(data)).to_pylist()


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_begins_as_a_formula_does(text: str) -> None:
    data = b"".join(WRITERS["csv"](Row, [row(text)]))
    (found,) = parsed("csv", data)
    assert found["text"] == "'" + text
    for form in ("jsonl", "parquet"):  # these are typed: nobody calculates them
        (same,) = parsed(form, b"".join(WRITERS[form](Row, [row(text)])))
        assert same["text"] == text


@given(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
def test_any_text_comes_back(texts: list[str | None]) -> None:
    rows = [row(text, number) for number, text in enumerate(texts)]
    for form, write in WRITERS.items():
        found = parsed(form, b"".join(write(Row, rows)))
        assert len(found) == len(rows)
        for each, text in zip(found, texts, strict=True):
            shown = each["text"]
            if form == "csv":
                assert shown in {text or "", f"'{text}"}
                assert not shown[:1].isspace()
                assert not shown.startswith(("=", "+", "-", "@"))
            else:
                assert shown == text


def test_types_in_each_format() -> None:
    one = row("x", 4)
    assert parsed("jsonl", b"".join(WRITERS["jsonl"](Row, [one]))) == [
        {
            "key": str(one.key),
            "text": "x",
            "whole": -4,
            "share": -0.5,
            "yes": False,
            "at": "2025-12-31T23:00:00.000000Z",
        }
    ]
    assert parsed("csv", b"".join(WRITERS["csv"](Row, [one]))) == [
        {"key": str(one.key), "text": "x", "whole": "-4", "share": "-0.5", "yes": "false",
         "at": "2025-12-31T23:00:00.000000Z"}
    ]  # fmt: skip
    (stored,) = parsed("parquet", b"".join(WRITERS["parquet"](Row, [one])))
    assert stored == {"key": str(one.key), "text": "x", "whole": -4, "share": -0.5, "yes": False, "at": one.at}
    assert stored["at"].utcoffset() == timedelta(0)
    assert [name for name, _ in columns_of(Row)] == list(stored)


@pytest.mark.parametrize(("form", "most"), [("jsonl", ROWS), ("csv", ROWS), ("parquet", GROUP)])
def test_rows_are_taken_as_they_are_needed(form: str, most: int) -> None:
    taken = 0

    def rows() -> Iterator[Row]:
        nonlocal taken
        for number in range(3 * most):
            taken += 1
            yield row("x", number)

    pieces = WRITERS[form](Row, rows())
    assert next(pieces)
    assert taken <= most
    rest = b"".join(pieces)
    assert rest
    assert taken == 3 * most


def test_a_zip_is_made_while_it_is_read() -> None:
    made: list[str] = []

    def file(name: str, pieces: Callable[[], Iterator[bytes]]) -> File:
        def opened() -> Iterator[bytes]:
            made.append(name)
            return pieces()

        return File(name, opened)

    block = datetime.now(UTC).isoformat().encode() * 100
    noise = [Random(number).randbytes(4096) for number in range(256)]
    files = [file("a/one.txt", lambda: iter([block])), file("two", lambda: iter(noise)), file("none", lambda: iter([]))]
    pieces = write_zip(files)
    data = next(pieces)
    assert made == ["a/one.txt", "two"]
    data += b"".join(pieces)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["a/one.txt", "two", "none"]
        assert archive.read("a/one.txt") == block
        assert archive.read("two") == b"".join(noise)
    again = [File("a/one.txt", lambda: [block]), File("two", lambda: noise), File("none", list)]
    assert b"".join(write_zip(again)) == data


def test_the_readme_names_what_it_is_about() -> None:
    text = readme(datetime(2026, 1, 1, tzinfo=UTC), None, None, empty=False, rotated=False)
    assert "from 2026-01-01T00:00:00.000000Z until this was made" in text
    assert "No request was received" not in text
    assert "No request was received" in readme(None, None, None, empty=True, rotated=False)
    assert str(UUID(int=7)) in readme(None, None, UUID(int=7), empty=False, rotated=False)
    assert "{" not in text
