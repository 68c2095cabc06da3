"""Who may ask: API keys, looked up off the event loop and remembered for a few seconds."""

import asyncio
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from service.domain.errors import UnavailableError
from service.serving.answers import ProblemError, unavailable
from service.store.api_keys import ApiKey, Scope, authenticate
from service.store.database import make_pool, transaction

REMEMBERED = 5.0
"""Seconds; a revoked key may be used that much longer."""
PATIENCE = 2.0
"""Seconds that a look-up may take: a Postgres that hangs says nothing, and callers deserve an answer."""
ENTRIES = 10_000
CONNECTIONS = 2


class Keys:
    """Authentication for one process."""

    def __init__(self, database_url: str) -> None:
        """Opens connections when they are first needed."""
        self._pool = make_pool(database_url, size=CONNECTIONS)
        self._threads = ThreadPoolExecutor(CONNECTIONS, "keys")
        self._known: dict[bytes, tuple[float, ApiKey]] = {}

    def open(self) -> None:
        """Connect in the background; Postgres need not be there yet."""
        self._pool.open(wait=False)

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pool.close()

    async def check(self, authorization: bytes, scope: Scope) -> None:
        """Let a caller with the scope pass.

        Raises:
            ProblemError: 401 without a valid key, 403 without the scope, 503 where Postgres does not answer.
        """
        kind, _, token = authorization.decode("latin-1").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise _unauthorized()
        digest = hashlib.sha256(token.encode()).digest()
        until, key = self._known.get(digest, (0.0, None))
        if key is None or time.monotonic() >= until:
            key = await self._look_up(digest, token.strip())
        if scope not in key.scopes:
            raise ProblemError(403, "forbidden", f"this API key lacks the scope {scope}; ask for a key that has it")

    async def _look_up(self, digest: bytes, token: str) -> ApiKey:
        loop = asyncio.get_running_loop()
        try:
            reading = loop.run_in_executor(self._threads, partial(self._read, token))
            key = await asyncio.wait_for(reading, PATIENCE)
        except (UnavailableError, TimeoutError):
            raise unavailable(
                "store-unavailable", "API keys cannot be checked: Postgres does not answer; try again"
            ) from None
        if key is None:
            self._known.pop(digest, None)
            raise _unauthorized()
        now = time.monotonic()
        if len(self._known) >= ENTRIES:
            self._known = {entry: value for entry, value in self._known.items() if value[0] > now}
        if len(self._known) < ENTRIES:
            self._known[digest] = (now + REMEMBERED, key)
        return key

    def _read(self, token: str) -> ApiKey | None:
        with transaction(self._pool) as connection:
            return authenticate(connection, token)


def _unauthorized() -> ProblemError:
    detail = "send a valid API key as `Authorization: Bearer xp_...`"
    return ProblemError(401, "unauthorized", detail, headers=((b"www-authenticate", b"Bearer"),))
