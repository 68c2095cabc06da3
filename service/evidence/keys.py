"""Keys that sign: read from a private file, named by the digest of the public half, handed over by the one before."""

import base64
import binascii
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from service.evidence.signers import HeldKey, KeyFileError, SigningKey
from shards.digest import canonical, sha256_hex

SIGNER = "signer: "
"""Begins the line above a public key that says who holds the private one."""


def load_signing_key(path: Path) -> SigningKey:
    """The Ed25519 signing key in a PEM file (PKCS #8, not encrypted) that only its owner can read.

    Where the key lies elsewhere, the file holds the line `signer: URI` and the public key; nothing is asked here.

    Raises:
        KeyFileError: missing, readable by others, or not such a key.
    """
    try:
        # Permissions of the very file that is read: no other can be put in its place in between.
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            pem = file.read()
    except OSError as error:
        raise KeyFileError(f"cannot read the signing key {path}: {error.strerror}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise KeyFileError(f"others may read or change {path}: chmod 600 it, and change the key if they could have")
    return parse_signing_key(pem, path)


def parse_signing_key(pem: bytes, path: Path) -> SigningKey:
    """The key in the content of a file; `path` is what messages call it.

    Raises:
        KeyFileError: not such a key.
    """
    if pem.startswith(SIGNER.encode()):
        line, _, public = pem.partition(b"\n")
        return HeldKey(line.decode(errors="replace")[len(SIGNER) :].strip(), load_public_key(public))
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise KeyFileError(f"{path} is encrypted: store it without a passphrase, with mode 0600") from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError(f"{path} holds no private key in PEM: restore it from your backup") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path} is not an Ed25519 key: openssl genpkey -algorithm ed25519 makes one")
    return key


def load_public_key(pem: bytes) -> Ed25519PublicKey:
    """The Ed25519 public key in PEM (SubjectPublicKeyInfo).

    Raises:
        KeyFileError: something else.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError("not a public key in PEM: take the operator's signing.pub") from None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError("not an Ed25519 public key: take the operator's signing.pub")
    return key


def public_pem(key: SigningKey | Ed25519PublicKey) -> bytes:
    """The public key as PEM (SubjectPublicKeyInfo), to be handed to whoever verifies."""
    return _public(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def private_pem(key: Ed25519PrivateKey) -> bytes:
    """The private key as PEM (PKCS #8), for a file that only its owner reads."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def held_pem(uri: str, public: Ed25519PublicKey) -> bytes:
    """A key that lies elsewhere as it is named in `signing.pem`."""
    return f"{SIGNER}{uri}\n".encode() + public_pem(public)


def keyid(key: SigningKey | Ed25519PublicKey) -> str:
    """SHA-256 of the DER SubjectPublicKeyInfo, as hex: `openssl pkey -pubin -outform DER | sha256sum`."""
    return sha256_hex(_public(key).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


@dataclass(frozen=True, slots=True)
class Handover:
    """One key's word that another signs after it."""

    old: str
    """Key id of the one that signed before."""
    new: bytes
    """The public key (PEM) that signs from then on."""
    size: int
    """The last tree head of the old key has so many leaves; what is larger is the new key's."""
    signature: bytes
    """By the old key, over `statement`."""

    @property
    def statement(self) -> bytes:
        """What is signed: canonical JSON."""
        new = keyid(load_public_key(self.new))
        return canonical({"type": "expunge key handover v1", "old": self.old, "new": new, "size": self.size})

    @classmethod
    def sign(cls, old: SigningKey, new: Ed25519PublicKey, size: int) -> "Handover":
        """The old key hands over."""
        unsigned = cls(keyid(old), public_pem(new), size, b"")
        return cls(unsigned.old, unsigned.new, size, old.sign(unsigned.statement))


@dataclass(frozen=True, slots=True)
class KeySet:
    """All keys that ever signed for an installation: whoever trusts the first can follow to the last.

    A tree head of some size is good under one key alone, so a key that was stolen after its time signs nothing new.
    """

    first: Ed25519PublicKey
    handovers: tuple[Handover, ...] = ()

    def __post_init__(self) -> None:
        """Check every handover.

        Raises:
            KeyFileError: one is not signed by the key before it, or goes back.
        """
        for place, each in enumerate(self.handovers):
            before = self.keys[place]
            try:
                before.verify(each.signature, each.statement)
            except InvalidSignature:
                raise KeyFileError(
                    f"handover {place + 1} is not signed by the key before it: take the whole set"
                ) from None
            if each.old != keyid(before) or (place and each.size < self.handovers[place - 1].size):
                raise KeyFileError(f"handover {place + 1} is not of the key before it, or goes back in time")

    @property
    def keys(self) -> tuple[Ed25519PublicKey, ...]:
        """The oldest first."""
        return (self.first, *(load_public_key(each.new) for each in self.handovers))

    @property
    def newest(self) -> Ed25519PublicKey:
        """The key that signs now."""
        return self.keys[-1]

    def for_size(self, size: int) -> Ed25519PublicKey:
        """The key that signs tree heads of that size."""
        return self.keys[sum(size > each.size for each in self.handovers)]

    def find(self, key_id: str) -> Ed25519PublicKey | None:
        """The key of that id, for certificates, which name theirs."""
        return next((key for key in self.keys if keyid(key) == key_id), None)

    def trusted_from(self, key: Ed25519PublicKey) -> "KeySet":
        """The part of the set that a holder of one of its keys can rely on: from that key on.

        Raises:
            KeyFileError: the key is not in the set.
        """
        place = next((place for place, each in enumerate(self.keys) if keyid(each) == keyid(key)), None)
        if place is None:
            raise KeyFileError("the key that you trust is none of this set: it is another installation's, or forged")
        return KeySet(key, self.handovers[place:])

    def to_json(self) -> dict[str, Any]:
        """As it is published."""
        return {
            "type": "expunge key set v1",
            "first": public_pem(self.first).decode(),
            "handovers": [
                {
                    "old": each.old,
                    "new": each.new.decode(),
                    "size": each.size,
                    "signature": base64.b64encode(each.signature).decode(),
                }
                for each in self.handovers
            ],
        }


def read_key_set(data: bytes) -> KeySet:
    """A key set, or one public key (PEM) as a set of one.

    Raises:
        KeyFileError: neither.
    """
    if data.lstrip().startswith(b"-----"):
        return KeySet(load_public_key(data))
    try:
        found = json.loads(data)
        handovers = tuple(
            Handover(each["old"], each["new"].encode(), int(each["size"]), base64.b64decode(each["signature"]))
            for each in found["handovers"]
        )
        first = found["first"].encode()
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
        raise KeyFileError("neither a key set nor a public key in PEM: take the operator's keys.json") from None
    return KeySet(load_public_key(first), handovers)


def load_key_set(keys_dir: Path) -> KeySet:
    """The installation's own: `keys.json`, or `signing.pem` alone while no key was ever changed.

    Raises:
        KeyFileError: a file is missing or damaged, or the set does not end with the key that signs.
    """
    signing = load_signing_key(keys_dir / "signing.pem").public_key()
    path = keys_dir / "keys.json"
    try:
        found = read_key_set(path.read_bytes())
    except FileNotFoundError:
        return KeySet(signing)
    if keyid(found.newest) != keyid(signing):
        raise KeyFileError(f"{path} does not end with signing.pem: run `expunge keys rotate` again, or restore both")
    return found


def _public(key: SigningKey | Ed25519PublicKey) -> Ed25519PublicKey:
    return key if isinstance(key, Ed25519PublicKey) else key.public_key()
