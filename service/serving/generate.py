"""Completions: one token a turn on the compute thread, and a final check before every part that is written.

A stream that was begun on a version ends with it: when the floor rises it is cut, without the protocol's end
(protocol.md, section 1: it cannot "finish on what it started with"). What was not begun starts again on the new one.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast

from service.serving import completions
from service.serving.answers import Answer, ProblemError, unavailable
from service.serving.completions import Asked
from service.serving.compute import Compute
from service.serving.incoming import Call, DisconnectedError
from service.serving.metrics import ServingMetrics
from service.serving.predict import (
    ATTEMPTS,
    Served,
    begin,
    check_live,
    check_version,
    computed,
    note_failure,
    respond,
)
from service.serving.replica import Pointer, Replica
from service.serving.stream import CUT, Stream
from shards.engine.sampling import Sampling, Step

AT_ONCE = 64
"""Completions under way in a process; each waits for one turn at most."""


class Completer(Protocol):
    """A predictor of a causal language model."""

    def complete(self, prompt: str, sampling: Sampling) -> Iterator[Step]:
        """The answer, step by step."""
        ...


@dataclass(slots=True)
class Completions:
    """Answers completion calls. Loop thread only."""

    compute: Compute
    metrics: ServingMetrics
    _under_way: int = field(default=0)

    async def complete(self, served: Served, asked: Asked, call: Call) -> str:
        """Answer or stream; the result for metrics.

        Raises:
            ProblemError: nothing was sent.
            DisconnectedError: the client went away.
        """
        if self._under_way >= AT_ONCE:
            raise unavailable("overloaded", "too many completions are under way; try again, or another model server")
        self._under_way += 1
        try:
            if asked.stream:
                return await self._stream(served, asked, call)
            return await respond(served, partial(self._whole, served.replica, asked, call), call, self.metrics)
        finally:
            self._under_way -= 1

    async def _whole(self, replica: Replica, asked: Asked, call: Call, pointer: Pointer) -> Answer | None:
        draft = _begun(replica, asked, call, pointer)
        steps: list[Step] = []
        while not steps or steps[-1].finish is None:
            step = await computed(self.compute.turn(draft.turn))
            if step is None:
                return None
            if call.wire.gone:
                raise DisconnectedError
            steps.append(step)
        return completions.render(asked, pointer, steps)

    async def _stream(self, served: Served, asked: Asked, call: Call) -> str:
        replica = served.replica
        started = time.monotonic()
        out = Stream(served, call)
        for _ in range(ATTEMPTS):
            problem = await self._told(served, asked, call, out)
            if problem is None:
                self.metrics.duration.labels(replica.model).observe(time.monotonic() - started)
                return "answered"
            if out.begun:
                await out.break_off(problem)
                return problem.slug
            self.metrics.recomputed.labels(replica.model).inc()
        raise unavailable("not-serving", "the floor rose again with every attempt; try again")

    async def _told(self, served: Served, asked: Asked, call: Call, out: Stream) -> ProblemError | None:
        """Stream from the newest version; why it stopped before its end, if it did.

        When this returns nothing of the version is held any more: a cut stream must not keep its weights.
        """
        replica = served.replica
        pointer = begin(replica, call.wish)
        try:
            draft = _begun(replica, asked, call, pointer)
            while True:
                step = await computed(self.compute.turn(draft.turn))
                if step is None:
                    return unavailable("cut", CUT)
                if call.wire.gone:
                    raise DisconnectedError
                last = step.finish is not None
                if not await out.part(pointer, completions.render_step(asked, pointer, step), last=last):
                    return unavailable("cut", CUT)
                if last:
                    self.metrics.count(replica.model, pointer.version, "answered")
                    return None
        except ProblemError as problem:
            note_failure(replica, pointer, problem, self.metrics)
            if not out.begun:
                raise
            return ProblemError(problem.status, problem.slug, problem.detail)
        finally:
            replica.abandon(pointer.version)


class _Draft:
    """An answer being drawn, on the compute thread."""

    def __init__(self, replica: Replica, version: int, steps: Iterator[Step]) -> None:
        self._replica = replica
        self._version = version
        self._steps = steps

    def turn(self) -> Step | None:
        """The next step; None where the version may not answer any more, so nothing is computed from it."""
        if not self._replica.may_answer(self._version):
            return None
        return next(self._steps)


def _begun(replica: Replica, asked: Asked, call: Call, pointer: Pointer) -> _Draft:
    check_version(pointer, call.least)
    if pointer.recipe.task != "completion":
        detail = f"the model is one for {pointer.recipe.task}: ask it by POST /v1/models/{replica.model}/predict"
        raise ProblemError(422, "not-a-completer", detail)
    check_live(replica, pointer)
    return _Draft(replica, pointer.version, _steps(cast("Completer", pointer.predictor), asked))


def _steps(predictor: Completer, asked: Asked) -> Iterator[Step]:
    """A generator, so that nothing of the engine runs before the first turn: it may try the model out first."""
    yield from predictor.complete(asked.prompt, asked.sampling)
