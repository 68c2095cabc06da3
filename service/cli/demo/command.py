"""The command: fetch, start, go, stop, report."""

import json
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx
import typer
from rich.console import Console

from service.cli.demo import sample as samples
from service.cli.demo import show, stack
from service.cli.demo.assets import DemoError, cache_directory, fetch
from service.cli.demo.journey import Journey
from service.cli.demo.report import Report

HOME = Path(".expunge-demo")
REPORT = Path("demo-report.json")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENCODER_DIGEST = "a1747dedc6e33e0ca073f379538731b15ae454232d657e94b6cc8f1f514fa7cc"
"""Backbone digest of the encoder's files; the engine computes it again and refuses another."""


def recipe(encoder: Path) -> dict[str, Any]:
    """The demo's recipe: 4 shards of 3 slices, 2 orders each, one layer a slice."""
    return {
        "backbone": {"source": str(encoder), "digest": ENCODER_DIGEST, "provenance": "public"},
        "classes": list(samples.CLASSES),
        "shards": 4,
        "slices": 3,
        "orders": 2,
        "epochs": 3,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-2,
        "max_tokens": 64,
        "precision": "bfloat16",
    }


def run(records: int, held_out: int, *, as_json: bool) -> None:
    """All of the demo; raises `typer.Exit` with the exit code where it is not 0."""
    # A terminal's width is the terminal's; a log file's lines need not be cut at 80.
    console = Console(stderr=as_json, width=None if os.isatty(2 if as_json else 1) else 120, highlight=False)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    REPORT.unlink(missing_ok=True)  # an earlier run's success is not this one's
    try:
        report = _run(show.Screen(console), records, held_out)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted; everything it started was stopped")
        raise typer.Exit(130) from None
    except (DemoError, httpx.HTTPError) as error:
        console.print(f"demo failed: {type(error).__name__ if not str(error) else error}", style="red", markup=False)
        raise typer.Exit(1) from None
    report.write(REPORT)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    _conclude(console, report)


def _run(screen: show.Screen, records: int, held_out: int) -> Report:
    screen.title("Data")
    assets = fetch(cache_directory(), screen.say)
    began = time.monotonic()
    home = HOME.resolve()
    stack.prepare(home)
    sample = samples.draw(samples.read(assets.reviews), training=records, held_out=held_out)
    screen.say(
        f"{len(sample.training)} reviews of {sample.reviewers} stand-in reviewers to train on,"
        f" {len(sample.held_out)} of others to measure on\n"
        "(rows that share age and clothing id stand in for one reviewer; positives are thinned by a keyed hash of"
        " each record alone)"
    )
    chosen = recipe(assets.encoder)
    given = {"recipe": chosen, "training": [review.to_json() for review in sample.training]}
    given |= {"held_out": [review.to_json() for review in sample.held_out]}
    with ExitStack() as programs:
        # Beside everything else and at the lowest priority: it takes the time that the programs leave.
        monolithic = stack.Side("service.cli.demo.monolithic", given, log=home / "monolithic.log")
        programs.callback(monolithic.stop)
        started = time.monotonic()
        with screen.bar("starting Postgres, Valkey, API, model servers, workers", None) as tick:
            up = programs.enter_context(stack.running(home, lambda: tick(0)))
        seconds = {"start": time.monotonic() - started}
        try:
            return Journey(screen, up, sample, chosen, monolithic, home, seconds, began).run()
        except httpx.HTTPError:
            up.check()  # says more, where `up` is what is gone
            raise


def _conclude(console: Console, report: Report) -> None:
    console.print()
    console.print(show.summary(report))
    console.print(f"report: {REPORT}; certificate, logs and state: {HOME} (removed when the demo starts again)")
    if failures := report.failures():
        for failure in failures:
            console.print(f"[red]did not hold: {failure}")
        raise typer.Exit(1)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # stopping takes a moment, and is not to be cut short
    raise KeyboardInterrupt
