"""The one compute thread: torch runs here and nowhere else, in small passes, while the event loop stays free.

Rows of all calls wait by version and padded length: those of one length fill a pass together, and no answer's bits
depend on the company. The pass with the oldest row is next, so no length waits for another one's traffic to end.
"""

import asyncio
import os
import sys
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from shards.engine.interface import Input, Predictor
from shards.engine.known import Known
from shards.logits import Logits

T = TypeVar("T")

ROWS = 8
"""Rows per pass: more are hardly faster, and hold up whoever waits for the thread."""
PATIENCE = 0.002
"""Seconds from its arrival that a row waits at most for a pass to fill, while the thread has nothing else to do."""
BACKLOG_ROWS = 4096
"""Queued rows beyond which new work is refused: waiting longer helps nobody."""
NICENESS = 5
"""Added to the process's own: between the threads that swap and training (10), so that no swap waits for answers."""


class OverloadedError(Exception):
    """The queue is full; the caller should try again later or elsewhere."""


class ComputeError(Exception):
    """The engine failed; the message is the class of its error."""


@dataclass(slots=True, eq=False)
class _Call:
    predictor: Predictor
    inputs: Sequence[Input]
    wanted: Callable[[], bool]
    arrived: float
    known: Sequence[Known]
    """What was computed of each input, one for each."""
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Logits | None]"
    answers: list[Any] = field(default_factory=list)
    """Logits by row, as far as they are known."""
    left: int = 0

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more, or its version may not answer."""
        return self.future.done() or not self.wanted()


@dataclass(slots=True, eq=False)
class _Row:
    """One input of a call, as the engine takes it."""

    call: _Call
    place: int
    encoded: Any


@dataclass(slots=True, eq=False)
class _Turn:
    """One short piece of a long work; it runs on its own."""

    work: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


class Compute:
    """A queue and a thread. Rows that wait for the same predictor at the same length run together."""

    def __init__(self) -> None:
        """Start the thread; `close` ends it."""
        self._calls: deque[_Call] = deque()
        self._rows: dict[tuple[Predictor, int], deque[_Row]] = {}
        """By predictor and padded length. The thread's own."""
        self._turns: deque[_Turn] = deque()
        self._turn_is_next = False
        self._in_company = False
        """Whether the last pass had rows of several calls: then another is likely to come in a moment."""
        self._ready = threading.Condition()
        self._waiting = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    async def run(
        self,
        predictor: Predictor,
        inputs: Sequence[Input],
        wanted: Callable[[], bool] = lambda: True,
        *,
        arrived: float | None = None,
        known: Sequence[Known] = (),
    ) -> Logits | None:
        """Logits (inputs, outputs); None where `wanted`, asked before each pass, said no: then none is computed.

        `arrived` is when the request came, in seconds of the monotonic clock, now unless given, and `known`, one for
        each input, what an earlier call computed of it: what is computed again keeps its place and runs only what has
        changed, or requests would starve while versions follow one another.

        Raises:
            OverloadedError: the queue is full, or closed.
            ComputeError: the engine failed.
        """
        loop = asyncio.get_running_loop()
        own = known or [{} for _ in inputs]
        call = _Call(predictor, inputs, wanted, arrived or time.monotonic(), own, loop, loop.create_future())
        with self._ready:
            if self._closed or self._waiting + len(inputs) > BACKLOG_ROWS:
                raise OverloadedError
            self._waiting += len(inputs)
            self._calls.append(call)
            self._ready.notify()
        return await call.future

    async def turn(self, work: Callable[[], T]) -> T:
        """What `work` returns: it should be quick, since passes and turns alternate while both wait.

        A turn is never refused for want of room: the caller bounds how many long works there are.

        Raises:
            OverloadedError: the queue is closed.
            ComputeError: the engine failed.
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
        if sys.platform == "linux":  # where a thread has a niceness of its own
            me = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, me, os.getpriority(os.PRIO_PROCESS, me) + NICENESS)
        while self._step():
            pass

    def _step(self) -> bool:
        """One turn or one pass; False at the end. Nothing of it is held afterwards: old weights must go."""
        self._admit()
        with self._ready:
            if not (self._calls or self._turns or self._rows):
                if self._closed:
                    return False
                self._ready.wait()
                return True
            turn = self._turns.popleft() if self._turns and (self._turn_is_next or not self._rows) else None
            if turn is None and self._patient():
                return True
        self._turn_is_next = turn is None
        if turn is not None:
            _take_turn(turn)
        elif self._rows:
            rows = self._take()
            self._in_company = len({id(row.call) for row in rows}) > 1
            _compute(rows)
        return True

    def _admit(self) -> None:
        """Encode what has arrived, each call by itself."""
        while self._calls:
            call, failure = self._calls.popleft(), ""
            encoded: Sequence[tuple[int, Any]] = ()
            try:
                encoded = () if call.over else call.predictor.encode(call.inputs)
            except Exception as error:  # noqa: BLE001 - handed over to whoever asked
                failure = type(error).__name__  # its traceback would hold the predictor, its message may hold an input
            if not encoded:
                with self._ready:
                    self._waiting -= len(call.inputs)
                if failure:
                    _fail(call, failure)
                else:
                    _settle(call, None)
                continue
            call.answers, call.left = [None] * len(encoded), len(encoded)
            for place, (length, each) in enumerate(encoded):
                queue = self._rows.setdefault((call.predictor, length), deque())
                insort(queue, _Row(call, place, each), key=lambda row: row.call.arrived)

    def _patient(self) -> bool:
        """Wait for company, if there is room and a reason for it; whether something may have arrived."""
        if not self._rows or not self._in_company or self._turns or self._closed:
            return False
        oldest = min(self._rows.values(), key=lambda queue: queue[0].call.arrived)
        left = PATIENCE - (time.monotonic() - oldest[0].call.arrived)
        return left > 0 and len(oldest) < ROWS and (bool(self._calls) or self._ready.wait(left))

    def _take(self) -> list[_Row]:
        """The oldest row that waits, and those that can share its pass; without calls that are over."""
        key = min(self._rows, key=lambda key: self._rows[key][0].call.arrived)
        queue, rows = self._rows[key], list[_Row]()
        while queue and len(rows) < ROWS:
            row = queue.popleft()
            with self._ready:
                self._waiting -= 1
            if row.call.over:
                _settle(row.call, None)
            else:
                rows.append(row)
        if not queue:
            del self._rows[key]
        return rows


def _take_turn(turn: _Turn) -> None:
    try:
        result = turn.work()
    except Exception as error:  # noqa: BLE001 - handed over to whoever asked
        _fail(turn, type(error).__name__)
        return
    _settle(turn, result)


def _compute(rows: Sequence[_Row]) -> None:
    """Run a pass and hand each call its rows; after a failure each call's run alone, so that it takes none along."""
    if not rows:
        return
    try:
        known = [row.call.known[row.place] for row in rows]
        logits = rows[0].call.predictor.infer([row.encoded for row in rows], known)
    except Exception as error:  # noqa: BLE001 - handed over to whoever asked
        calls = list(dict.fromkeys(row.call for row in rows))
        if len(calls) > 1:
            for call in calls:
                _compute([row for row in rows if row.call is call])
        else:
            _fail(calls[0], type(error).__name__)
        return
    for row, answer in zip(rows, logits, strict=True):
        row.call.answers[row.place] = answer
        row.call.left -= 1
        if not row.call.left:
            _settle(row.call, np.stack(row.call.answers))


def _settle(work: _Call | _Turn, result: Any) -> None:
    _deliver(work, lambda: work.future.set_result(result))


def _fail(work: _Call | _Turn, failure: str) -> None:
    _deliver(work, lambda: work.future.set_exception(ComputeError(failure)))


def _deliver(work: _Call | _Turn, tell: Callable[[], None]) -> None:
    def settle() -> None:
        if not work.future.done():  # else the caller has gone, or was told
            tell()

    try:
        work.loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody waits
        return
