"""Completions: one token a turn on the compute thread, and a final check before every part that is written.

A stream that was begun on a version ends with it: when the floor rises it is cut, without the protocol's end
(protocol.md, section 1: it cannot "finish on what it started with"). What was not begun starts again on the new one.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast

from service.serving import completions
from service.serving.answers import Answer, ProblemError, provenance, unavailable
from service.serving.completions import Asked
from service.serving.compute import Compute
from service.serving.incoming import Call, DisconnectedError
from service.serving.metrics import ServingMetrics
from service.serving.predict import ATTEMPTS, Served, begin, check_live, check_version, computed, respond
from service.serving.replica import Pointer, Replica
from shards.engine.completion import Sampling, Step

AT_ONCE = 64
"""Completions under way in a process; each waits for one turn at most."""
CUT = "the version that began this answer is out of service, or this server's lease has run out: ask again"
CLOSING = 1.0
"""Seconds that a cut connection has to close."""


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

    async def _told(self, served: Served, asked: Asked, call: Call, out: "Stream") -> ProblemError | None:
        """Stream from the newest version; why it stopped before its end, if it did.

        When this returns nothing of the version is held any more: a cut stream must not keep its weights.
        """
        replica = served.replica
        pointer = begin(replica)
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
                    return None
        except ProblemError as problem:
            if not out.begun:
                raise
            return ProblemError(problem.status, problem.slug, problem.detail)
        finally:
            replica.abandon(pointer.version)


class Stream:
    """A response in parts, each of which passes a final check of its own (rule 7)."""

    def __init__(self, served: Served, call: Call) -> None:
        """Nothing is sent before the first part."""
        self.begun = False
        """Whether anything was sent: from then on the answer cannot start again."""
        self._served = served
        self._call = call

    async def part(self, pointer: Pointer, data: bytes, *, last: bool) -> bool:
        """Check, and write in the same event-loop step; False where the check did not pass.

        The part counts against `covers` until the kernel has it, or the rising floor has taken it back (False, too).

        Raises:
            DisconnectedError: the connection is gone.
        """
        replica, wire = self._served.replica, self._call.wire
        if not data:  # a step that tells nothing yet
            return replica.may_answer(pointer.version)
        await wire.drained()  # of an earlier answer on the connection
        if not self.begun and replica.may_answer(pointer.version):
            self.begun = True
            head = [(b"content-type", completions.EVENTS), (b"cache-control", b"no-store"), *provenance(pointer)]
            await self._call.send({"type": "http.response.start", "status": 200, "headers": head})
            await wire.drained()
        if wire.gone:
            raise DisconnectedError
        # From here to the write nothing is awaited.
        if not replica.check_part(pointer.version):
            return False
        try:
            await self._call.send({"type": "http.response.body", "body": data, "more_body": not last})
            if wire.paused:
                if replica.fence.local_floor > pointer.version:
                    wire.abort()
                await self._served.outbox.drained(pointer.version, wire)
        finally:
            replica.sent(pointer.version)
        return not wire.aborted

    async def break_off(self, problem: ProblemError) -> None:
        """Say why, which holds nothing of the answer, and close the connection without the protocol's end."""
        data = completions.event(completions.error_body(problem))
        wire = self._call.wire
        await self._call.send({"type": "http.response.body", "body": data, "more_body": True})
        await wire.drained()
        wire.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSING):
                await self._call.receive()


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
