"""One answer: compute, then the final check in the same event-loop step as the write (rules 6 and 7)."""

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from service.domain.answers import Answers
from service.serving.answers import Answer, ProblemError, unavailable
from service.serving.compute import Compute, ComputeError, OverloadedError
from service.serving.incoming import Call
from service.serving.metrics import ServingMetrics
from service.serving.replica import ANY, Pointer, Replica, Wish
from service.serving.wire import Outbox
from shards.engine.interface import Input
from shards.engine.known import Known
from shards.errors import InputError
from shards.logits import Logits

T = TypeVar("T")

LONGEST_WAIT = 3600
"""Seconds in `Retry-After` at most: shards may come back sooner than a rebuild, with a request's revocation."""
ENGINE_FAILED = {"engine-failed", "upstream-failed"}
"""Problems of whatever computes the answers, in this process or behind a proxy."""
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

    inputs: Callable[[Pointer, Answers], Sequence[Input]]
    """The inputs for that version and policy; raises `ProblemError` where they are not for it."""
    render: Callable[[str, Pointer, Logits, Answers], Answer]
    """The response from the model's name, the version and its logits, as much of them as the policy lets out."""


Work = Callable[[Pointer], Awaitable[Answer | None]]
"""Computes an answer from a version; None where the version may not answer any more."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A call through all its attempts."""

    question: Question
    least: int
    arrived: float = field(default_factory=time.monotonic)
    known: list[Known] = field(default_factory=list[Known])


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
        asked = _Asked(question, call.least)
        return await respond(served, partial(self._answer, served.replica, asked), call, self.metrics)

    async def _answer(self, replica: Replica, asked: _Asked, pointer: Pointer) -> Answer | None:
        check_version(pointer, asked.least)
        inputs = asked.question.inputs(pointer, replica.answers)
        check_live(replica, pointer)
        asked.known.extend({} for _ in inputs[len(asked.known) :])
        may_answer = partial(replica.may_answer, pointer.version)
        work = self.compute.run(pointer.predictor, inputs, may_answer, arrived=asked.arrived, known=asked.known)
        logits = await computed(work)
        return None if logits is None else asked.question.render(replica.model, pointer, logits, replica.answers)


async def respond(served: Served, work: Work, call: Call, metrics: ServingMetrics) -> str:
    """Answer in one piece; again from the start where the floor rose meanwhile. Returns the result for metrics.

    Raises:
        ProblemError: nothing was sent.
    """
    replica = served.replica
    started = time.monotonic()
    for _ in range(ATTEMPTS):
        pointer = begin(replica, call.wish)
        passed = False
        try:
            answer = await work(pointer)
            await call.wire.drained()  # of an earlier answer on the connection: `send` would wait after the check
            # From here to the write nothing is awaited.
            passed = answer is not None and replica.check(pointer.version)
        except ProblemError as problem:
            note_failure(replica, pointer, problem, metrics)
            raise
        finally:
            if not passed:
                replica.abandon(pointer.version)
        if answer is not None and passed:
            metrics.count(replica.model, pointer.version, "answered")
            cut = not await _transmit(served, pointer.version, answer, call)
            metrics.duration.labels(replica.model).observe(time.monotonic() - started)
            return "cut" if cut else "answered"
        metrics.recomputed.labels(replica.model).inc()
    raise unavailable("not-serving", "the floor rose again with every attempt; try again")


def begin(replica: Replica, wish: Wish = ANY) -> Pointer:
    """Start work on the newest version, or on the one of two that `wish` says.

    Raises:
        ProblemError: 503 where nothing may be answered now.
    """
    pointer = replica.begin(wish)
    if pointer is None:
        raise unavailable("not-serving", replica.why_not())
    return pointer


def note_failure(replica: Replica, pointer: Pointer, problem: ProblemError, metrics: ServingMetrics) -> None:
    """Count what the engine could not answer, and let a canary end with it."""
    if problem.slug in ENGINE_FAILED:
        metrics.count(replica.model, pointer.version, "engine_failed")
        replica.fail(pointer.version)


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
        ProblemError: 503 with the reason and the forecast.
    """
    if pointer.live >= max(1, replica.min_shards):
        return
    slug, why = "no-live-shard", "every stage of the model is out of service until a rebuild"
    if pointer.live:
        slug = "too-few-shards"
        why = f"{pointer.live} of {pointer.of} shards are live and min_shards is {replica.min_shards}"
    expected, wait = replica.expected_at, 1
    when = f"GET /v1/models/{replica.model}/capacity of the API says when more are trained"
    if expected is not None:
        when = f"a rebuild is expected to serve at {expected.isoformat(timespec='seconds')}; {when}"
        wait = min(LONGEST_WAIT, max(1, math.ceil((expected - datetime.now(UTC)).total_seconds())))
    told = {
        "shards": {"live": pointer.live, "of": pointer.of},
        "min_shards": replica.min_shards,
        "expected_at": expected.isoformat(timespec="seconds") if expected else None,
    }
    raise ProblemError(503, slug, f"{why}; {when}", headers=((b"retry-after", b"%d" % wait),), told=told)


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
