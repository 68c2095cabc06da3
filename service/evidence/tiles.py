"""The ledger as files (C2SP tlog-tiles): names and contents of hash tiles and entry bundles."""

from collections.abc import Sequence
from typing import NamedTuple

from service.evidence.merkle import TILE_HEIGHT, TILE_WIDTH

CHECKPOINT = "checkpoint"
HASH_BYTES = 32


class Tile(NamedTuple):
    """A tile at one moment: the first `width` of its 256 places are filled."""

    level: int
    """-1: the entries themselves, as bundles."""
    number: int
    width: int

    @property
    def path(self) -> str:
        """Its name below the log's prefix; 1,234,067 is x001/x234/067."""
        level = "entries" if self.level < 0 else str(self.level)
        return f"tile/{level}/{numbered(self.number, self.width)}"


def numbered(number: int, width: int) -> str:
    """The last part of a tile's name, with its width while it is partial."""
    parts = [f"{number % 1000:03}"]
    while number := number // 1000:
        parts.insert(0, f"x{number % 1000:03}")
    return "/".join(parts) + (f".p/{width}" if width < TILE_WIDTH else "")


def added_tiles(old: int, new: int) -> list[Tile]:
    """The hash tiles that a tree of `new` leaves has and one of `old` leaves lacks; entries lie as level 0 does."""
    tiles: list[Tile] = []
    level = 0
    while count := new >> TILE_HEIGHT * level:
        before = old >> TILE_HEIGHT * level
        if before < count:
            numbers = range(before // TILE_WIDTH, (count - 1) // TILE_WIDTH + 1)
            tiles.extend(Tile(level, number, min(TILE_WIDTH, count - number * TILE_WIDTH)) for number in numbers)
        level += 1
    return tiles


def write_bundle(entries: Sequence[bytes]) -> bytes:
    """Entries, each after its length as a big-endian uint16."""
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def read_bundle(data: bytes) -> list[bytes]:
    """The entries of a bundle, as far as it is whole: one that was cut gives those before the cut."""
    entries: list[bytes] = []
    at, end = 0, len(data)
    while at + 2 <= end:
        stop = at + 2 + (data[at] << 8 | data[at + 1])
        if stop > end:
            break
        entries.append(data[at + 2 : stop])
        at = stop
    return entries


def read_hashes(data: bytes) -> list[bytes]:
    """The hashes of a tile."""
    return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]
