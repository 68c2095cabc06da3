"""One request as the routes see it: its headers, its body within the limit, and what it asks of every answer."""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from service.serving.answers import BODY_LIMIT, Message, ProblemError
from service.serving.replica import Wish
from service.serving.wire import Wire

VERSION = re.compile(r"[1-9][0-9]{0,17}")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class DisconnectedError(Exception):
    """The client went away before its request was whole, or before its answer was."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request of one connection. Loop thread only."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    receive: Receive
    send: Send
    wire: Wire
    version: str | None = None
    """The version in the address, in protocols that have one there."""

    @classmethod
    def of(cls, scope: Scope, receive: Receive, send: Send) -> "Call":
        """From what ASGI gives."""
        return cls(scope["method"], scope["path"], dict(scope["headers"]), receive, send, Wire.of(scope))

    def allow(self, method: str) -> None:
        """Refuse other methods.

        Raises:
            ProblemError: 405.
        """
        if self.method != method:
            detail = f"this address takes {method} only"
            raise ProblemError(405, "method-not-allowed", detail, headers=((b"allow", method.encode()),))

    def header(self, name: bytes) -> bytes:
        """A header's value, empty where it is missing."""
        return self.headers.get(name, b"")

    @property
    def least(self) -> int:
        """The lowest version that the caller takes an answer from.

        Raises:
            ProblemError: 400 where the header is no version number.
        """
        value = self.headers.get(b"x-expunge-min-version")
        if value is None:
            return 0
        with suppress(ValueError):
            if value.isdigit() and len(value) < 19:
                return int(value)
        raise ProblemError(400, "invalid-header", "X-Expunge-Min-Version must be a version number")

    @property
    def wish(self) -> Wish:
        """Which of two versions is to answer, while a canary runs.

        Raises:
            ProblemError: 400 for a header that says neither.
        """
        value = self.headers.get(b"x-expunge-canary")
        if value not in {None, b"true", b"false"}:
            raise ProblemError(400, "invalid-header", "X-Expunge-Canary must be true or false, or left out")
        exact = int(self.version) if self.version and VERSION.fullmatch(self.version) else 0
        return Wish(self.least, exact, None if value is None else value == b"true")

    async def body(self) -> bytes:
        """The whole body, or a refusal as soon as it is known to be too large.

        Raises:
            DisconnectedError: the client went away.
            ProblemError: 413.
        """
        declared = self.headers.get(b"content-length", b"0")
        body = bytearray()
        more = True
        while more and len(body) <= BODY_LIMIT and not (declared.isdigit() and int(declared) > BODY_LIMIT):
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise DisconnectedError
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if more or len(body) > BODY_LIMIT:
            raise ProblemError(
                413,
                "body-too-large",
                f"a body may have {BODY_LIMIT} bytes; send fewer inputs",
                headers=((b"connection", b"close"),),
            )
        return bytes(body)

    async def document(self, example: str) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            DisconnectedError: the client went away.
            ProblemError: 400 for what is not JSON, 413 for what is too long, 422 for another JSON value.
        """
        try:
            found = json.loads(await self.body())
        except (ValueError, RecursionError):
            raise ProblemError(400, "malformed-json", f"the body must be JSON: {example}") from None
        if not isinstance(found, dict):
            raise ProblemError(422, "invalid-body", f"the body must be a JSON object: {example}")
        return found
