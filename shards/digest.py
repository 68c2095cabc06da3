"""Canonical bytes and digests: the one way in which Expunge names things by their content."""

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

import rfc8785

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def canonical(value: Any) -> bytes:
    """Canonical JSON (RFC 8785) of a JSON-like value."""
    if _is_plain(value):  # what the standard library writes alike, and several times faster
        return _ENCODER.encode(value).encode()
    return rfc8785.dumps(value)


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data`, 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `value`, as hex."""
    return sha256_hex(canonical(value))


def _is_plain(value: Any) -> bool:
    """Made of ASCII texts and small whole numbers: its sorted JSON is canonical however it is written."""
    kind = type(value)
    if kind is str:
        return value.isascii()
    if kind is int:
        return -(2**53) < value < 2**53
    if kind is dict:
        return all(type(key) is str and key.isascii() and _is_plain(inner) for key, inner in value.items())
    if kind is list:
        return all(_is_plain(inner) for inner in value)
    return value is None or kind is bool


def keyed(key: bytes, *parts: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104) over length-prefixed parts, so that ("ab", "c") and ("a", "bc") differ."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "big") + part)
    return mac.digest()
