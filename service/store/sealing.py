"""Sealed files: AES-256-GCM in chunks, under a key that one file has for itself and that dies with it.

The chunks are the STREAM construction (Hoang, Reyhanitabar, Rogaway and Vizár 2015): each nonce is a counter and
whether the chunk is the last, so a file that was cut, lengthened or put in another order does not open. The file's
name is associated data, so neither does one that was moved to another name. Nonces cannot repeat: each sealing
derives a key of its own from the file's key and a fresh salt.
"""

import io
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shards.errors import ArtifactDigestError

KEY_BYTES = 32
MAGIC = b"expunge sealed 1"
SALT_BYTES = 32
CHUNK_BYTES = 2**20
TAG_BYTES = 16
_HEADER_BYTES = len(MAGIC) + SALT_BYTES


def seal(key: bytes, name: str, data: bytes) -> bytes:
    """`data` so that only `key` and `name` open it: magic, salt, then each chunk with its tag."""
    salt = secrets.token_bytes(SALT_BYTES)
    cipher, bound = _cipher(key, salt), name.encode()
    out, view = io.BytesIO(), memoryview(data)
    out.write(MAGIC + salt)
    count = max(1, -(-len(data) // CHUNK_BYTES))
    for number in range(count):
        chunk = view[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
        out.write(cipher.encrypt(_nonce(number, last=number == count - 1), chunk, bound))
    return out.getvalue()


def unseal(key: bytes, name: str, sealed: bytes) -> bytes:
    """The bytes that were sealed under this key and name.

    Raises:
        ArtifactDigestError: the file is damaged, cut, another one's, or was never sealed.
    """
    if not sealed.startswith(MAGIC):
        raise ArtifactDigestError(f"{name} is no sealed file: this version writes none else; remove what wrote it")
    cipher, bound = _cipher(key, sealed[len(MAGIC) : _HEADER_BYTES]), name.encode()
    out, view = io.BytesIO(), memoryview(sealed)[_HEADER_BYTES:]
    size = CHUNK_BYTES + TAG_BYTES
    count = max(1, -(-len(view) // size))
    try:
        for number in range(count):
            chunk = view[number * size : (number + 1) * size]
            out.write(cipher.decrypt(_nonce(number, last=number == count - 1), chunk, bound))
    except InvalidTag:
        raise ArtifactDigestError(f"{name} is damaged, or is another file: its key does not open it") from None
    return out.getvalue()


def _cipher(key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), KEY_BYTES, salt, MAGIC).derive(key))


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
