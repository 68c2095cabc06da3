"""A real installation to measure: `expunge up` in a process of its own, with as many programs as a figure asks for."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.results import BenchmarkError
from service.cli.demo.calls import Calls
from service.cli.demo.sample import Review
from service.cli.demo.stack import Stack
from service.cli.demo.stack import running as start

DATASET, MODEL = "reviews", "reviews-model"
STEP_WITHIN = 900.0
LEASE_SECONDS = 3.0
"""Longer than a lease: so long after Postgres started, a barrier declares by timeout alone (protocol.md, rule 10)."""

Update = Callable[[str, float, float | None], None]


@contextmanager
def running(home: Path, *, trainers: int) -> Generator[tuple[Stack, Calls]]:
    """`expunge up` on `home/state`, and calls to it.

    Raises:
        DemoError: it did not start.
    """
    with start(home, lambda: None, trainers=trainers) as up:
        calls = Calls(up.api_url, up.api_key)
        try:
            yield up, calls
        finally:
            calls.close()


def train(stack: Stack, calls: Calls, reviews: Sequence[Review], recipe: Mapping[str, Any], update: Update) -> None:
    """Declare dataset and model, upload, and wait until every stage is trained and served.

    What deletions take from it is trained back no sooner than their due date asks for.
    """
    grid = {name: recipe[name] for name in ("shards", "slices", "classes")}
    calls.post("/v1/datasets", {"name": DATASET, **grid})
    calls.upload(DATASET, reviews, lambda _lines: None)
    policy = {"kind": "by_deadline"}
    calls.post("/v1/models", {"name": MODEL, "dataset": DATASET, "recipe": recipe, "rebuild": policy})
    calls.post(f"/v1/models/{MODEL}/rebuild")

    def trained() -> bool:
        model = calls.get(f"/v1/models/{MODEL}")
        jobs: Mapping[str, int] = model["jobs"]
        if jobs.get("failed"):
            raise BenchmarkError(f"{jobs['failed']} stages could not be trained\n{stack.trouble('train-1')}")
        update("train", jobs.get("done", 0), sum(jobs.values()) or None)
        return model["version"] > 0 and not model["building"]

    wait_for(stack, trained, "training", pause=0.25)


def settle(stack: Stack, calls: Calls) -> int:
    """Wait after a start until every model server answers from the newest version and leases are trusted again."""
    version = calls.get(f"/v1/models/{MODEL}")["version"]
    if late := calls.laggards(stack.servers, MODEL, version):
        raise BenchmarkError(f"{', '.join(late)} did not load version {version}\n{stack.trouble('server-1')}")
    time.sleep(LEASE_SECONDS)
    return version


def wait_for(stack: Stack, reached: Callable[[], bool], what: str, *, pause: float) -> None:
    """Ask until it is so.

    Raises:
        BenchmarkError: not within a quarter of an hour.
    """
    until = time.monotonic() + STEP_WITHIN
    while not reached():
        stack.check()
        if time.monotonic() > until:
            raise BenchmarkError(f"{what} took more than {STEP_WITHIN:.0f} s\n{stack.trouble('default')}")
        time.sleep(pause)
