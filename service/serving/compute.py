"""The one compute thread: torch runs here and nowhere else, in small batches, while the event loop stays free."""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from service.serving.predictor import Predictor
from shards.logits import Logits

ROWS = 32
"""Rows per pass."""
BACKLOG_ROWS = 4096
"""Queued rows beyond which new work is refused: waiting longer helps nobody."""


class OverloadedError(Exception):
    """The queue is full; the caller should try again later or elsewhere."""


@dataclass(slots=True, eq=False)
class _Job:
    predictor: Predictor
    texts: Sequence[str]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[list[Logits]]"


class Compute:
    """A queue and a thread. What is queued for the same predictor runs together, at most `ROWS` rows a pass."""

    def __init__(self) -> None:
        """Start the thread; `close` ends it."""
        self._jobs: deque[_Job] = deque()
        self._ready = threading.Condition()
        self._rows = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    async def run(self, predictor: Predictor, texts: Sequence[str]) -> list[Logits]:
        """Logits of `texts`, in parts whose rows follow one another.

        Raises:
            OverloadedError: the queue is full, or closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Logits]] = loop.create_future()
        with self._ready:
            if self._closed or self._rows + len(texts) > BACKLOG_ROWS:
                raise OverloadedError
            self._rows += len(texts)
            self._jobs.append(_Job(predictor, texts, loop, future))
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
            _compute(batch)
            # Held until the next batch otherwise, and with it the weights of an old version.
            del batch

    def _take(self) -> list[_Job] | None:
        """The first job and those behind it that fit into the same pass; None at the end."""
        with self._ready:
            while not self._jobs and not self._closed:
                self._ready.wait()
            if not self._jobs:
                return None
            batch = [self._jobs.popleft()]
            rows = len(batch[0].texts)
            while self._jobs:
                following = self._jobs[0]
                rows += len(following.texts)
                if rows > ROWS or following.predictor is not batch[0].predictor:
                    break
                batch.append(self._jobs.popleft())
            self._rows -= sum(len(job.texts) for job in batch)
            return batch


def _compute(batch: Sequence[_Job]) -> None:
    """Run a batch and hand each job its rows; a failure goes to every job of the batch."""
    texts = [text for job in batch for text in job.texts]
    try:
        parts = [batch[0].predictor.logits(texts[start : start + ROWS]) for start in range(0, len(texts), ROWS)]
    except Exception as error:  # noqa: BLE001 - handed over to whoever asked
        failure = type(error).__name__  # its traceback would hold the predictor, its message may hold an input
        for job in batch:
            _deliver(job, None, failure)
        return
    if len(batch) == 1:
        _deliver(batch[0], parts, "")
        return
    start = 0
    for job in batch:  # more than one job: one part
        _deliver(job, [parts[0][start : start + len(job.texts)]], "")
        start += len(job.texts)


class ComputeError(Exception):
    """The engine failed; the message is the class of its error."""


def _deliver(job: _Job, parts: list[Logits] | None, failure: str) -> None:
    def settle() -> None:
        if job.future.done():  # the caller has gone
            return
        if parts is None:
            job.future.set_exception(ComputeError(failure))
        else:
            job.future.set_result(parts)

    try:
        job.loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody waits
        return
