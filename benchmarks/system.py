"""A real installation to measure: `expunge up` in a process of its own, with as many programs as a figure asks for."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM
from typing import Any

from benchmarks.results import BenchmarkError
from service.cli.demo.calls import Calls
from service.cli.demo.sample import Review
from service.cli.demo.stack import EXPUNGE, Stack, free_ports, tail
from service.standalone.launch import command

DATASET, MODEL = "reviews", "reviews-model"
UP_WITHIN, STOP_WITHIN, STEP_WITHIN = 120.0, 60.0, 900.0
LEASE_SECONDS = 3.0
"""Longer than a lease: so long after Postgres started, a barrier declares by timeout alone (protocol.md, rule 10)."""

Update = Callable[[str, float, float | None], None]


@contextmanager
def running(home: Path, *, trainers: int, replicas: int = 2) -> Generator[tuple[Stack, Calls]]:
    """`expunge up` on `home/state`, which a later call finds again; ready when the block begins, gone when it ends.

    Raises:
        BenchmarkError: it did not start.
    """
    state, log = home / "state", home / "up.log"
    argv = [*EXPUNGE, "up", "--state", str(state), "--port", str(free_ports(replicas + 1))]
    argv += ["--trainers", str(trainers), "--replicas", str(replicas)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command(argv, death_signal=SIGTERM),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the benchmark's to handle
        )
    try:
        document = _wait_until_ready(process, state / "run" / "up.json", log)
        key = (state / "keys" / "first-api-key").read_text().strip()
        calls = Calls(document["api_url"], key)
        try:
            yield Stack(state, document["api_url"], tuple(document["servers"]), key, process, log), calls
        finally:
            calls.close()
    finally:
        process.terminate()
        try:
            process.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()  # its children die with it
            process.wait()


def train(stack: Stack, calls: Calls, reviews: Sequence[Review], recipe: Mapping[str, Any], update: Update) -> None:
    """Declare dataset and model, upload, and wait until every stage is trained and served."""
    grid = {name: recipe[name] for name in ("shards", "slices", "classes")}
    calls.post("/v1/datasets", {"name": DATASET, **grid})
    calls.upload(DATASET, reviews, lambda _lines: None)
    calls.post("/v1/models", {"name": MODEL, "dataset": DATASET, "recipe": recipe})
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


def _environment() -> dict[str, str]:
    """Ours without any EXPUNGE_ variable: a benchmark may not touch a real database."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("EXPUNGE_")}
    return env | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _wait_until_ready(process: subprocess.Popen[bytes], note: Path, log: Path) -> dict[str, Any]:
    until = time.monotonic() + UP_WITHIN
    while not note.exists():
        if process.poll() is not None or time.monotonic() > until:
            raise BenchmarkError(f"`expunge up` did not start\n{tail(log)}")
        time.sleep(0.05)
    return json.loads(note.read_text())
