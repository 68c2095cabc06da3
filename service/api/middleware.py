"""Around every request: how long it took, how large its body is, and that nothing is cached. Pure ASGI."""

import re
import time
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import problem
from service.metrics import HttpMetrics

JSON_LIMIT = 512 * 1024
_UPLOAD = re.compile(r"/v1/datasets/[^/]+/records")


class Observe:
    """Measures requests by route template, and forbids caches to keep answers."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        """Wrap `app`."""
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.observe(scope["method"], route, status, time.perf_counter() - started)


class LimitBody:
    """Answers 413 to bodies over 512 KiB (uploads of records: over their own limit)."""

    def __init__(self, app: ASGIApp, upload_limit: int) -> None:
        """Wrap `app`; `upload_limit` in bytes."""
        self.app = app
        self.upload_limit = upload_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["method"] == "POST" and _UPLOAD.fullmatch(scope["path"])
        limit = self.upload_limit if upload else JSON_LIMIT
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            await self._refuse(limit)(scope, receive, send)
            return
        seen = 0

        async def count() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:  # a chunked body, without a length in advance
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, headers={"Connection": "close"})
            return message

        await self.app(scope, count, send)

    @staticmethod
    def _refuse(limit: int) -> ASGIApp:
        return problem(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body is longer than {limit} bytes: send less at a time",
            headers={"Connection": "close"},
        )
