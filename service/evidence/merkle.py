"""The ledger's tree (RFC 6962, section 2.1): growing it, proofs of inclusion and of consistency, and their checks.

Hashes are read tile by tile, as C2SP tlog-tiles cuts the tree: the same code proves from a database and from files.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from shards.merkle import leaf_hash, node_hash, root_of_hashes

__all__ = ["CompactRange", "Node", "Tree", "leaf_hash", "node_hash", "root_of_hashes", "verify_consistency",
           "verify_inclusion"]  # fmt: skip

TILE_HEIGHT = 8
TILE_WIDTH = 1 << TILE_HEIGHT


@dataclass(frozen=True, slots=True)
class Node:
    """Root of a full subtree of 256**level leaves, the `position`th of them."""

    level: int
    position: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class CompactRange:
    """What appending needs of the `size` leaves before: the roots of their full subtrees, the largest first."""

    size: int = 0
    peaks: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        """Refuse peaks that are not one per bit of the size, with `ValueError`."""
        if len(self.peaks) != self.size.bit_count():
            raise ValueError(f"a tree of {self.size} leaves has {self.size.bit_count()} peaks, not {len(self.peaks)}")

    @property
    def root(self) -> bytes:
        """The tree's root."""
        if not self.peaks:
            return root_of_hashes([])
        return reduce(lambda right, left: node_hash(left, right), reversed(self.peaks))

    def extend(self, leaf_hashes: Iterable[bytes]) -> "tuple[CompactRange, list[Node]]":
        """The range with these leaves after its own, and the tile nodes (level 1 and up) that they completed."""
        peaks, size, nodes = list(self.peaks), self.size, list[Node]()
        for each in leaf_hashes:
            node, height = each, 0
            while size >> height & 1:
                node = node_hash(peaks.pop(), node)
                height += 1
                if height % TILE_HEIGHT == 0:
                    nodes.append(Node(height // TILE_HEIGHT, size >> height, node))
            peaks.append(node)
            size += 1
        return CompactRange(size, tuple(peaks)), nodes


class Tree:
    """A tree of `size` leaves whose hashes are read when they are needed, a tile at most once."""

    def __init__(self, size: int, read: Callable[[int, int, int], Sequence[bytes]]) -> None:
        """`read(level, tile, width)` gives the first `width` hashes of a tile."""
        self.size = size
        self._read = read
        self._tiles: dict[tuple[int, int], Sequence[bytes]] = {}

    def root(self) -> bytes:
        """The root over all leaves."""
        return self.subtree(0, self.size) if self.size else root_of_hashes([])

    def inclusion(self, index: int) -> list[bytes]:
        """PATH(index, D[size]): the siblings from the leaf up.

        Raises:
            ValueError: there is no such leaf.
        """
        if not 0 <= index < self.size:
            raise ValueError(f"a tree of {self.size} leaves has no leaf {index}")
        start, stop, path = 0, self.size, list[tuple[int, int]]()
        while stop - start > 1:
            middle = start + _split(stop - start)
            if index < middle:
                path.append((middle, stop))
                stop = middle
            else:
                path.append((start, middle))
                start = middle
        return [self.subtree(*span) for span in reversed(path)]

    def consistency(self, old: int) -> list[bytes]:
        """PROOF(old, D[size]).

        Raises:
            ValueError: `old` is 0 or above the size.
        """
        if not 0 < old <= self.size:
            raise ValueError(f"no tree of {old} leaves can be the beginning of one of {self.size}")
        start, stop, whole, path = 0, self.size, True, list[tuple[int, int]]()
        while stop != old:
            middle = start + _split(stop - start)
            if old <= middle:
                path.append((middle, stop))
                stop = middle
            else:
                path.append((start, middle))
                start, whole = middle, False
        if not whole:
            path.append((start, stop))
        return [self.subtree(*span) for span in reversed(path)]

    def subtree(self, start: int, stop: int) -> bytes:
        """MTH(D[start:stop]) of a node of this tree or of a tree that this one continues."""
        count = stop - start
        if count & (count - 1):
            middle = start + _split(count)
            return node_hash(self.subtree(start, middle), self.subtree(middle, stop))
        level, inside = divmod(count.bit_length() - 1, TILE_HEIGHT)
        tile, first = divmod(start >> TILE_HEIGHT * level, TILE_WIDTH)
        return root_of_hashes(self._tile(level, tile)[first : first + (1 << inside)])

    def _tile(self, level: int, tile: int) -> Sequence[bytes]:
        if (level, tile) not in self._tiles:
            width = min(TILE_WIDTH, (self.size >> TILE_HEIGHT * level) - tile * TILE_WIDTH)
            found = self._read(level, tile, width)
            if len(found) != width:
                raise ValueError(f"tile {tile} of level {level} has {len(found)} hashes instead of {width}")
            self._tiles[level, tile] = found
        return self._tiles[level, tile]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether the leaf of this hash is the `index`th of `size` under `root` (RFC 9162, section 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    first, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if first & 1 or first == last:
            found = node_hash(sibling, found)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        first, last = first >> 1, last >> 1
    return last == 0 and found == root


def verify_consistency(old: int, new: int, proof: Sequence[bytes], old_root: bytes, new_root: bytes) -> bool:
    """Whether the tree of `new` leaves continues that of `old` leaves (RFC 9162, section 2.1.4.2)."""
    if old == new:
        return not proof and old_root == new_root
    if not 0 < old < new or not proof:
        return False
    path = [old_root, *proof] if old & (old - 1) == 0 else list(proof)
    first, last = old - 1, new - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    before = after = path[0]
    for each in path[1:]:
        if last == 0:
            return False
        if first & 1 or first == last:
            before, after = node_hash(each, before), node_hash(each, after)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            after = node_hash(after, each)
        first, last = first >> 1, last >> 1
    return last == 0 and before == old_root and after == new_root


def _split(count: int) -> int:
    """The largest power of two below `count`."""
    return 1 << ((count - 1).bit_length() - 1)
