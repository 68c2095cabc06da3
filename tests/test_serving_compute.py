"""The compute thread: calls in passes, turns between them."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from service.serving.compute import ROWS, Compute
from shards.logits import Logits


class Lengths:
    """Answers each text's length; notes what ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def logits(self, inputs: Sequence[Any]) -> Logits:
        self.begun.set()
        self.go.wait()
        self.ran.append("pass")
        return np.array([[len(each)] for each in inputs], np.float32)

    def answer(self, prepared: Any) -> Logits:
        return self.logits(prepared)


def test_a_turn_comes_between_the_passes_of_one_large_call() -> None:
    predictor = Lengths()
    texts = ["a" * size for size in range(3 * ROWS + 1)]

    async def both() -> tuple[list[Logits], None]:
        call = asyncio.create_task(compute.run(predictor, texts))
        await asyncio.to_thread(predictor.begun.wait)
        turn = asyncio.create_task(compute.turn(lambda: predictor.ran.append("turn")))
        await asyncio.sleep(0.01)
        predictor.go.set()
        return await call, await turn

    compute = Compute()
    parts, _ = asyncio.run(both())
    compute.close()
    assert predictor.ran == ["pass", "turn", "pass", "pass", "pass"]
    assert np.concatenate(parts)[:, 0].tolist() == list(range(3 * ROWS + 1))
