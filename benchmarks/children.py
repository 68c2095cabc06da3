"""Work in child processes of one thread each, as training workers are, with one count of what is done."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, TypeVar

from shards.engine import determinism

J = TypeVar("J")
R = TypeVar("R")

POLL_SECONDS = 0.25
_counters: list[Any] = []
"""In a child: the count that it shares with its parent."""


def tick(count: int = 1) -> None:
    """In a child: so much more is done."""
    for counter in _counters:
        with counter.get_lock():
            counter.value += count


def run(function: Callable[[J], R], jobs: Sequence[J], *, processes: int, advance: Callable[[float], None]) -> list[R]:
    """Call `function` with each job in one of so many fresh processes; the answers in the jobs' order.

    `advance` is told how much the children's `tick` counted. The first error ends all, and is raised.
    """
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    seen = 0
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(counter,)) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                if error := future.exception():
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise error
            now = counter.value
            advance(now - seen)
            seen = now
    return [future.result() for future in futures]


def _begin(counter: Any) -> None:
    determinism.prepare()
    _counters.append(counter)
