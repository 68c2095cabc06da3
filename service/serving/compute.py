"""The one compute thread: torch runs here and nowhere else, in small batches, while the event loop stays free."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from shards.engine.interface import Input, Predictor
from shards.logits import Logits

T = TypeVar("T")

ROWS = 32
"""Rows per pass."""
BACKLOG_ROWS = 4096
"""Queued rows beyond which new work is refused: waiting longer helps nobody."""


class OverloadedError(Exception):
    """The queue is full; the caller should try again later or elsewhere."""


@dataclass(slots=True, eq=False)
class _Job:
    """At most `ROWS` rows of a call."""

    predictor: Predictor
    inputs: Sequence[Input]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Logits]"


@dataclass(slots=True, eq=False)
class _Turn:
    """One short piece of a long work; it runs on its own."""

    work: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


class Compute:
    """A queue and a thread. What is queued for the same predictor runs together, at most `ROWS` rows a pass."""

    def __init__(self) -> None:
        """Start the thread; `close` ends it."""
        self._jobs: deque[_Job] = deque()
        self._turns: deque[_Turn] = deque()
        self._turn_is_next = False
        self._ready = threading.Condition()
        self._rows = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    async def run(self, predictor: Predictor, inputs: Sequence[Input]) -> list[Logits]:
        """Logits of `inputs`, in parts whose rows follow one another.

        Raises:
            OverloadedError: the queue is full, or closed.
        """
        loop = asyncio.get_running_loop()
        cuts = range(0, len(inputs), ROWS)  # a turn that waits comes between two of them
        jobs = [_Job(predictor, inputs[at : at + ROWS], loop, loop.create_future()) for at in cuts]
        with self._ready:
            if self._closed or self._rows + len(inputs) > BACKLOG_ROWS:
                raise OverloadedError
            self._rows += len(inputs)
            self._jobs.extend(jobs)
            self._ready.notify()
        return await asyncio.gather(*(job.future for job in jobs))

    async def turn(self, work: Callable[[], T]) -> T:
        """What `work` returns: it should be quick, since passes and turns alternate while both wait.

        A turn is never refused for want of room: the caller bounds how many long works there are.

        Raises:
            OverloadedError: the queue is closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        with self._ready:
            if self._closed:
                raise OverloadedError
            self._turns.append(_Turn(work, loop, future))
            self._ready.notify()
        return await future

    def close(self) -> None:
        """Finish what is queued, then end the thread."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            if isinstance(batch, _Turn):
                _take_turn(batch)
            else:
                _compute(batch)
            # Held until the next batch otherwise, and with it the weights of an old version.
            del batch

    def _take(self) -> list[_Job] | _Turn | None:
        """The first job and those behind it that fit into the same pass, or a turn; None at the end."""
        with self._ready:
            while not self._jobs and not self._turns and not self._closed:
                self._ready.wait()
            if self._turns and (self._turn_is_next or not self._jobs):
                self._turn_is_next = False
                return self._turns.popleft()
            if not self._jobs:
                return None
            self._turn_is_next = True
            batch = [self._jobs.popleft()]
            rows = len(batch[0].inputs)
            while self._jobs:
                following = self._jobs[0]
                rows += len(following.inputs)
                if rows > ROWS or following.predictor is not batch[0].predictor:
                    break
                batch.append(self._jobs.popleft())
            self._rows -= sum(len(job.inputs) for job in batch)
            return batch


def _take_turn(turn: _Turn) -> None:
    try:
        result = turn.work()
    except Exception as error:  # noqa: BLE001 - handed over to whoever asked
        _deliver(turn, None, type(error).__name__)
        return
    _deliver(turn, result, "")


def _compute(batch: Sequence[_Job]) -> None:
    """Run a batch and hand each job its rows; after a failure each job runs alone, so that it takes none along."""
    inputs = [each for job in batch for each in job.inputs]
    logits: Logits | None = None
    failure = ""
    try:
        logits = batch[0].predictor.logits(inputs)
    except Exception as error:  # noqa: BLE001 - handed over to whoever asked
        failure = type(error).__name__  # its traceback would hold the predictor, its message may hold an input
    if logits is None and len(batch) > 1:
        for job in batch:
            _compute([job])
        return
    start = 0
    for job in batch:
        _deliver(job, None if logits is None else logits[start : start + len(job.inputs)], failure)
        start += len(job.inputs)


class ComputeError(Exception):
    """The engine failed; the message is the class of its error."""


def _deliver(job: _Job | _Turn, result: Any, failure: str) -> None:
    def settle() -> None:
        if job.future.done():  # the caller has gone
            return
        if failure:
            job.future.set_exception(ComputeError(failure))
        else:
            job.future.set_result(result)

    try:
        job.loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody waits
        return
