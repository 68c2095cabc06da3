"""The model server's HTTP interface: plain ASGI, since the final check must sit directly before the write."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from service.logs import get_logger
from service.serving import metrics as exposition
from service.serving.answers import BODY_LIMIT, Answer, Message, ProblemError, parse_inputs
from service.serving.compute import Compute
from service.serving.fleet import Fleet
from service.serving.keys import Keys
from service.serving.metrics import ServingMetrics
from service.serving.predict import Predictions, Send, Served
from service.serving.wire import Wire
from service.store.api_keys import Scope

PREDICT = re.compile(r"/v1/models/([^/]+)/predict")

Scope_ = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

log = get_logger(__name__)


class DisconnectedError(Exception):
    """The client went away before its request was whole."""


class App:
    """One process's application; start and stop come through the ASGI lifespan."""

    def __init__(self, fleet: Fleet, keys: Keys, metrics: ServingMetrics, *, input_limit: int) -> None:
        """`input_limit` is the longest input in bytes."""
        self._fleet = fleet
        self._keys = keys
        self._metrics = metrics
        self._input_limit = input_limit
        self._compute: Compute | None = None

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self._keys.open()
        self._compute = Compute()
        self._fleet.start(asyncio.get_running_loop())
        await send({"type": "lifespan.startup.complete"})
        await receive()  # uvicorn has finished every request by now
        await asyncio.to_thread(self._close, self._compute)
        await send({"type": "lifespan.shutdown.complete"})

    def _close(self, compute: Compute) -> None:
        compute.close()
        self._fleet.stop()
        self._keys.close()

    async def _http(self, scope: Scope_, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        match = PREDICT.fullmatch(path)
        try:
            if match is not None:
                _allow(method, "POST")
                await self._predict(match.group(1), scope, receive, send)
                return
            answer = self._page(path, method)
        except ProblemError as problem:
            answer = problem.answer()
        except DisconnectedError:
            return
        for message in answer.messages():
            await send(message)

    def _page(self, path: str, method: str) -> Answer:
        if path not in {"/healthz", "/readyz", "/metrics"}:
            raise ProblemError(
                404,
                "not-found",
                "the model server has POST /v1/models/{model}/predict, /healthz, /readyz, /metrics",
            )
        _allow(method, "GET")
        if path == "/healthz":
            return Answer(200, b'{"status": "alive"}')
        if path == "/readyz":
            return self._ready()
        self._fleet.observe()
        return Answer(200, self._metrics.exposition(), exposition.CONTENT_TYPE.encode())

    def _ready(self) -> Answer:
        statuses = self._fleet.statuses()
        ready = statuses is not None and all(status.ready for status in statuses)
        body: dict[str, Any] = {
            "ready": ready,
            "models": [{**asdict(status), "ready": status.ready} for status in statuses or ()],
        }
        if statuses is None:
            body["detail"] = "Postgres was not reached yet; check EXPUNGE_DATABASE_URL"
        return Answer(200 if ready else 503, json.dumps(body).encode())

    async def _predict(self, model: str, scope: Scope_, receive: Receive, send: Send) -> None:
        """Answer one call; what is refused is raised and counted."""
        headers = dict(scope["headers"])
        await self._keys.check(headers.get(b"authorization", b""), Scope.MODEL_PREDICT)
        served = self._fleet.find(model)
        if served is None:
            raise ProblemError(
                404,
                "no-such-model",
                "no version of such a model was published; GET /v1/models of the API lists them",
            )
        in_flight = self._metrics.in_flight.labels(model)
        in_flight.inc()
        result = "failed"
        try:
            result = await self._answer(served, headers, scope, receive, send)
        except ProblemError as problem:
            result = problem.slug
            raise
        except DisconnectedError:
            result = "disconnected"
            raise
        finally:
            in_flight.dec()
            self._metrics.predictions.labels(model, result).inc()

    async def _answer(
        self, served: Served, headers: dict[bytes, bytes], scope: Scope_, receive: Receive, send: Send
    ) -> str:
        least = _min_version(headers.get(b"x-expunge-min-version"))
        texts = parse_inputs(await _read_body(headers, receive), input_limit=self._input_limit)
        if self._compute is None:
            raise AssertionError("the lifespan starts before the first request")
        predictions = Predictions(self._compute, self._metrics)
        return await predictions.predict(served, texts, least, Wire.of(scope), send)


def _allow(method: str, allowed: str) -> None:
    if method != allowed:
        detail = f"this address takes {allowed} only"
        raise ProblemError(405, "method-not-allowed", detail, headers=((b"allow", allowed.encode()),))


def _min_version(value: bytes | None) -> int:
    if value is None:
        return 0
    with suppress(ValueError):
        if value.isdigit() and len(value) < 19:
            return int(value)
    raise ProblemError(400, "invalid-header", "X-Expunge-Min-Version must be a version number")


async def _read_body(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    """The whole body, or a refusal as soon as it is known to be too large."""
    declared = headers.get(b"content-length", b"0")
    body = bytearray()
    more = True
    while more and len(body) <= BODY_LIMIT and not (declared.isdigit() and int(declared) > BODY_LIMIT):
        message = await receive()
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
