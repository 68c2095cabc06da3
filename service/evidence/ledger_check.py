"""The check of a whole ledger from its files alone: every leaf is hashed again, up to the signed root.

An auditor reads it; it needs no database, no network and nothing of the writer but the hash functions and formats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256

from service.evidence.leaves import LEAF
from service.evidence.merkle import TILE_WIDTH, Tree, root_of_hashes
from service.evidence.tiles import CHECKPOINT, HASH_BYTES, Tile, read_bundle, read_hashes
from service.evidence.tree_head import ForkError, TreeHead, TreeHeadError, Verifier, open_head

Fetch = Callable[[str], bytes | None]
"""A file of the log by its name; None where there is none."""


class LedgerError(ValueError):
    """The ledger is not what its tree head says; the message says from where on."""

    def __init__(self, index: int, message: str) -> None:
        """`index`: the first leaf that cannot be relied upon."""
        super().__init__(f"leaf {index}: {message}")
        self.index = index


@dataclass(frozen=True, slots=True)
class Report:
    """What was found to hold."""

    head: TreeHead
    since: TreeHead | None
    """The older tree head that this one continues."""
    back: timedelta
    """The furthest that a leaf's time lies before that of the leaf in front of it."""
    back_at: int | None
    """That leaf."""


class Files:
    """Tiles of a log of `size` leaves, each fetched as it is at that size or, once it is full, whole."""

    def __init__(self, fetch: Fetch, size: int) -> None:
        """`fetch` as in `check`."""
        self._fetch = fetch
        self._size = size

    def tile(self, tile: Tile) -> bytes | None:
        """The tile's bytes; more than its width where only the full tile is left."""
        found = self._fetch(tile.path)
        return self._fetch(tile._replace(width=TILE_WIDTH).path) if found is None else found

    def hashes(self, level: int, number: int, width: int) -> Sequence[bytes]:
        """For `Tree`: the first hashes of a tile, or fewer where it is missing or cut."""
        return read_hashes((self.tile(Tile(level, number, width)) or b"")[: width * HASH_BYTES])

    def tree(self) -> Tree:
        """The tree that the hash tiles make."""
        return Tree(self._size, self.hashes)


def check(
    fetch: Fetch, key: Verifier, *, old: str | None = None, on_leaves: Callable[[int, int], None] | None = None
) -> Report:
    """Check entries, tiles, root and signature; with `old`, also that nothing before that checkpoint was changed.

    Raises:
        LedgerError: a leaf or tile is missing, cut, edited or out of order.
        ForkError: the older tree head is not of this ledger; the message names both.
        TreeHeadError: there is no signed checkpoint.
    """
    found = fetch(CHECKPOINT)
    if found is None:
        raise TreeHeadError("there is no checkpoint: give the directory or URL that holds it, and tile/ beside it")
    head = open_head(found.decode(errors="replace"), key)
    before = open_head(old, key, origin=head.origin) if old is not None else None
    files, backward = Files(fetch, head.size), _Backward()
    roots: list[bytes] = []
    for first in range(0, head.size, TILE_WIDTH):
        tile = Tile(-1, first // TILE_WIDTH, min(TILE_WIDTH, head.size - first))
        roots.append(_leaves(files, tile, backward))
        if on_leaves is not None:
            on_leaves(first + tile.width, head.size)
    root = _upper(files, roots, head.size)
    if root != head.root:
        raise LedgerError(0, f"entries and tiles agree, but their root is {root.hex()}, and {head} was signed")
    if before is not None:
        _require_continued(files.tree(), before, head)
    return Report(head, before, backward.most, backward.at)


def _require_continued(tree: Tree, before: TreeHead, head: TreeHead) -> None:
    if before.size > head.size:
        raise LedgerError(head.size, f"the ledger was cut: {before} was signed, and here is only {head}")
    if (tree.subtree(0, before.size) if before.size else root_of_hashes([])) != before.root:
        raise ForkError(before, head)


def _leaves(files: Files, tile: Tile, backward: "_Backward") -> bytes:
    """Check one bundle of entries against its hash tile; the root over its leaves."""
    first = tile.number * TILE_WIDTH
    entries = read_bundle(files.tile(tile) or b"")[: tile.width]
    times: list[bytes] = []
    for index, entry in enumerate(entries, first):
        match = LEAF.fullmatch(entry)
        if match is None:
            raise LedgerError(index, "the entry is not of a leaf's form: it was edited")
        if int(match[3]) != index:
            raise LedgerError(index, f"here lies the leaf that was number {int(match[3])}: the order was changed")
        times.append(match[5])
    hashes = [sha256(b"\x00" + entry).digest() for entry in entries]
    data = (files.tile(tile._replace(level=0)) or b"")[: tile.width * HASH_BYTES]
    if b"".join(hashes) != data:
        said = read_hashes(data)
        wrong = next((k for k, (one, other) in enumerate(zip(hashes, said, strict=False)) if one != other), None)
        if wrong is not None:
            raise LedgerError(first + wrong, "the entry does not have the hash that its tile holds: one was edited")
        if len(hashes) >= tile.width:
            raise LedgerError(first + len(said), f"{tile._replace(level=0).path} is missing or cut")
    if len(entries) < tile.width:
        raise LedgerError(first + len(entries), f"{tile.path} is missing or cut")
    backward.look(first, times)
    return root_of_hashes(hashes)


def _upper(files: Files, roots: list[bytes], size: int) -> bytes:
    """Check the tiles above the leaves against the roots of those below; the root of all."""
    level, span = 1, TILE_WIDTH
    edge = roots[size // TILE_WIDTH :]  # the root of the tree's right edge, which is in no full tile; at most one
    roots = roots[: size // TILE_WIDTH]
    while roots:
        for first in range(0, len(roots), TILE_WIDTH):
            ours = roots[first : first + TILE_WIDTH]
            tile = Tile(level, first // TILE_WIDTH, len(ours))
            theirs = files.hashes(*tile)
            wrong = next((k for k, each in enumerate(ours) if k >= len(theirs) or theirs[k] != each), None)
            if wrong is not None:
                raise LedgerError((first + wrong) * span, f"{tile.path} is cut, or of other leaves from here on")
        whole = len(roots) // TILE_WIDTH
        rest = [*roots[whole * TILE_WIDTH :], *edge]
        edge = [root_of_hashes(rest)] if rest else []
        roots = [root_of_hashes(roots[k * TILE_WIDTH : (k + 1) * TILE_WIDTH]) for k in range(whole)]
        level, span = level + 1, span * TILE_WIDTH
    return root_of_hashes(edge)


@dataclass(slots=True)
class _Backward:
    """The largest step back in time: order is by index, not by clock, so a step back is told and not refused."""

    most: timedelta = timedelta(0)
    at: int | None = None
    last: bytes = b""

    def look(self, first: int, times: list[bytes]) -> None:
        """Compare each time with the one before it; such texts sort as the moments do."""
        before = self.last
        for index, time in enumerate(times, first):
            if time < before:
                try:
                    step = datetime.fromisoformat(before.decode()) - datetime.fromisoformat(time.decode())
                except ValueError:
                    raise LedgerError(index, "the entry's time is none: it was edited") from None
                if step > self.most:
                    self.most, self.at = step, index
            before = time
        self.last = before
