"""The model server's HTTP interface: plain ASGI, since the final check must sit directly before the write."""

import asyncio
import time
from collections.abc import Awaitable

from service.serving import completions, inference
from service.serving.answers import Answer, ProblemError, check_inputs, parse_inputs, render
from service.serving.compute import Compute
from service.serving.fleet import Fleet
from service.serving.generate import Completions
from service.serving.incoming import Call, DisconnectedError, Receive, Scope, Send
from service.serving.keys import Keys
from service.serving.metrics import ServingMetrics
from service.serving.predict import Predictions, Question, Served, begin
from service.serving.probes import Probes, find
from service.serving.replica import Pointer
from service.serving.routes import Place, Route, place_of, refusal_of
from service.store import api_keys
from shards.engine.interface import Input


class App:
    """One process's application; start and stop come through the ASGI lifespan."""

    def __init__(self, fleet: Fleet, keys: Keys, metrics: ServingMetrics, *, input_limit: int) -> None:
        """`input_limit` is the longest input in bytes."""
        self._fleet = fleet
        self._keys = keys
        self._metrics = metrics
        self._input_limit = input_limit
        self._probes = Probes(fleet, metrics)
        self._since = int(time.time())
        self._running: tuple[Predictions, Completions] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(Call.of(scope, receive, send))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self._keys.open()
        compute = Compute()
        self._running = Predictions(compute, self._metrics), Completions(compute, self._metrics)
        self._fleet.start(asyncio.get_running_loop())
        await send({"type": "lifespan.startup.complete"})
        await receive()  # uvicorn has finished every request by now
        await asyncio.to_thread(self._close, compute)
        await send({"type": "lifespan.shutdown.complete"})

    def _close(self, compute: Compute) -> None:
        compute.close()
        self._fleet.stop()
        self._keys.close()

    @property
    def _started(self) -> tuple[Predictions, Completions]:
        if self._running is None:
            raise AssertionError("the lifespan starts before the first request")
        return self._running

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
        """The answer of an address; None where it was sent already, behind its final check."""
        if (page := self._probes.answer(place)) is not None:
            return page
        await self._keys.check(call.header(b"authorization"), api_keys.Scope.MODEL_PREDICT)
        match place.route:
            case Route.MODELS:
                return completions.listing(self._fleet.names(), self._since)
            case Route.MODEL:
                return completions.entry(find(self._fleet, place.model).replica.model, self._since)
            case Route.METADATA:
                return self._metadata(place)
            case Route.COMPLETIONS:
                asked = completions.parse(await call.document(completions.EXAMPLE), input_limit=self._input_limit)
                served = find(self._fleet, asked.model)
                await self._counted(served, self._started[1].complete(served, asked, call))
            case _:
                served = find(self._fleet, place.model)
                await self._counted(served, self._ask(served, place, call))
        return None

    async def _ask(self, served: Served, place: Place, call: Call) -> str:
        """Predict or infer."""
        _ = call.least  # what is wrong with the headers is said first
        if place.route is Route.INFER:
            if call.header(b"inference-header-content-length"):
                raise ProblemError(400, "invalid-body", "binary tensors are not spoken here; send data as JSON")
            document = await call.document(inference.EXAMPLE)
            asked = inference.parse(document, version=place.version, input_limit=self._input_limit)
            question = Question(asked.inputs, asked.render)
        else:
            inputs = parse_inputs(await call.body(), input_limit=self._input_limit)
            question = Question(lambda pointer: _checked(pointer, inputs), render)
        return await self._started[0].predict(served, question, call)

    async def _counted(self, served: Served, work: Awaitable[str]) -> None:
        """Count a call by its result, what is refused or broken off too."""
        model = served.replica.model
        in_flight = self._metrics.in_flight.labels(model)
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
            self._metrics.predictions.labels(model, result).inc()

    def _metadata(self, place: Place) -> Answer:
        replica = find(self._fleet, place.model).replica
        pointer = begin(replica)
        replica.abandon(pointer.version)
        inference.check_served(pointer, place.version)
        return inference.metadata(place.model, pointer)


def _checked(pointer: Pointer, inputs: list[Input]) -> list[Input]:
    check_inputs(pointer.recipe, inputs)
    return inputs
