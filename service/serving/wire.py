"""The connection under an answer: whether the kernel has taken every byte, and how to take back what it has not.

uvicorn's `send` returns when the bytes are with the transport, which may keep them in the process; an acknowledged
replica must not hand them to the kernel later (P3). So the transport here writes at once and is *paused* as soon as
one byte stays behind.
"""

import asyncio
from collections.abc import Generator, MutableMapping
from contextlib import contextmanager
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SCOPE_KEY = "expunge.wire"
DRAIN_TIMEOUT = 30.0
"""Seconds after which a client that does not read loses its connection."""


class WireProtocol(HttpToolsProtocol):
    """uvicorn's httptools protocol, with the write buffer counted from the first byte and shown to the application."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A client connects."""
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)

    def on_headers_complete(self) -> None:
        """A request begins."""
        extensions: dict[str, Any] = {SCOPE_KEY: Wire(self.transport, self.flow)}
        self.scope["extensions"] = extensions
        super().on_headers_complete()


class Wire:
    """What the application sees of a connection. Loop thread only."""

    def __init__(self, transport: asyncio.Transport | None, flow: Any) -> None:
        """`None` twice for a server of another kind, whose sends are taken as final when they return."""
        self._transport = transport
        self._flow = flow
        self.waited = False
        """Whether `drained` ever waited."""
        self.aborted = False

    @classmethod
    def of(cls, scope: MutableMapping[str, Any]) -> "Wire":
        """The connection of a request."""
        return (scope.get("extensions") or {}).get(SCOPE_KEY) or cls(None, None)

    @property
    def paused(self) -> bool:
        """Whether bytes wait in this process: the next send would wait too."""
        return self._flow is not None and self._flow.write_paused

    @property
    def gone(self) -> bool:
        """Whether the connection is closed, or being closed."""
        return self._transport is not None and self._transport.is_closing()

    async def drained(self) -> None:
        """Wait until the kernel has every byte, or the connection is gone; a client that does not read is cut off."""
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                while self.paused:
                    self.waited = True
                    await self._flow.drain()
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        """Drop the bytes that wait, and the connection."""
        self.aborted = True
        if self._transport is not None:
            self._transport.abort()


class Outbox:
    """Answers that wait on their way, of one model; the floor's rise takes back those below it. Loop thread only."""

    def __init__(self) -> None:
        """Nothing waits."""
        self._waiting: set[tuple[int, Wire]] = set()
        self._watches: set[tuple[int, asyncio.Event]] = set()

    async def drained(self, version: int, wire: Wire) -> None:
        """Wait for the kernel, or for `cut`. Whoever cannot wait (a server that stops) takes back what is left."""
        entry = (version, wire)
        self._waiting.add(entry)
        try:
            await wire.drained()
        except asyncio.CancelledError:
            wire.abort()  # a transport that is closed instead would go on sending, and nothing would count it
            raise
        finally:
            self._waiting.discard(entry)

    @contextmanager
    def watched(self, version: int) -> Generator[asyncio.Event]:
        """An event that is set when the floor rises above `version`, for work that waits for something outside."""
        entry = (version, asyncio.Event())
        self._watches.add(entry)
        try:
            yield entry[1]
        finally:
            self._watches.discard(entry)

    def cut(self, floor: int) -> None:
        """Take back every waiting answer from below `floor`: a slow client must not delay the acknowledgement."""
        for version, risen in self._watches:
            if version < floor:
                risen.set()
        for version, wire in list(self._waiting):
            if version < floor:
                wire.abort()
