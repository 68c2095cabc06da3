"""The forms that a text may lie in: encodings, escapes, and the hashes that this installation or anybody could make."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote
from uuid import UUID

HASHES = ("md5", "sha1", "sha256", "sha512", "blake2b")
_ZEROS = re.compile(rb"\x00{64,}")
"""Pages and segments that hold nothing yet; no form has as many."""
SHORTEST = 4
"""Bytes. Fewer lie everywhere by chance, in no form that means anything."""


@dataclass(frozen=True, slots=True)
class Form:
    """A byte string to look for."""

    name: str
    needle: bytes
    keyed: bool = False
    """A keyed hash, which the installation may keep on purpose."""
    folded: bool = False
    """ASCII letters are in lower case, and are looked for in either."""


class Forms:
    """Every form of one text, made once; looks through bytes in any pieces."""

    def __init__(self, text: str, keyed: Iterable[tuple[str, bytes]] = ()) -> None:
        """`keyed`: names and values of the hashes under the installation's keys.

        Raises:
            ValueError: the text is too short to mean anything.
        """
        text = text.strip()
        if len(text.encode()) < SHORTEST:
            raise ValueError(f"the text has fewer than {SHORTEST} bytes, which lie everywhere: give a longer one")
        found: dict[tuple[bytes, bool], Form] = {}
        for variant in (text, text.lower(), text.upper()):
            for form in (*_written(variant), *_hashed(variant)):
                found.setdefault((form.needle, form.folded), form)
        for form in _keyed(keyed):
            found.setdefault((form.needle, form.folded), form)
        self.forms = tuple(form for form in found.values() if len(form.needle) >= SHORTEST)
        self.longest = max(len(form.needle) for form in self.forms)

    def within(self, data: bytes) -> list[Form]:
        """The forms that lie in these bytes."""
        exact = _ZEROS.sub(bytes(64), data)
        folded = exact.lower()
        return [form for form in self.forms if form.needle in (folded if form.folded else exact)]

    def within_pieces(self, pieces: Iterable[bytes]) -> list[Form]:
        """The forms that lie in a stream, also across its pieces' ends."""
        found: dict[Form, None] = {}
        rest = b""
        for piece in pieces:
            rest += piece
            found |= dict.fromkeys(self.within(rest))
            rest = rest[-(self.longest - 1) :]
        return list(found)


def _written(text: str) -> Iterator[Form]:
    """The text in every encoding; what is Base64 can only be found in one spelling."""
    inner = {
        "UTF-8": text.encode(),
        "JSON escapes": json.dumps(text)[1:-1].encode(),
        "JSON string": json.dumps(text, ensure_ascii=False)[1:-1].encode(),
        "URL escapes": quote(text, safe="").encode(),
    }
    for name, data in inner.items():
        yield Form(name, data.lower(), folded=True)
        yield Form(f"hex of {name}", data.hex().encode(), folded=True)
        yield from _base64(name, data)
    for codec in ("utf-16-le", "utf-16-be", "utf-32-le", "latin-1", "cp1252"):
        with suppress(UnicodeEncodeError):
            yield Form(codec.upper(), text.encode(codec).lower(), folded=True)


def _base64(name: str, data: bytes) -> Iterator[Form]:
    """Wherever the bytes begin in it: of each alignment what does not depend on the neighbours."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + data)
        start, stop = -(-before * 8 // 6), (before + len(data)) * 8 // 6
        yield Form(f"Base64 of {name}", encoded[start:stop])
        yield Form(f"Base64 of {name}", encoded.translate(bytes.maketrans(b"+/", b"-_"))[start:stop])


def _hashed(text: str) -> Iterator[Form]:
    for name in HASHES:
        yield from _digest(name, hashlib.new(name, text.encode(), usedforsecurity=False).digest(), keyed=False)


def _keyed(values: Iterable[tuple[str, bytes]]) -> Iterator[Form]:
    for name, digest in values:
        yield from _digest(name, digest, keyed=True)


def _digest(name: str, digest: bytes, *, keyed: bool) -> Iterator[Form]:
    yield Form(name, digest, keyed)
    yield Form(f"hex of {name}", digest.hex().encode(), keyed, folded=True)
    yield Form(f"Base64 of {name}", base64.b64encode(digest).rstrip(b"="), keyed)
    if len(digest) == 16:
        yield Form(f"{name} as UUID", str(UUID(bytes=digest)).encode(), keyed, folded=True)
