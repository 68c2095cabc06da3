"""`deactivation`: from the 202 to `deactivated` through the real programs, against SISA's retraining.

Alone, beside predictions, while stages train on both cores, and with a replica that is stopped.
"""

import os
import signal
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from statistics import quantiles
from typing import Any

from benchmarks import children, data, prepared, sisa, system
from benchmarks.prepared import Prepared, Victims
from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.calls import Calls, Deactivation
from service.cli.demo.sample import CLASSES, Sample
from service.cli.demo.show import Screen
from service.cli.demo.stack import Stack
from service.cli.demo.traffic import Traffic
from service.settings import Settings

REQUESTS = 60
BESIDE_REQUESTS = 60
"""The same, beside other work."""
WARM_UP = 3
"""Requests before those that are timed: connections are opened, modules imported."""
PAUSE = 0.3
"""Seconds between a certificate and the next request: relay and planner have had their turn."""
STOPPED = 4
"""Requests while a replica is stopped, each replica in turn: the supervisor waits longer at each restart."""
TRAFFIC_PAUSE = 0.02
BUSY, BUSY_EPOCHS = "busy-model", 200
"""The model that trains meanwhile, on records of its own."""

Beside = Callable[[Prepared, Stack, Calls], AbstractContextManager[Callable[[], None]]]
"""What else is at work: a context that gives a check whether it was."""


def measure(screen: Screen, *, full: bool) -> Measured:  # noqa: ARG001 - one size: requests are what a grid has
    """Train once; delete one stand-in reviewer after another in each of four settings; time SISA on those records."""
    alone = _timed(screen, "nothing else at work", REQUESTS, _nothing)
    traffic = _timed(screen, "beside predictions", BESIDE_REQUESTS, _predicting)
    training = _timed(screen, "while both cores train", BESIDE_REQUESTS, _training, trainers=2)
    stopped = _with_a_stopped_replica(screen)
    sample = prepared.prepare(screen).sample
    baseline = _baseline(screen, sample)
    client, server = _percentiles(each.client_ms for each in alone), _percentiles(each.server_ms for each in alone)
    beside, busy = (_percentiles(each.client_ms for each in found) for found in (traffic, training))
    return Measured(
        {
            "p50_ms": client[49],
            "p99_ms": client[98],
            "server_p50_ms": server[49],
            "server_p99_ms": server[98],
            "p50_ms_traffic": beside[49],
            "p99_ms_traffic": beside[98],
            "p50_ms_training": busy[49],
            "p99_ms_training": busy[98],
            "dead_replica_ms": max(each.client_ms for each in stopped),
            "over_sisa": baseline.seconds * 1000 / client[49],
            "sisa_s": baseline.seconds,
        },
        _sizes(sample, baseline),
    )


def _timed(screen: Screen, setting: str, count: int, beside: Beside, *, trainers: int = 0) -> list[Deactivation]:
    """Deletions one at a time, after a few that are not counted."""
    found: list[Deactivation] = []
    with prepared.running(screen, trainers=trainers) as (trained, stack, calls, version):
        victims = Victims(trained, version)
        bar = screen.bar(f"deleting one after another, {setting}", WARM_UP + count)
        with beside(trained, stack, calls) as check, bar as advance:
            for _ in range(WARM_UP + count):
                found.append(victims.delete(calls))
                _wait_until_idle(stack, calls, found[-1])
                advance(1)
            check()
    return found[WARM_UP:]


@contextmanager
def _nothing(_trained: Prepared, _stack: Stack, _calls: Calls) -> Generator[Callable[[], None]]:
    yield lambda: None


@contextmanager
def _predicting(trained: Prepared, stack: Stack, _calls: Calls) -> Generator[Callable[[], None]]:
    """One sender per model server, each with the next text shortly after the last answer."""
    texts = [review.text for review in trained.sample.training[:200]]
    traffic = Traffic(stack.servers, system.MODEL, stack.api_key, texts, pause=TRAFFIC_PAUSE)
    traffic.start()

    def check() -> None:
        if (seen := traffic.seen()).failed or not seen.total:
            raise BenchmarkError(f"of {seen.total} predictions failed: {seen.failures}")

    try:
        yield check
    finally:
        traffic.stop()


@contextmanager
def _training(trained: Prepared, _stack: Stack, calls: Calls) -> Generator[Callable[[], None]]:
    """Another model in training all the time, on the same texts as other people's records."""
    recipe = data.recipe(shards=2, slices=3, orders=1, epochs=BUSY_EPOCHS).to_json()
    grid = {name: recipe[name] for name in ("shards", "slices", "classes")}
    calls.post("/v1/datasets", {"name": BUSY, **grid})
    others = [
        replace(review, record_id=f"other-{review.record_id}", reviewer=f"other-{review.reviewer}")
        for review in trained.sample.training
    ]
    calls.upload(BUSY, others, lambda _lines: None)
    calls.post("/v1/models", {"name": BUSY, "dataset": BUSY, "recipe": recipe})
    calls.post(f"/v1/models/{BUSY}/rebuild")

    def running() -> int:
        return calls.get(f"/v1/models/{BUSY}")["jobs"].get("running", 0)

    until = time.monotonic() + 60
    while running() < 2:
        if time.monotonic() > until:
            raise BenchmarkError("the other model does not train on both cores")
        time.sleep(0.1)

    def check() -> None:
        if running() < 2:
            raise BenchmarkError("the other model had been trained before the deletions were done")

    yield check


def _with_a_stopped_replica(screen: Screen) -> list[Deactivation]:
    """Each time a model server is stopped (SIGSTOP) just before the request, and is killed after it."""
    found: list[Deactivation] = []
    with prepared.running(screen) as (trained, stack, calls, version):
        victims = Victims(trained, version)
        with screen.bar("deleting while a replica is stopped", WARM_UP + STOPPED) as advance:
            for _ in range(WARM_UP):
                _wait_until_idle(stack, calls, victims.delete(calls))
                advance(1)
            for number in range(STOPPED):
                pid = stack.programs[f"server-{1 + number % 2}"]
                os.kill(pid, signal.SIGSTOP)
                found.append(victims.delete(calls))
                os.kill(pid, signal.SIGKILL)
                if late := calls.laggards(stack.servers, system.MODEL, found[-1].version):
                    raise BenchmarkError(f"{', '.join(late)} did not come back\n{stack.trouble('server-1')}")
                advance(1)
    return found


def _wait_until_idle(stack: Stack, calls: Calls, done: Deactivation) -> None:
    def completed() -> bool:
        return calls.get(f"/v1/deletion-requests/{done.request_id}")["state"] == "completed"

    system.wait_for(stack, completed, "erasure", pause=0.02)
    time.sleep(PAUSE)


def _percentiles(values: Iterable[float]) -> list[float]:
    return quantiles(list(values), n=100, method="inclusive")


def _baseline(screen: Screen, sample: Sample) -> sisa.Retraining:
    """Every fourth record is a shard, every third of those a slice: as even as SISA's random split can be."""
    rows = [(review.text, CLASSES.index(review.label)) for review in sample.training[:: sisa.SHARDS]]
    slices = [rows[number :: sisa.SLICES] for number in range(sisa.SLICES)]
    job = sisa.Job(data.encoder(), data.recipe().max_tokens, slices)
    with screen.bar("SISA: training the slices of one shard", sisa.steps([len(each) for each in slices])) as advance:
        (found,) = children.run(sisa.retrain, [job], processes=1, advance=advance)
    return found


def _sizes(sample: Sample, baseline: sisa.Retraining) -> dict[str, Any]:
    settings = Settings()
    return {
        "records": len(sample.training),
        "requests": REQUESTS,
        "requests_beside_other_work": BESIDE_REQUESTS,
        "requests_with_a_stopped_replica": STOPPED,
        "warm_up_requests": WARM_UP,
        "replicas": 2,
        "trainers_while_training": 2,
        "senders_of_predictions": 2,
        "pause_between_predictions_s": TRAFFIC_PAUSE,
        "lease_ms": settings.lease_ttl_ms,
        "margin_ms": settings.lease_margin_ms,
        **prepared.GRID,
        "epochs": prepared.EPOCHS,
        "note": "client: from the 202's arrival to the first GET that says deactivated, asked for every 2 ms after"
        " the last answer; server: both times by Postgres, from the transaction that receives the request. One at"
        " a time. One epoch: how fast a swap is does not depend on how long was trained",
        "sisa": _said(baseline),
    }


def _said(baseline: sisa.Retraining) -> dict[str, Any]:
    return {
        "shards": sisa.SHARDS,
        "slices": sisa.SLICES,
        "epochs_of_plain_training": sisa.EPOCHS,
        "batch_size": sisa.BATCH,
        "threads": 1,
        "arithmetic": f"{baseline.arithmetic}, {baseline.attention} attention: the fastest of those tried in this run",
        "slice_seconds": [round(each, 2) for each in baseline.slice_seconds],
        "losses": [round(each, 3) for each in baseline.losses],
        "note": "all parameters are trained; mean over the slice that a uniformly random record lies in",
    }
