"""The ledger's files in the artefact store (C2SP tlog-tiles below `ledger/`), and the high-water file beside the keys.

A tile's name says what is in it, so it is written once and with the same bytes by whoever writes it; the checkpoint
alone is replaced, under a condition. Openings lie beside the tiles, are nobody's to fetch, and are erased by age.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from service.evidence.merkle import TILE_WIDTH
from service.evidence.tiles import CHECKPOINT, Tile, added_tiles, numbered, write_bundle
from service.evidence.tree_head import TreeHeadError
from service.store.artifacts import LEDGER, ArtifactMissingError, Artifacts
from service.store.directory import replace_file

PREFIX = LEDGER
OPENINGS = PREFIX + "openings"
GROUP = 16
"""Tiles whose rows are read at once."""

Read = Callable[[Sequence[Tile]], Sequence[bytes]]
"""Contents of tiles: hashes side by side; bundles for level -1, and one opening a line for level -2."""


def is_ledger_file(name: str) -> bool:
    """Whether an object is the ledger's, which has no row; what an interrupted `put` left is not."""
    return name.startswith(PREFIX) and not name.endswith(".part")


class LedgerFiles:
    """Reads and writes the files."""

    def __init__(self, artifacts: Artifacts) -> None:
        """They lie in the artefact store."""
        self._artifacts = artifacts

    def read(self, name: str) -> bytes | None:
        """A file by its name below the log's prefix; None where there is none."""
        try:
            return self._artifacts.get(PREFIX + name)
        except (ArtifactMissingError, NotADirectoryError, IsADirectoryError):
            return None

    def write(self, old: int, new: int, read: Read) -> None:
        """Write what a log of `new` leaves has and one of `old` leaves lacks.

        Raises:
            TreeHeadError: a file of such a name is there with other bytes.
        """
        tiles: list[Tile] = []
        for tile in added_tiles(old, new):
            tiles += [tile] if tile.level else [tile, tile._replace(level=-1), tile._replace(level=-2)]
        for at in range(0, len(tiles), GROUP):
            group = tiles[at : at + GROUP]
            for tile, data in zip(group, read(group), strict=True):
                self._put(_name(tile), data, same=tile.level > -2)
        for tile in tiles:
            if tile.width == TILE_WIDTH:
                for name in self._artifacts.names_below(_name(tile) + ".p"):
                    self._artifacts.delete(name)

    def list_openings(self, number: int) -> list[bytes]:
        """The openings that are left of the leaves of a full or partial bundle, in no order."""
        name = f"{OPENINGS}/{numbered(number, TILE_WIDTH)}"
        below = [found for kind in (".p", ".from") for found in self._artifacts.names_below(name + kind)]
        read = (self.read(found.removeprefix(PREFIX)) for found in (name, *below))
        return [line for data in read if data for line in data.splitlines()]

    def publish(self, checkpoint: str, *, expected: bytes | None) -> bool:
        """Put a checkpoint in the place of the one that was read; False where another writer was first."""
        try:
            self._artifacts.replace(PREFIX + CHECKPOINT, checkpoint.encode(), expected=expected)
        except FileExistsError:
            return False
        return True

    def erase_openings(self, before: int, left: Sequence[bytes]) -> None:
        """Delete every file with an opening of a leaf below `before`.

        `left`: the openings that follow it in its bundle, which one of these files may have held, too.
        """
        if left:
            first = before % TILE_WIDTH
            name = f"{OPENINGS}/{numbered(before // TILE_WIDTH, TILE_WIDTH)}.from/{first}-{first + len(left)}"
            self._put(name, write_openings(left), same=False)
        for name in self._artifacts.names_below(OPENINGS):
            number, _, part = name.removeprefix(OPENINGS + "/").partition(".")
            kind, _, places = part.partition("/")
            inside = int(places.partition("-")[0]) if kind == "from" else 0
            if int(number.replace("/", "").replace("x", "")) * TILE_WIDTH + inside < before:
                self._artifacts.delete(name)

    def _put(self, name: str, data: bytes, *, same: bool) -> None:
        try:
            self._artifacts.put(name, data)
        except FileExistsError:
            found = self.read(name.removeprefix(PREFIX)) if same else None
            if found not in {None, data}:  # None: another program has replaced it by a longer one meanwhile
                raise TreeHeadError(
                    f"{name} holds other bytes than the database: one of the two was changed. Nothing is signed until"
                    " the newer backup of it is restored"
                ) from None


def _name(tile: Tile) -> str:
    return PREFIX + tile.path if tile.level > -2 else f"{OPENINGS}/{numbered(tile.number, tile.width)}"


def write_openings(openings: Sequence[bytes]) -> bytes:
    """One opening a line: canonical JSON has no line breaks."""
    return b"".join(opening + b"\n" for opening in openings)


def contents(tile: Tile, hashes: Sequence[bytes]) -> bytes:
    """A tile of these hashes or entries."""
    if tile.level == -2:
        return write_openings(hashes)
    return write_bundle(hashes) if tile.level == -1 else b"".join(hashes)


def read_high_water(path: Path) -> bytes | None:
    """The largest checkpoint that left this machine; None before the first."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def write_high_water(path: Path, checkpoint: str, *, expected: bytes | None) -> bool:
    """Keep a checkpoint apart from database and bucket: only it shows that both are older.

    Put in the place of the one that was read, so that it never goes down; False where another writer was first.
    """
    try:
        replace_file(path, checkpoint.encode(), expected=expected)
    except FileExistsError:
        return False
    return True
