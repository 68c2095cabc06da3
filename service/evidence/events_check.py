"""Events that were handed out, against the log that they are said to be of: each leaf at its place, opened or not."""

import json
from collections.abc import Iterable
from typing import Any

from service.evidence.leaves import open_leaf, parse_leaf
from service.evidence.ledger_check import Fetch, Files, LedgerError
from service.evidence.merkle import TILE_WIDTH
from service.evidence.tiles import Tile, read_bundle


def check_events(lines: Iterable[bytes], fetch: Fetch, size: int) -> tuple[int, int]:
    """How many events there are and how many of them are opened; the log of `size` leaves was checked before.

    Each line is a JSON object with `index`, `leaf` and `opening` (null where it is not at hand).

    Raises:
        LedgerError: the log has another leaf there, or the opening is not the leaf's.
        ValueError: a line is none of an export's.
    """
    files = Files(fetch, size)
    number, entries = -1, list[bytes]()
    found = opened = 0
    for line in lines:
        index, leaf, opening = _read(line)
        if index // TILE_WIDTH != number:
            number = index // TILE_WIDTH
            width = min(TILE_WIDTH, size - number * TILE_WIDTH)
            entries = read_bundle(files.tile(Tile(-1, number, width)) or b"") if index < size else []
        at = index % TILE_WIDTH
        if index >= size or at >= len(entries) or entries[at] != leaf:
            raise LedgerError(index, "the log has another leaf here than the events that were handed out")
        found += 1
        if opening is not None:
            try:
                open_leaf(parse_leaf(leaf), opening)
            except ValueError as error:
                raise LedgerError(index, str(error)) from None
            opened += 1
    return found, opened


def _read(line: bytes) -> tuple[int, bytes, bytes | None]:
    try:
        body: dict[str, Any] = json.loads(line)
        index, leaf, opening = body["index"], body["leaf"].encode(), body["opening"]
        opening = None if opening is None else opening.encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        index, leaf, opening = None, b"", None
    if type(index) is not int or index < 0:
        raise ValueError("a line that is no event of an export: take events.jsonl of an evidence bundle")
    return index, leaf, opening
