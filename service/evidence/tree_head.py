"""Signed tree heads (C2SP tlog-checkpoint), and proofs that carry one (C2SP tlog-proof)."""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from service.evidence import note
from service.evidence.merkle import verify_inclusion
from service.evidence.signers import SigningKey

PROOF = "c2sp.org/tlog-proof@v1"
SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


class KeyHistory(Protocol):
    """Keys of one log, each from a size of the tree on."""

    def for_size(self, size: int) -> Ed25519PublicKey:
        """The key that signs tree heads of that size."""
        ...


Verifier = Ed25519PublicKey | KeyHistory


class TreeHeadError(ValueError):
    """Not a tree head or proof of this log; the message says why."""


class ForkError(TreeHeadError):
    """Two tree heads of one log that cannot both be true; the message names both."""

    def __init__(self, one: "TreeHead", other: "TreeHead") -> None:
        """The two heads."""
        super().__init__(f"FORK: {one} and {other} are not of one ledger: keep both, and ask the operator")


@dataclass(frozen=True, slots=True)
class TreeHead:
    """The state of a log at one size."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The text that is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    def __str__(self) -> str:
        """How messages name it."""
        return f"the tree head of size {self.size} with root {self.root.hex()}"


def sign_head(head: TreeHead, key: SigningKey) -> str:
    """The checkpoint: a signed note. Ed25519 is deterministic: the same head gives the same note."""
    return str(note.sign(head.text, head.origin, key))


def read_head(checkpoint: str) -> TreeHead:
    """What a checkpoint says; its signature is not checked.

    Raises:
        TreeHeadError: not a checkpoint.
    """
    try:
        origin, size, root, *_extensions = note.parse(checkpoint).text.split("\n")
        found = base64.b64decode(root, validate=True)
    except (note.NoteError, ValueError, binascii.Error):
        raise TreeHeadError("not a checkpoint: origin, size and root, signed as a note") from None
    if not note.NAME.fullmatch(origin) or not SIZE.fullmatch(size) or len(found) != 32:
        raise TreeHeadError("not a checkpoint: its origin, size or root is not of the form that C2SP gives")
    return TreeHead(origin, int(size), found)


def open_head(checkpoint: str, key: Verifier, *, origin: str | None = None) -> TreeHead:
    """What a checkpoint says, once its signature holds.

    Raises:
        TreeHeadError: not a checkpoint, not signed by the key, or of another log than `origin`.
    """
    head = read_head(checkpoint)
    if origin is not None and head.origin != origin:
        raise TreeHeadError(f"the checkpoint is of the log {head.origin}, not of {origin}")
    public = key if isinstance(key, Ed25519PublicKey) else key.for_size(head.size)
    try:
        note.require_signature(note.parse(checkpoint), head.origin, public)
    except note.NoteError as error:
        raise TreeHeadError(str(error)) from None
    return head


def write_proof(index: int, path: Sequence[bytes], checkpoint: str) -> str:
    """An inclusion proof with its checkpoint as one text (C2SP tlog-proof)."""
    hashes = "".join(f"{base64.b64encode(each).decode()}\n" for each in path)
    return f"{PROOF}\nindex {index}\n{hashes}\n{checkpoint}"


def check_proof(proof: str, leaf_hash: bytes, key: Verifier) -> tuple[int, TreeHead]:
    """The index of the leaf, and the signed tree head that it is under.

    Raises:
        TreeHeadError: not a proof, not signed by the key, or not of this leaf.
    """
    body, found, checkpoint = proof.partition("\n\n")
    kind, *lines = body.split("\n")
    if not found or kind != PROOF or not lines:
        raise TreeHeadError(f"not a proof: its first line is {PROOF}")
    if lines[0].startswith("extra "):
        lines = lines[1:]
    word, _, number = lines[0].partition(" ") if lines else ("", "", "")
    try:
        path = [base64.b64decode(line, validate=True) for line in lines[1:]]
    except (binascii.Error, ValueError):
        path = [b""]
    if word != "index" or not SIZE.fullmatch(number) or any(len(each) != 32 for each in path):
        raise TreeHeadError("not a proof: an index and SHA-256 hashes in base64")
    head = open_head(checkpoint, key)
    if not verify_inclusion(leaf_hash, int(number), head.size, path, head.root):
        raise TreeHeadError(f"the leaf is not number {number} under {head}")
    return int(number), head
