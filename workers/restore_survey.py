"""How far database, artefact store and high-water file go, and whether they are of one history."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from json import loads

from service.evidence.leaves import Leaf, open_leaf, parse_leaf
from service.evidence.ledger_check import Files, LedgerError, check
from service.evidence.merkle import TILE_WIDTH, leaf_hash
from service.evidence.tiles import CHECKPOINT, Tile, read_bundle
from service.evidence.tree_head import ForkError, TreeHead, TreeHeadError, Verifier, open_head
from service.store import ledger
from service.store.database import Connection
from service.store.ledger_files import LedgerFiles
from service.store.restores import Found


class RestoreError(Exception):
    """A restore cannot go on; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Sizes of the ledger, as each place knows it."""

    database: int
    files: TreeHead | None
    """The store's checkpoint, if its signature and the root of the entries hold."""
    high_water: TreeHead | None
    """The largest tree head that is known from elsewhere."""

    @property
    def here(self) -> int:
        """Leaves that are in the database or in the files."""
        return max(self.database, self.files.size if self.files else 0)

    @property
    def lost(self) -> int:
        """Leaves that were signed and are in neither."""
        return max(0, self.high_water.size - self.here) if self.high_water else 0


def survey(
    connection: Connection,
    files: LedgerFiles,
    keys: Verifier,
    outside: Sequence[bytes],
    *,
    given_up: str | None,
) -> Survey:
    """Read and compare all three.

    Args:
        connection: to the database.
        files: of the ledger, in the artefact store.
        keys: that may have signed.
        outside: the high-water file and other checkpoints that the operator holds.
        given_up: root of a tree head whose leaves are known to be lost.

    Raises:
        ForkError: two of them are not of one history; the message names both.
        RestoreError: the files are damaged and the database does not have what they lack.
    """
    current = ledger.get_head(connection)
    found = _of_files(files, keys, current.size)
    heads = sorted((_open(each, keys) for each in outside), key=lambda head: head.size)
    heads = [head for head in heads if head.root.hex() != given_up]
    if found is not None and found.size > current.size:
        longest = Files(files.read, found.size).tree()
        if current.size and longest.subtree(0, current.size) != current.range.root:
            raise ForkError(TreeHead(found.origin, current.size, current.range.root), found)
    else:
        longest = ledger.tree(connection, current.size)
    for head in [*([found] if found else []), *heads]:
        if head.size <= longest.size and head.size and longest.subtree(0, head.size) != head.root:
            raise ForkError(head, TreeHead(head.origin, head.size, longest.subtree(0, head.size)))
    return Survey(current.size, found, heads[-1] if heads else None)


def read_leaves(files: LedgerFiles, first: int, size: int) -> Iterator[list[Found]]:
    """The leaves from `first` on, a bundle at a time, with their openings; the files were checked before."""
    reader = Files(files.read, size)
    for number in range(first // TILE_WIDTH, (size + TILE_WIDTH - 1) // TILE_WIDTH):
        width = min(TILE_WIDTH, size - number * TILE_WIDTH)
        entries = read_bundle(reader.tile(Tile(-1, number, width)) or b"")[:width]
        openings = {sha256(each).hexdigest(): each for each in files.list_openings(number)}
        leaves = [(parse_leaf(entry), entry) for entry in entries]
        yield [_found(leaf, data, openings.get(leaf.commitment)) for leaf, data in leaves if leaf.index >= first]


def _found(leaf: Leaf, data: bytes, opening: bytes | None) -> Found:
    opened = None
    if opening is not None:
        opened = dict(open_leaf(leaf, opening))
        if opened["body"].keys() == {"not_canonical"}:  # numbers that RFC 8785 has not
            opened["body"] = loads(opened["body"]["not_canonical"])
    return Found(leaf, data, leaf_hash(data), opening, opened)


def _of_files(files: LedgerFiles, keys: Verifier, database: int) -> TreeHead | None:
    data = files.read(CHECKPOINT)
    if data is None:
        return None
    head = _open(data, keys)
    try:
        check(files.read, keys)
    except LedgerError as error:
        if head.size <= database:
            return None  # the database has all of it, and writes it again
        raise RestoreError(
            f"the ledger's files are damaged and the database is older: {error}. Restore the newer of both from a"
            " backup of the artefact store"
        ) from None
    return head


def _open(data: bytes, keys: Verifier) -> TreeHead:
    try:
        return open_head(data.decode(errors="replace"), keys)
    except TreeHeadError as error:
        raise RestoreError(
            f"a checkpoint is not one of ours: {error}. Restore keys/ from your backup, or remove what is not ours"
            " (ledger/checkpoint in the artefact store, or the high-water file)"
        ) from None
