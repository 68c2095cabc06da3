"""Remembers who a token is for a few seconds, so that a burst of requests costs one look-up."""

import hashlib
import time

from service.store.api_keys import ApiKey, authenticate
from service.store.database import Pool, transaction

SECONDS = 5.0
"""How long a revoked key may still work in one process."""
SIZE = 1024


class KeyCache:
    """Tokens are kept as digests; what does not authenticate is not kept."""

    def __init__(self, pool: Pool) -> None:
        """Look-ups go through `pool`."""
        self._pool = pool
        self._known: dict[bytes, tuple[ApiKey, float]] = {}

    def peek(self, token: str) -> ApiKey | None:
        """The key, if it was looked up in the last seconds; no I/O."""
        found = self._known.get(_digest(token))
        return found[0] if found and found[1] > time.monotonic() else None

    def find(self, token: str) -> ApiKey | None:
        """The key that the token opens, read from Postgres; None where it opens none."""
        with transaction(self._pool) as connection:
            key = authenticate(connection, token)
        if key is not None:
            if len(self._known) >= SIZE:
                self._known.clear()
            self._known[_digest(token)] = (key, time.monotonic() + SECONDS)
        return key


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
