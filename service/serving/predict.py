"""One prediction: compute, then the final check in the same event-loop step as the write (rules 6 and 7)."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from service.serving.answers import Answer, Message, ProblemError, render, unavailable
from service.serving.compute import Compute, ComputeError, OverloadedError
from service.serving.metrics import ServingMetrics
from service.serving.replica import Pointer, Replica
from service.serving.wire import Outbox, Wire
from shards.logits import Logits

Send = Callable[[Message], Awaitable[None]]
ATTEMPTS = 32
"""Computations of one request; each one after the first follows a rise of the floor."""


@dataclass(frozen=True, slots=True)
class Served:
    """One model as the application sees it."""

    replica: Replica
    outbox: Outbox = field(default_factory=Outbox)


@dataclass(frozen=True, slots=True)
class Predictions:
    """Answers predict calls."""

    compute: Compute
    metrics: ServingMetrics

    async def predict(self, served: Served, texts: Sequence[str], least: int, wire: Wire, send: Send) -> str:
        """Compute and answer; again from the start where the floor rose meanwhile. Returns the result for metrics.

        Raises:
            ProblemError: nothing was sent.
        """
        replica = served.replica
        started = time.monotonic()
        for _ in range(ATTEMPTS):
            pointer = replica.begin()
            if pointer is None:
                raise unavailable("not-serving", replica.why_not())
            passed = False
            try:
                answer = render(replica.model, pointer, await self._compute(pointer, texts, least))
                await wire.drained()  # of an earlier answer on the connection: `send` would wait for it after the check
                # From here to the write nothing is awaited.
                passed = replica.check(pointer.version)
            finally:
                if not passed:
                    replica.abandon(pointer.version)
            if passed:
                cut = not await _transmit(served, pointer.version, answer, wire, send)
                self.metrics.duration.labels(replica.model).observe(time.monotonic() - started)
                return "cut" if cut else "answered"
            self.metrics.recomputed.labels(replica.model).inc()
        raise unavailable("not-serving", "the floor rose again with every attempt; try again")

    async def _compute(self, pointer: Pointer, texts: Sequence[str], least: int) -> list[Logits]:
        if pointer.version < least:
            detail = f"this server answers from version {pointer.version}, older than X-Expunge-Min-Version; try again"
            raise unavailable("version-too-low", detail)
        if pointer.live == 0:
            raise unavailable(
                "no-live-shard",
                "every stage of the model is out of service until a rebuild; see its capacity",
            )
        try:
            return await self.compute.run(pointer.predictor, texts)
        except OverloadedError:
            raise unavailable("overloaded", "too many inputs are waiting; try again, or another model server") from None
        except ComputeError as error:
            raise ProblemError(500, "engine-failed", f"the engine failed ({error}); see the server's log") from None


async def _transmit(served: Served, version: int, answer: Answer, wire: Wire, send: Send) -> bool:
    """Send an answer that passed the final check; False where it was taken back on its way.

    It counts against `covers` until the kernel has its last byte.
    """
    replica = served.replica
    head, body = answer.messages()
    try:
        for message in (head, body):
            if message is body and wire.waited and not replica.may_answer(version):
                wire.abort()
            await send(message)  # waits for nothing: the wire is not paused, or gone
            if wire.paused:
                if replica.fence.local_floor > version:
                    wire.abort()
                await served.outbox.drained(version, wire)
        return not wire.aborted
    finally:
        replica.sent(version)
