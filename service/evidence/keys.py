"""The key that signs certificates: read from a private file, named by the digest of its public half."""

import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from shards.digest import sha256_hex


class KeyFileError(Exception):
    """A key file that cannot be used; the message says what to do. It never holds key material."""


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """The Ed25519 signing key in a PEM file (PKCS #8, not encrypted) that only its owner can read.

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


def public_pem(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """The public key as PEM (SubjectPublicKeyInfo), to be handed to whoever verifies."""
    return _public(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def keyid(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """SHA-256 of the DER SubjectPublicKeyInfo, as hex: `openssl pkey -pubin -outform DER | sha256sum`."""
    return sha256_hex(_public(key).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _public(key: Ed25519PrivateKey | Ed25519PublicKey) -> Ed25519PublicKey:
    return key.public_key() if isinstance(key, Ed25519PrivateKey) else key
