"""One answer: compute, then the final check in the same event-loop step as the write (rules 6 and 7)."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from service.serving.answers import Answer, ProblemError, unavailable
from service.serving.compute import Compute, ComputeError, OverloadedError
from service.serving.incoming import Call
from service.serving.metrics import ServingMetrics
from service.serving.replica import Pointer, Replica
from service.serving.wire import Outbox
from shards.engine.interface import Input
from shards.errors import InputError
from shards.logits import Logits

T = TypeVar("T")

ATTEMPTS = 32
"""Computations of one request; each one after the first follows a rise of the floor."""


@dataclass(frozen=True, slots=True)
class Served:
    """One model as the application sees it."""

    replica: Replica
    outbox: Outbox = field(default_factory=Outbox)


@dataclass(frozen=True, slots=True)
class Question:
    """What a call asks, in whichever protocol."""

    inputs: Callable[[Pointer], Sequence[Input]]
    """The inputs for that version; raises `ProblemError` where they are not for it."""
    render: Callable[[str, Pointer, Sequence[Logits]], Answer]
    """The response from the model's name, the version and its logits."""


Work = Callable[[Pointer], Awaitable[Answer | None]]
"""Computes an answer from a version; None where the version may not answer any more."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Answers questions whose answer is one batch of logits."""

    compute: Compute
    metrics: ServingMetrics

    async def predict(self, served: Served, question: Question, call: Call) -> str:
        """Compute and answer; the result for metrics.

        Raises:
            ProblemError: nothing was sent.
        """
        return await respond(served, partial(self._answer, served.replica, question, call.least), call, self.metrics)

    async def _answer(self, replica: Replica, question: Question, least: int, pointer: Pointer) -> Answer:
        check_version(pointer, least)
        inputs = question.inputs(pointer)
        check_live(replica, pointer)
        parts = await computed(self.compute.run(pointer.predictor, inputs))
        return question.render(replica.model, pointer, parts)


async def respond(served: Served, work: Work, call: Call, metrics: ServingMetrics) -> str:
    """Answer in one piece; again from the start where the floor rose meanwhile. Returns the result for metrics.

    Raises:
        ProblemError: nothing was sent.
    """
    replica = served.replica
    started = time.monotonic()
    for _ in range(ATTEMPTS):
        pointer = begin(replica)
        passed = False
        try:
            answer = await work(pointer)
            await call.wire.drained()  # of an earlier answer on the connection: `send` would wait after the check
            # From here to the write nothing is awaited.
            passed = answer is not None and replica.check(pointer.version)
        finally:
            if not passed:
                replica.abandon(pointer.version)
        if answer is not None and passed:
            cut = not await _transmit(served, pointer.version, answer, call)
            metrics.duration.labels(replica.model).observe(time.monotonic() - started)
            return "cut" if cut else "answered"
        metrics.recomputed.labels(replica.model).inc()
    raise unavailable("not-serving", "the floor rose again with every attempt; try again")


def begin(replica: Replica) -> Pointer:
    """Start work on the newest version.

    Raises:
        ProblemError: 503 where nothing may be answered now.
    """
    pointer = replica.begin()
    if pointer is None:
        raise unavailable("not-serving", replica.why_not())
    return pointer


def check_version(pointer: Pointer, least: int) -> None:
    """Refuse to answer from an older version than the caller takes.

    Raises:
        ProblemError: 503.
    """
    if pointer.version < least:
        detail = f"this server answers from version {pointer.version}, older than X-Expunge-Min-Version; try again"
        raise unavailable("version-too-low", detail)


def check_live(replica: Replica, pointer: Pointer) -> None:
    """Refuse to answer from fewer shards than the model's policy asks for.

    Raises:
        ProblemError: 503 with the reason, and where the forecast is.
    """
    forecast = f"GET /v1/models/{replica.model}/capacity of the API says when more are trained"
    if pointer.live == 0:
        detail = f"every stage of the model is out of service until a rebuild; {forecast}"
        raise unavailable("no-live-shard", detail)
    if pointer.live < replica.min_shards:
        detail = f"{pointer.live} of {pointer.of} shards are live and min_shards is {replica.min_shards}; {forecast}"
        raise unavailable("too-few-shards", detail)


async def computed(work: Awaitable[T]) -> T:
    """What the compute thread returns, its failures as problems.

    Raises:
        ProblemError: 503 or 500.
    """
    try:
        return await work
    except OverloadedError:
        raise unavailable("overloaded", "too many inputs are waiting; try again, or another model server") from None
    except ComputeError as error:
        if str(error) == InputError.__name__:
            detail = "an input cannot be read: send whole PNG or JPEG files, or arrays of finite numbers"
            raise ProblemError(422, "invalid-input", detail) from None
        raise ProblemError(500, "engine-failed", f"the engine failed ({error}); see the server's log") from None


async def _transmit(served: Served, version: int, answer: Answer, call: Call) -> bool:
    """Send an answer that passed the final check; False where it was taken back on its way.

    It counts against `covers` until the kernel has its last byte.
    """
    replica, wire = served.replica, call.wire
    head, body = answer.messages()
    try:
        for message in (head, body):
            if message is body and wire.waited and not replica.may_answer(version):
                wire.abort()
            await call.send(message)  # waits for nothing: the wire is not paused, or gone
            if wire.paused:
                if replica.fence.local_floor > version:
                    wire.abort()
                await served.outbox.drained(version, wire)
        return not wire.aborted
    finally:
        replica.sent(version)
