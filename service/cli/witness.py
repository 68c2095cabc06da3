"""A witness: a second party that cosigns tree heads (C2SP tlog-cosignature), each a continuation of the last one.

An operator who rewrites the ledger needs a tree head that this witness will not cosign, or one that contradicts what it
has. It sees hashes, and no leaf. Run it elsewhere and under another's control, or it witnesses nothing.
"""

from pathlib import Path

from service.evidence.ledger_check import Fetch, Files, LedgerError
from service.evidence.merkle import verify_consistency
from service.evidence.note import cosign, parse
from service.evidence.signers import SigningKey
from service.evidence.tiles import CHECKPOINT
from service.evidence.tree_head import ForkError, TreeHead, TreeHeadError, Verifier, open_head
from service.store.directory import replace_file


def witness(fetch: Fetch, key: Verifier, name: str, mine: SigningKey, state: Path, *, now: int) -> str:
    """The log's checkpoint with our cosignature; what we saw is kept in `state` before anybody gets it.

    Raises:
        ForkError: it contradicts what we cosigned last; the message names both.
        LedgerError: it is smaller.
        TreeHeadError: it is not signed by `key`, its tiles are not its own, or another run cosigned meanwhile.
    """
    found = fetch(CHECKPOINT)
    if found is None:
        raise TreeHeadError("there is no checkpoint: give the directory or URL that holds it")
    checkpoint = found.decode(errors="replace")
    head = open_head(checkpoint, key)
    seen = state.read_bytes() if state.exists() else None
    if seen is not None:
        require_continuation(fetch, open_head(seen.decode(errors="replace"), key, origin=head.origin), head)
    cosigned = str(cosign(parse(checkpoint), name, mine, now))
    try:
        replace_file(state, cosigned.encode(), expected=seen)
    except FileExistsError:
        raise TreeHeadError("another run has cosigned meanwhile: run again") from None
    return cosigned


def require_continuation(fetch: Fetch, before: TreeHead, head: TreeHead) -> None:
    """Do nothing where the tree of `head` begins with that of `before`, by a consistency proof from its tiles."""
    if before.size > head.size:
        raise LedgerError(head.size, f"the log was cut: {before} was cosigned, and here is only {head}")
    tree = Files(fetch, head.size).tree()
    try:
        root = tree.root()
        proof = tree.consistency(before.size)
    except ValueError as error:
        raise TreeHeadError(f"no proof can be made from the tiles: {error}") from None
    if root != head.root:
        raise TreeHeadError(f"the tiles are not those of {head}")
    if not verify_consistency(before.size, head.size, proof, before.root, head.root):
        raise ForkError(before, head)
