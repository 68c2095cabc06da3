"""C2SP signed notes: a text and Ed25519 signatures over it; cosignatures of witnesses (cosignature/v1)."""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from service.evidence.signers import SigningKey

SIGNATURE, COSIGNATURE = 0x01, 0x04
"""Signature types: of the note's text; of a text under a time."""
NAME = re.compile(r"[^\s+\u0000-\u001f]{1,200}")
LINE = re.compile(r"\u2014 (\S+) (\S+)")


class NoteError(ValueError):
    """Not a signed note, or not signed by the key."""


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line."""

    name: str
    key_id: bytes
    """Four bytes that tell keys of one name apart; a hint that decides nothing."""
    blob: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """A text, which ends in a newline, and its signatures."""

    text: str
    signatures: tuple[Signature, ...]

    def __str__(self) -> str:
        """The note as it is kept and sent."""
        lines = (f"\u2014 {s.name} {base64.b64encode(s.key_id + s.blob).decode()}\n" for s in self.signatures)
        return f"{self.text}\n{''.join(lines)}"


def key_id(name: str, key: Ed25519PublicKey, kind: int = SIGNATURE) -> bytes:
    """SHA-256(name, newline, type, public key), its first four bytes."""
    return hashlib.sha256(f"{name}\n".encode() + bytes([kind]) + key.public_bytes_raw()).digest()[:4]


def vkey(name: str, key: Ed25519PublicKey, kind: int = SIGNATURE) -> str:
    """The key as C2SP tools read it: name+id+base64."""
    public = base64.b64encode(bytes([kind]) + key.public_bytes_raw()).decode()
    return f"{name}+{key_id(name, key, kind).hex()}+{public}"


def read_vkey(text: str, kind: int = SIGNATURE) -> tuple[str, Ed25519PublicKey]:
    """Name and key of what `vkey` wrote.

    Raises:
        NoteError: not such a key.
    """
    name, _, rest = text.strip().partition("+")
    _, _, public = rest.partition("+")
    try:
        raw = base64.b64decode(public, validate=True)
        key = Ed25519PublicKey.from_public_bytes(raw[1:])
    except (binascii.Error, ValueError):
        raise NoteError("not a key as C2SP tools write it: name+id+base64") from None
    if not NAME.fullmatch(name) or text.strip() != vkey(name, key, kind):
        raise NoteError("not a key as C2SP tools write it, or for another use: name+id+base64")
    return name, key


def sign(text: str, name: str, key: SigningKey) -> Note:
    """The signed note; the same text gives the same note.

    Raises:
        ValueError: a name that a note cannot hold, or a text without a newline at its end.
    """
    if not NAME.fullmatch(name):
        raise ValueError("the name of a note's key has no blanks and no plus sign")
    if not text.endswith("\n"):
        raise ValueError("a note's text ends in a newline")
    return Note(text, (Signature(name, key_id(name, key.public_key()), key.sign(text.encode())),))


def parse(data: str) -> Note:
    """Read a note; no signature is checked.

    Raises:
        NoteError: not of this form.
    """
    text, found, lines = data.rpartition("\n\n")
    if not found or not lines.endswith("\n"):
        raise NoteError("not a signed note: a text, an empty line and signature lines")
    signatures: list[Signature] = []
    for line in lines[:-1].split("\n"):
        match = LINE.fullmatch(line)
        try:
            blob = base64.b64decode(match[2], validate=True) if match else b""
        except (binascii.Error, ValueError):
            blob = b""
        if match is None or len(blob) < 5 or not NAME.fullmatch(match[1]):
            raise NoteError("not a signed note: a line is no signature")
        signatures.append(Signature(match[1], blob[:4], blob[4:]))
    return Note(text + "\n", tuple(signatures))


def require_signature(note: Note, name: str, key: Ed25519PublicKey) -> None:
    """Do nothing where the key of this name signed the note.

    Raises:
        NoteError: it did not.
    """
    for each in _of(note, name, key, SIGNATURE):
        try:
            key.verify(each.blob, note.text.encode())
        except InvalidSignature:
            continue
        return
    raise NoteError(f"no signature of {name} holds under this key: take the key of the operator of that log")


def cosign(note: Note, name: str, key: SigningKey, timestamp: int) -> Note:
    """The note with a witness's cosignature/v1 at a time in Unix seconds; its earlier one is replaced."""
    if not NAME.fullmatch(name):
        raise ValueError("the name of a witness has no blanks and no plus sign")
    blob = timestamp.to_bytes(8, "big") + key.sign(_timed(note, timestamp))
    mine = Signature(name, key_id(name, key.public_key(), COSIGNATURE), blob)
    others = tuple(s for s in note.signatures if (s.name, s.key_id) != (mine.name, mine.key_id))
    return replace(note, signatures=(*others, mine))


def get_cosignature_time(note: Note, name: str, key: Ed25519PublicKey) -> int:
    """When the witness of this name saw the tree head, in Unix seconds.

    Raises:
        NoteError: it did not cosign the note.
    """
    return int.from_bytes(get_cosignature(note, name, key)[:8], "big")


def get_cosignature(note: Note, name: str, key: Ed25519PublicKey) -> bytes:
    """The witness's cosignature: eight bytes of time in Unix seconds, then what nobody without its key could foresee.

    Raises:
        NoteError: it did not cosign the note.
    """
    for each in _of(note, name, key, COSIGNATURE):
        try:
            key.verify(each.blob[8:], _timed(note, int.from_bytes(each.blob[:8], "big")))
        except InvalidSignature:
            continue
        return each.blob
    raise NoteError(f"no cosignature of {name} holds under this key")


def _of(note: Note, name: str, key: Ed25519PublicKey, kind: int) -> list[Signature]:
    wanted = (name, key_id(name, key, kind))
    return [each for each in note.signatures if (each.name, each.key_id) == wanted]


def _timed(note: Note, timestamp: int) -> bytes:
    return f"cosignature/v1\ntime {timestamp}\n{note.text}".encode()
