"""The model server's answers: which computation each address asks for."""

import asyncio
from dataclasses import replace

from service.serving import completions, inference
from service.serving.answers import Answer, ProblemError, check_inputs, parse_inputs, render
from service.serving.compute import Compute
from service.serving.fleet import Fleet
from service.serving.generate import Completions
from service.serving.incoming import Call
from service.serving.metrics import ServingMetrics
from service.serving.predict import Predictions, Question, Served, begin
from service.serving.probes import find
from service.serving.replica import Pointer
from service.serving.routes import Place, Route
from service.serving.shell import counted
from shards.engine.interface import Input


class App:
    """Predictions, inferences and completions of one process."""

    def __init__(self, fleet: Fleet, metrics: ServingMetrics, *, input_limit: int) -> None:
        """`input_limit` is the longest input in bytes."""
        self._fleet = fleet
        self._metrics = metrics
        self._input_limit = input_limit
        self._compute: Compute | None = None
        self._running: tuple[Predictions, Completions] | None = None

    async def open(self) -> None:
        """Start the compute thread."""
        self._compute = Compute()
        self._running = Predictions(self._compute, self._metrics), Completions(self._compute, self._metrics)

    async def close(self) -> None:
        """End it."""
        if self._compute is not None:
            await asyncio.to_thread(self._compute.close)

    @property
    def _started(self) -> tuple[Predictions, Completions]:
        if self._running is None:
            raise AssertionError("the lifespan starts before the first request")
        return self._running

    async def answer(self, place: Place, call: Call) -> Answer | None:
        """The answer of an address; None where it was sent already, behind its final check.

        Raises:
            ProblemError: nothing was sent.
            DisconnectedError: the client went away.
        """
        call = replace(call, version=place.version)
        match place.route:
            case Route.METADATA:
                return self._metadata(place, call)
            case Route.CHAT:
                detail = "this server completes texts: ask by POST /v1/completions; `expunge proxy` speaks chat"
                raise ProblemError(501, "not-spoken-here", detail)
            case Route.COMPLETIONS:
                asked = completions.parse(await call.document(completions.EXAMPLE), input_limit=self._input_limit)
                served = find(self._fleet, asked.model)
                await counted(served, self._metrics, self._started[1].complete(served, asked, call))
            case _:
                served = find(self._fleet, place.model)
                await counted(served, self._metrics, self._ask(served, place, call))
        return None

    async def _ask(self, served: Served, place: Place, call: Call) -> str:
        """Predict or infer."""
        _ = call.wish  # what is wrong with the headers is said first
        if place.route is Route.INFER:
            if call.header(b"inference-header-content-length"):
                raise ProblemError(400, "invalid-body", "binary tensors are not spoken here; send data as JSON")
            document = await call.document(inference.EXAMPLE)
            asked = inference.parse(document, version=place.version, input_limit=self._input_limit)
            question = Question(asked.inputs, asked.render)
        else:
            inputs = parse_inputs(await call.body(), input_limit=self._input_limit)
            question = Question(lambda pointer, _answers: _checked(pointer, inputs), render)
        return await self._started[0].predict(served, question, call)

    def _metadata(self, place: Place, call: Call) -> Answer:
        replica = find(self._fleet, place.model).replica
        pointer = begin(replica, call.wish)
        replica.abandon(pointer.version)
        inference.check_served(pointer, place.version)
        return inference.metadata(place.model, pointer, replica.versions, replica.answers)


def _checked(pointer: Pointer, inputs: list[Input]) -> list[Input]:
    check_inputs(pointer.recipe, inputs)
    return inputs
