"""A trained installation to delete from: trained once a run, then a copy for each measurement."""

import atexit
import functools
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import data, system
from benchmarks.results import BenchmarkError
from service.cli.demo.calls import Calls, Deactivation
from service.cli.demo.sample import SUBJECT_TYPE, Sample
from service.cli.demo.show import Screen
from service.cli.demo.stack import Stack

RECORDS = 2000
GRID = {"shards": 36, "slices": 3, "orders": 2}
"""A shard of 3 slices can lose 3 times, so what is served can change 108 times."""
EPOCHS = 1

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A trained model at full depth whose programs have stopped."""

    home: Path
    sample: Sample
    places: Mapping[str, Cell]
    """(shard, slice) of each stand-in reviewer."""


class Victims:
    """Stand-in reviewers whose deletion changes what is served, one after another."""

    def __init__(self, prepared: Prepared, version: int) -> None:
        """Nobody is deleted yet; `version` is served."""
        self._version = version
        self._left: dict[Cell, deque[str]] = {}
        for reviewer, cell in prepared.places.items():
            self._left.setdefault(cell, deque()).append(reviewer)

    def delete(self, calls: Calls) -> Deactivation:
        """Delete one who lies in the last slice of what a shard serves, the deepest shard first.

        Raises:
            BenchmarkError: the next version is not this deletion's.
        """
        shards: list[dict[str, Any]] = calls.get(f"/v1/models/{system.MODEL}/shards")["shards"]
        deepest = min(shards, key=lambda shard: (-shard["depth"], shard["shard"]))
        reviewer = self._left[deepest["shard"], deepest["prefix"][-1]].popleft()
        done = calls.delete({"type": SUBJECT_TYPE, "value": reviewer}, system.MODEL)
        if done.version != self._version + 1:
            raise BenchmarkError(f"version {done.version} followed {self._version}: not one change per request")
        self._version = done.version
        return done


@contextmanager
def running(screen: Screen, *, trainers: int = 0) -> Generator[tuple[Prepared, Stack, Calls, int]]:
    """The programs on a copy of their own, once every model server answers; with the version that they serve."""
    prepared = prepare(screen)
    with tempfile.TemporaryDirectory(prefix="expunge-bench-") as place:
        home = Path(place) / "home"
        subprocess.run(["/bin/cp", "-a", str(prepared.home), str(home)], check=True)  # with who owns Postgres' files
        with system.running(home, trainers=trainers) as (stack, calls):
            yield prepared, stack, calls, system.settle(stack, calls)


@functools.cache
def prepare(screen: Screen) -> Prepared:
    """Train, and find out where everybody lies; once a process."""
    place = tempfile.mkdtemp(prefix="expunge-bench-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    home, sample = Path(place) / "home", data.draw(RECORDS)
    home.mkdir()
    recipe = data.recipe(**GRID, epochs=EPOCHS).to_json()
    with system.running(home, trainers=2) as (stack, calls):
        with screen.bars({"train": "training what is to be deleted from"}) as update:
            system.train(stack, calls, sample.training, recipe, update)
        return Prepared(home, sample, _locate(screen, calls, sample))


def _locate(screen: Screen, calls: Calls, sample: Sample) -> dict[str, Cell]:
    """By preview, which changes nothing: in which cell each stand-in reviewer lies, until every cell has one."""
    cells = GRID["shards"] * GRID["slices"]
    places: dict[str, Cell] = {}
    with screen.bar("finding a stand-in reviewer in every cell", cells) as advance:
        for reviewer in dict.fromkeys(review.reviewer for review in sample.training):
            body = {"subject": {"type": SUBJECT_TYPE, "value": reviewer}}
            (model,) = calls.post("/v1/deletion-requests:preview", body)["models"]
            (cell,) = ((each["shard"], each["slice"]) for each in model["cells"])
            advance(cell not in places.values())
            places[reviewer] = cell
            if len(set(places.values())) == cells:
                return places
    raise BenchmarkError("a cell is empty: it can lose nobody")
