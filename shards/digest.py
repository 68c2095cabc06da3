"""Canonical bytes and digests: the one way in which Expunge names things by their content."""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

import rfc8785


def canonical(value: Any) -> bytes:
    """Canonical JSON (RFC 8785) of a JSON-like value."""
    return rfc8785.dumps(value)


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data`, 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `value`, as hex."""
    return sha256_hex(canonical(value))


def keyed(key: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104) over length-prefixed parts, so that ("ab", "c") and ("a", "bc") differ."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "big") + part)
    return mac.digest()
