"""`deactivation`: from the 202 to `deactivated` through the real programs, against SISA's retraining."""

import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks import children, data, sisa, system
from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.calls import Calls, Deactivation
from service.cli.demo.sample import CLASSES, SUBJECT_TYPE, Review, Sample
from service.cli.demo.show import Screen
from service.cli.demo.stack import Stack

RECORDS = 2000
GRID = {"shards": 32, "slices": 3, "orders": 2}
EPOCHS = 1
REQUESTS = 90
"""Each changes what is served: a shard of 3 slices can lose 3 times."""
WARM_UP = 3
"""Requests before those that are timed: connections are opened, modules imported."""
PAUSE = 0.3
"""Seconds between a certificate and the next request: relay and rebuild have had their turn."""

Cell = tuple[int, int]
Subjects = Mapping[Cell, deque[str]]
"""Stand-in reviewers by (shard, slice)."""


def measure(screen: Screen, *, full: bool) -> Measured:  # noqa: ARG001 - one size: requests are what a grid has
    """Train once, delete one stand-in reviewer after another from an idle system, then time SISA on those records."""
    sample = data.draw(RECORDS)
    with tempfile.TemporaryDirectory(prefix="expunge-bench-") as home:
        subjects = _train(screen, Path(home), sample)
        found = _delete_all(screen, Path(home), subjects)
    baseline = _baseline(screen, sample)
    client = quantiles([each.client_ms for each in found], n=100, method="inclusive")
    server = quantiles([each.server_ms for each in found], n=100, method="inclusive")
    return Measured(
        {
            "p50_ms": client[49],
            "p99_ms": client[98],
            "server_p50_ms": server[49],
            "server_p99_ms": server[98],
            "over_sisa": baseline.seconds * 1000 / client[49],
            "sisa_s": baseline.seconds,
        },
        {
            "records": len(sample.training),
            "requests": len(found),
            "warm_up_requests": WARM_UP,
            "replicas": 2,
            "trainers": 0,
            **GRID,
            "epochs": EPOCHS,
            "note": "client: from the 202's arrival to the first GET that says deactivated, asked for every 2 ms after"
            " the last answer; server: both times by Postgres, from the transaction that receives the request. One at"
            " a time, nothing else at work. One epoch: how fast a swap is does not depend on how long was trained",
            "sisa": _said(baseline),
        },
    )


def _train(screen: Screen, home: Path, sample: Sample) -> Subjects:
    recipe = data.recipe(**GRID, epochs=EPOCHS).to_json()
    with system.running(home, trainers=2) as (stack, calls):
        with screen.bars({"train": "training what is to be deleted from"}) as update:
            system.train(stack, calls, sample.training, recipe, update)
        return _locate(screen, calls, sample.training)


def _locate(screen: Screen, calls: Calls, reviews: Sequence[Review]) -> Subjects:
    """By preview, which changes nothing: in which cell a stand-in reviewer lies, until every cell has one."""
    cells = GRID["shards"] * GRID["slices"]
    subjects: dict[Cell, deque[str]] = {}
    with screen.bar("finding a stand-in reviewer in every cell", cells) as advance:
        for reviewer in dict.fromkeys(review.reviewer for review in reviews):
            body = {"subject": {"type": SUBJECT_TYPE, "value": reviewer}}
            (model,) = calls.post("/v1/deletion-requests:preview", body)["models"]
            (cell,) = ((each["shard"], each["slice"]) for each in model["cells"])
            subjects.setdefault(cell, deque()).append(reviewer)
            if len(subjects[cell]) == 1:
                advance(1)
            if len(subjects) == cells:
                break
    return subjects


def _delete_all(screen: Screen, home: Path, subjects: Subjects) -> list[Deactivation]:
    found: list[Deactivation] = []
    with system.running(home, trainers=0) as (stack, calls):
        version = system.settle(stack, calls)
        with screen.bar("deleting one stand-in reviewer after another", WARM_UP + REQUESTS) as advance:
            for _ in range(WARM_UP + REQUESTS):
                done = calls.delete({"type": SUBJECT_TYPE, "value": _next(calls, subjects)}, system.MODEL)
                if done.version != version + 1:
                    raise BenchmarkError(f"version {done.version} followed {version}: not one change per request")
                version = done.version
                found.append(done)
                _wait_until_idle(stack, calls, done)
                advance(1)
    return found[WARM_UP:]


def _next(calls: Calls, subjects: Subjects) -> str:
    """One who lies in the last slice of what a shard serves, the deepest shard first: what is served must change."""
    shards: list[dict[str, Any]] = calls.get(f"/v1/models/{system.MODEL}/shards")["shards"]
    deepest = min(shards, key=lambda shard: (-shard["depth"], shard["shard"]))
    return subjects[deepest["shard"], deepest["prefix"][-1]].popleft()


def _wait_until_idle(stack: Stack, calls: Calls, done: Deactivation) -> None:
    def completed() -> bool:
        return calls.get(f"/v1/deletion-requests/{done.request_id}")["state"] == "completed"

    system.wait_for(stack, completed, "erasure", pause=0.02)
    time.sleep(PAUSE)


def _baseline(screen: Screen, sample: Sample) -> sisa.Retraining:
    """Every fourth record is a shard, every third of those a slice: as even as SISA's random split can be."""
    rows = [(review.text, CLASSES.index(review.label)) for review in sample.training[:: sisa.SHARDS]]
    slices = [rows[number :: sisa.SLICES] for number in range(sisa.SLICES)]
    job = sisa.Job(data.encoder(), data.recipe().max_tokens, slices)
    with screen.bar("SISA: training the slices of one shard", sisa.steps([len(each) for each in slices])) as advance:
        (found,) = children.run(sisa.retrain, [job], processes=1, advance=advance)
    return found


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
