"""Tree heads to hold a certificate against: from files, and with the paths that a ledger's tiles give."""

from collections.abc import Iterable, Sequence
from typing import Any

from service.cli.ledger_commands import open_log
from service.evidence.later import Later
from service.evidence.leaves import parse_leaf
from service.evidence.ledger_check import Fetch, Files, LedgerError
from service.evidence.merkle import TILE_WIDTH, Tree, root_of_hashes
from service.evidence.tiles import CHECKPOINT, HASH_BYTES, Tile, read_bundle, read_hashes
from service.evidence.tree_head import TreeHead, TreeHeadError, read_head


def find_later(mine: dict[str, Any], where: str | None, checkpoints: Sequence[tuple[str, str]]) -> list[Later]:
    """Each tree head given, and the ledger's own, with what shows that it agrees with the certificate's.

    Args:
        mine: the certificate's `ledger`.
        where: the ledger's directory or URL; None: tree heads alone.
        checkpoints: name and content of each file.
    """
    if where is None:
        return [Later(name, text) for name, text in checkpoints]
    with open_log(where) as fetch:
        found = fetch(CHECKPOINT)
        if found is None:
            problem = "there is no checkpoint: give the directory or URL that holds it, and tile/ beside it"
            return [Later(where, "", problem=problem)]
        text = found.decode(errors="replace")
        return [
            _held(mine, fetch, text, name, each)
            for name, each in ((where, text), *((name, each) for name, each in checkpoints))
        ]


def _held(mine: dict[str, Any], fetch: Fetch, log: str, name: str, checkpoint: str) -> Later:
    try:
        ours, log_head, head = read_head(mine["checkpoint"]), read_head(log), read_head(checkpoint)
        if head.origin != ours.origin:
            return Later(name, checkpoint)  # another log's: no path is needed to say so
        _require_whole(log_head, ours, head)
        tree = _signed_tree(fetch, log_head)
        if ours.size and tree.subtree(0, ours.size) == ours.root:  # else it is a fork, which the paths show
            _require_entries(fetch, log_head.size, mine["entries"])
        old, new = sorted((ours.size, head.size))
        path = _tree(fetch, log_head.size, new).consistency(old) if old else []
    except (LedgerError, TreeHeadError) as error:
        return Later(name, checkpoint, problem=str(error))
    return Later(name, checkpoint, path=path)


def _require_whole(log_head: TreeHead, *others: TreeHead) -> None:
    for each in others:
        if each.size > log_head.size:
            raise LedgerError(log_head.size, f"the ledger was cut: {each} was signed, and here is only {log_head}")


def _signed_tree(fetch: Fetch, head: TreeHead) -> Tree:
    tree = _tree(fetch, head.size, head.size)
    if (root := tree.root()) != head.root:
        raise LedgerError(0, f"the tiles give the root {root.hex()}, and {head} was signed: one was edited")
    return tree


def _tree(fetch: Fetch, there: int, size: int) -> Tree:
    """The tree of the first `size` leaves, from the tiles of a ledger of `there` leaves.

    Each full tile that is read is compared with the one above: an edited tile is not taken for a fork.
    """
    files = Files(fetch, there)

    def read(level: int, number: int, width: int) -> Sequence[bytes]:
        span = TILE_WIDTH**level
        tile = Tile(level, number, min(TILE_WIDTH, there // span - number * TILE_WIDTH))
        data = (files.tile(tile) or b"")[: tile.width * HASH_BYTES]
        if len(data) < tile.width * HASH_BYTES:
            raise LedgerError(number * TILE_WIDTH * span, f"{tile.path} is missing or cut")
        hashes = read_hashes(data)
        if tile.width == TILE_WIDTH:
            above, place = divmod(number, TILE_WIDTH)
            if read(level + 1, above, place + 1)[place] != root_of_hashes(hashes):
                raise LedgerError(number * TILE_WIDTH * span, f"{tile.path} or the tile above was edited")
        return hashes[:width]

    return Tree(size, read)


def _require_entries(fetch: Fetch, size: int, entries: Iterable[dict[str, Any]]) -> None:
    """The leaves of the certificate lie in the ledger's bundles as they are."""
    files = Files(fetch, size)
    for entry in entries:
        leaf = entry["leaf"].encode()
        try:
            index = parse_leaf(leaf).index
        except ValueError:
            continue  # the certificate's own check says so
        if index >= size:
            continue
        number, place = divmod(index, TILE_WIDTH)
        tile = Tile(-1, number, min(TILE_WIDTH, size - number * TILE_WIDTH))
        bundle = read_bundle(files.tile(tile) or b"")
        if place >= len(bundle):
            raise LedgerError(index, f"{tile.path} is missing or cut")
        if bundle[place] != leaf:
            raise LedgerError(index, "the ledger holds another entry here: one was edited, or the order was changed")
