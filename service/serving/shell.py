"""What every program that answers has around its answers: ASGI, open pages, keys, refusals in each protocol's form."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Protocol

from service.serving import completions
from service.serving.answers import Answer, Message, ProblemError
from service.serving.fleet import Fleet
from service.serving.incoming import Call, DisconnectedError, Receive, Scope, Send
from service.serving.keys import Keys
from service.serving.metrics import ServingMetrics
from service.serving.predict import Served
from service.serving.probes import Probes, find
from service.serving.routes import Place, Route, place_of, refusal_of
from service.store import api_keys


class Answers(Protocol):
    """What one program does with the calls of those who may ask."""

    async def open(self) -> None:
        """Before the first call."""
        ...

    async def close(self) -> None:
        """After the last one."""
        ...

    async def answer(self, place: Place, call: Call) -> Answer | None:
        """The answer of an address; None where it was sent already, behind its final check.

        Raises:
            ProblemError: nothing was sent.
            DisconnectedError: the client went away.
        """
        ...


class Shell:
    """One process's application; start and stop come through the ASGI lifespan."""

    def __init__(self, fleet: Fleet, keys: Keys, metrics: ServingMetrics, answers: Answers) -> None:
        """Nothing runs before the lifespan starts."""
        self._fleet = fleet
        self._keys = keys
        self._answers = answers
        self._probes = Probes(fleet, metrics)
        self._since = int(time.time())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(Call.of(scope, receive, self._closing(send) if self._fleet.leaving else send))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self._keys.open()
        await self._answers.open()
        self._fleet.start(asyncio.get_running_loop())
        await send({"type": "lifespan.startup.complete"})
        await receive()  # uvicorn has finished every request by now
        await self._answers.close()
        await asyncio.to_thread(self._stop)
        await send({"type": "lifespan.shutdown.complete"})

    def _stop(self) -> None:
        self._fleet.stop()
        self._keys.close()

    def _closing(self, send: Send) -> Send:
        """Answers of a server that is about to stop end their connection: the next request goes elsewhere."""

        def sending(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            return send(message)

        return sending

    async def _http(self, call: Call) -> None:
        try:
            place = place_of(call.path)
            call.allow(place.method)
            answer = await self._answer(place, call)
        except ProblemError as problem:
            answer = refusal_of(call.path)(problem)
        except DisconnectedError:
            return
        for message in answer.messages() if answer else ():
            await call.send(message)

    async def _answer(self, place: Place, call: Call) -> Answer | None:
        if (page := self._probes.answer(place)) is not None:
            return page
        await self._keys.check(call.header(b"authorization"), api_keys.Scope.MODEL_PREDICT)
        if place.route is Route.MODELS:
            return completions.listing(self._fleet.names(), self._since)
        if place.route is Route.MODEL:
            return completions.entry(find(self._fleet, place.model).replica.model, self._since)
        return await self._answers.answer(place, call)


async def counted(served: Served, metrics: ServingMetrics, work: Awaitable[str]) -> None:
    """Count a call by its result, what is refused or broken off too."""
    model = served.replica.model
    in_flight = metrics.in_flight.labels(model)
    in_flight.inc()
    result = "failed"
    try:
        result = await work
    except ProblemError as problem:
        result = problem.slug
        raise
    except DisconnectedError:
        result = "disconnected"
        raise
    finally:
        in_flight.dec()
        metrics.predictions.labels(model, result).inc()
