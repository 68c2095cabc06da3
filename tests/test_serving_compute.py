"""The compute thread: rows of one length in passes, turns between them, nobody waits behind another length."""

import asyncio
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

import service.serving.compute
from service.serving.compute import BACKLOG_ROWS, NICENESS, ROWS, Compute, ComputeError, OverloadedError
from shards.engine.known import Known
from shards.logits import Logits


class Lengths:
    """Answers each text's length, in buckets of tens; notes what ran. The first pass waits for `go`."""

    def __init__(self) -> None:
        self.ran: list[Any] = []
        self.known: list[Known] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def encode(self, inputs: Sequence[Any]) -> list[tuple[int, Any]]:
        if "unreadable" in inputs:
            raise ValueError("unreadable")
        return [(len(each) // 10, each) for each in inputs]

    def infer(self, encoded: Sequence[Any], known: Sequence[Known] = ()) -> Logits:
        self.known += known
        self.begun.set()
        self.go.wait()
        if "poison" in encoded:
            raise ArithmeticError
        self.ran.append([len(each) for each in encoded])
        return np.array([[len(each)] for each in encoded], np.float32)

    def logits(self, inputs: Sequence[Any]) -> Logits:
        return self.infer([each for _, each in self.encode(inputs)])

    def answer(self, prepared: Any) -> Logits:
        raise NotImplementedError


def running(work: Callable[[Compute], Awaitable[None]]) -> None:
    compute = Compute()
    asyncio.run(asyncio.wait_for(work(compute), 20))
    compute.close()


def test_a_turn_comes_between_the_passes_of_one_large_call() -> None:
    predictor = Lengths()
    texts = ["a" * (size % 10) for size in range(3 * ROWS + 1)]

    async def work(compute: Compute) -> None:
        call = asyncio.create_task(compute.run(predictor, texts))
        await asyncio.to_thread(predictor.begun.wait)
        turn = asyncio.create_task(compute.turn(lambda: predictor.ran.append("turn")))
        await asyncio.sleep(0.01)
        predictor.go.set()
        found = await call
        await turn
        assert found is not None
        assert found[:, 0].tolist() == [len(text) for text in texts]

    running(work)
    assert [len(each) for each in predictor.ran] == [ROWS, len("turn"), ROWS, ROWS, 1]


def test_rows_of_one_length_share_passes_and_the_oldest_goes_first() -> None:
    predictor = Lengths()

    async def work(compute: Compute) -> None:
        first = asyncio.create_task(compute.run(predictor, ["a"]))
        await asyncio.to_thread(predictor.begun.wait)
        calls = []
        for texts in (["a" * 25], ["a"] * (2 * ROWS), ["a" * 26, "a" * 3], ["a" * 41]):
            calls.append(asyncio.create_task(compute.run(predictor, texts)))
            await asyncio.sleep(0.01)
        predictor.go.set()
        found = await asyncio.gather(first, *calls)
        assert [each[:, 0].tolist() for each in found if each is not None] == [
            [1],
            [25],
            [1] * (2 * ROWS),
            [26, 3],
            [41],
        ]

    running(work)
    # Company of the same length from later calls; a popular length holds no other one up beyond its own age.
    assert predictor.ran == [[1], [25, 26], [1] * ROWS, [1] * ROWS, [3], [41]]


def test_what_is_computed_again_keeps_its_place_and_what_is_known_of_it() -> None:
    predictor, known = Lengths(), np.zeros(1, np.float32)

    async def work(compute: Compute) -> None:
        arrived = time.monotonic()
        first = asyncio.create_task(compute.run(predictor, ["a"]))
        await asyncio.to_thread(predictor.begun.wait)
        later = [asyncio.create_task(compute.run(predictor, ["a" * 25] * (ROWS + 1)))]
        later.append(asyncio.create_task(compute.run(predictor, ["a" * 41])))
        await asyncio.sleep(0.01)
        again = asyncio.create_task(compute.run(predictor, ["a" * 26], arrived=arrived, known=[{"a part": known}]))
        await asyncio.sleep(0.01)
        predictor.go.set()
        await asyncio.gather(first, *later, again)

    running(work)
    assert predictor.ran == [[1], [26] + [25] * (ROWS - 1), [25] * 2, [41]]
    assert predictor.known == [{}, {"a part": known}, *[{}] * (ROWS + 2)]


def test_one_callers_failure_is_no_other_ones() -> None:
    predictor = Lengths()

    async def work(compute: Compute) -> None:
        first = asyncio.create_task(compute.run(predictor, ["a"]))
        await asyncio.to_thread(predictor.begun.wait)
        bad = [asyncio.create_task(compute.run(predictor, [text, "bb"])) for text in ("unreadable", "poison")]
        good = asyncio.create_task(compute.run(predictor, ["bbb"]))
        await asyncio.sleep(0.01)
        predictor.go.set()
        await first
        found = await good
        assert found is not None
        assert found.tolist() == [[3]]
        for call, kind in zip(bad, ("ValueError", "ArithmeticError"), strict=True):
            with pytest.raises(ComputeError, match=kind):
                await call

    running(work)


def test_what_nobody_may_answer_any_more_is_not_computed() -> None:
    predictor = Lengths()
    serves = [True]

    async def work(compute: Compute) -> None:
        first = asyncio.create_task(compute.run(predictor, ["a"] * (ROWS + 2), lambda: serves[0]))
        await asyncio.to_thread(predictor.begun.wait)
        later = asyncio.create_task(compute.run(predictor, ["a"], lambda: serves[0]))
        gone = asyncio.create_task(compute.run(predictor, ["aa"]))
        await asyncio.sleep(0.01)
        gone.cancel()
        serves[0] = False
        await asyncio.sleep(0)
        predictor.go.set()
        assert await first is None
        assert await later is None
        await compute.turn(lambda: None)

    running(work)
    assert predictor.ran == [[1] * ROWS]


def test_what_waits_is_bounded_and_counted_down() -> None:
    predictor = Lengths()

    async def work(compute: Compute) -> None:
        predictor.go.set()
        for _ in range(3):
            assert await compute.run(predictor, ["a"] * BACKLOG_ROWS) is not None
            with pytest.raises(ComputeError):
                await compute.run(predictor, ["unreadable"] * BACKLOG_ROWS)
            assert await compute.run(predictor, ["a"] * BACKLOG_ROWS, lambda: False) is None
        with pytest.raises(OverloadedError):
            await compute.run(predictor, ["a"] * (BACKLOG_ROWS + 1))

    running(work)


def test_calls_that_come_together_share_a_pass_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once passes are shared, one that is not full waits a moment for the next; who is alone does not."""
    monkeypatch.setattr(service.serving.compute, "PATIENCE", 60.0)
    predictor = Lengths()
    predictor.go.set()

    async def work(compute: Compute) -> None:
        await asyncio.wait_for(compute.run(predictor, ["alone"]), 15)
        monkeypatch.setattr(service.serving.compute, "PATIENCE", 1.0)
        predictor.go.clear()
        predictor.begun.clear()
        calls = [asyncio.create_task(compute.run(predictor, ["first"]))]
        await asyncio.to_thread(predictor.begun.wait)
        calls += [asyncio.create_task(compute.run(predictor, ["a"])) for _ in range(2)]
        await asyncio.sleep(0.01)
        predictor.go.set()
        await asyncio.gather(*calls)
        pair = [asyncio.create_task(compute.run(predictor, ["later"]))]
        await asyncio.sleep(0.05)
        pair.append(asyncio.create_task(compute.run(predictor, ["company"])))
        await asyncio.gather(*pair)
        await compute.run(predictor, ["none comes"[:9]])

    running(work)
    assert predictor.ran == [[5], [5], [1, 1], [5, 7], [9]]


def test_no_weights_are_held_between_passes() -> None:
    predictor = Lengths()
    predictor.go.set()
    gone = weakref.ref(predictor)
    compute = Compute()
    asyncio.run(compute.run(predictor, ["a", "a" * 30]))
    del predictor
    deadline = time.monotonic() + 5
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None
    compute.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all threads of a process have one niceness")
def test_computing_yields_to_the_threads_that_swap() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def work(compute: Compute) -> None:
        assert await compute.turn(niceness) == niceness() + NICENESS

    running(work)
