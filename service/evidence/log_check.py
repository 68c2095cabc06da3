"""The ledger as a verifier sees it: leaves, what opens them, Merkle paths (RFC 6962), signed tree heads (C2SP).

Written a second time, from the specifications: nothing here is shared with the program that keeps the ledger.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from service.evidence.opening import Key, Refused, read_json, require
from shards.merkle import leaf_hash, node_hash

LEAF = {"type", "index", "event_id", "kind", "time", "commitment"}
OPENING = {"type", "salt", "event_id", "request_id", "model_id", "body"}
HEAD = re.compile(r"([^\s+]+)\n(0|[1-9][0-9]{0,18})\n([A-Za-z0-9+/]{43}=)\n(?:[^\n]+\n)*")
SIGNATURE = re.compile(r"\u2014 (\S+) (\S+)")


@dataclass(frozen=True, slots=True)
class Head:
    """A tree head that one of the keys signed."""

    origin: str
    size: int
    root: bytes

    def __str__(self) -> str:
        """How messages name it."""
        return f"the tree head of size {self.size} with root {self.root.hex()}"


@dataclass(frozen=True, slots=True)
class Event:
    """An opened leaf that lies under a tree head."""

    index: int
    kind: str
    time: str
    request_id: str | None
    body: dict[str, Any]


def open_head(checkpoint: str, keys: Sequence[Key]) -> Head:
    """The tree head of a C2SP tlog-checkpoint, once the key of its time signed it; cosignatures are passed over.

    Raises:
        Refused: another form, or no such signature.
    """
    text, found, lines = checkpoint.rpartition("\n\n")
    head = HEAD.fullmatch(text + "\n")
    require(found and head, "not a tree head: origin, size and root, signed as a note")
    origin, size, root = head.groups() if head else ("", "0", "")
    for line in SIGNATURE.findall(lines):
        for key in keys:
            if line[0] == origin and key.signs(int(size)) and _signed(key.public, line[1], f"{text}\n"):
                return Head(origin, int(size), base64.b64decode(root))
    raise Refused(f"no signature of {origin} under the tree head of size {size} holds under the key given")


def _signed(key: Ed25519PublicKey, line: str, text: str) -> bool:
    """Whether a signature line of a note is this key's: four bytes of a hint, then Ed25519 over the text."""
    try:
        key.verify(base64.b64decode(line, validate=True)[4:], text.encode())
    except (ValueError, InvalidSignature):
        return False
    return True


def open_event(entry: dict[str, Any], head: Head) -> Event:
    """The event that an entry holds, once its opening fits its leaf, and its leaf lies where it says under the head.

    Raises:
        Refused: it does not.
    """
    try:
        leaf, opening = read_json(entry["leaf"].encode()), read_json(entry["opening"].encode())
        require(leaf.keys() == LEAF and leaf["type"] == "expunge leaf v1", "an entry's leaf is none")
        require(opening.keys() == OPENING and opening["type"] == "expunge opening v1", "an entry's opening is none")
        index = leaf["index"]
        require(type(index) is int and isinstance(opening["body"], dict), "an entry is not of a leaf's form")
        require(all(isinstance(leaf[name], str) for name in ("kind", "time")), "an entry is not of a leaf's form")
    except (ValueError, AttributeError):
        raise Refused("an entry of the ledger is not JSON of a leaf's form") from None
    which = f"leaf {index} ({leaf['kind']})"
    same = sha256(entry["opening"].encode()).hexdigest() == leaf["commitment"]
    require(same and opening["event_id"] == leaf["event_id"], f"{which} is not opened by what is given")
    found = root_above(leaf_hash(entry["leaf"].encode()), index, head.size, unhex(entry["path"]))
    require(found == head.root, f"{which} does not lie at that place under {head}")
    return Event(index, leaf["kind"], leaf["time"], opening["request_id"], opening["body"])


def unhex(path: Sequence[str]) -> list[bytes]:
    """Hashes of a path."""
    return [bytes.fromhex(each) for each in path]


def root_above(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that a path from the leaf up gives (RFC 6962, section 2.1.1); None if there is no such path."""
    if not 0 <= index < size or (size == 1) != (not path):
        return None
    if size == 1:
        return leaf
    half = 1 << ((size - 1).bit_length() - 1)
    left = index < half
    below = root_above(leaf, index if left else index - half, half if left else size - half, path[:-1])
    if below is None:
        return None
    return node_hash(below, path[-1]) if left else node_hash(path[-1], below)


def continues(old: Head, new: Head, path: Sequence[bytes]) -> bool:
    """Whether a consistency path (RFC 6962, section 2.1.2) shows that the tree of `new` begins with that of `old`."""
    if not 0 < old.size <= new.size:
        return False
    return _roots(old.size, new.size, list(path), old.root, whole=True) == (old.root, new.root, 0)


def _roots(old: int, new: int, path: list[bytes], old_root: bytes, *, whole: bool) -> tuple[bytes, bytes, int]:
    """Roots over the first `old` and over all `new` leaves of a subtree, and how much of the path is left unused."""
    if old == new:
        if whole:
            return old_root, old_root, len(path)
        return (path[0], path[0], len(path) - 1) if path else (b"", b"", -1)
    if not path:
        return b"", b"", -1
    half = 1 << ((new - 1).bit_length() - 1)
    above = path[-1]
    if old <= half:
        before, after, left = _roots(old, half, path[:-1], old_root, whole=whole)
        return before, node_hash(after, above), left
    before, after, left = _roots(old - half, new - half, path[:-1], old_root, whole=False)
    return node_hash(above, before), node_hash(above, after), left
