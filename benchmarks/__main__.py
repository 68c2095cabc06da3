"""`python -m benchmarks`: measure every group, or one, and write `benchmarks/results.json`."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Protocol

import httpx
from rich.console import Console

from benchmarks import (
    accuracy,
    burst,
    capacity,
    deactivation,
    ensemble,
    exports,
    ledger,
    merged,
    rebuild,
    results,
    ridge,
    swaps,
    training,
)
from benchmarks.results import BenchmarkError, Measured, Run
from service.cli.demo.assets import DemoError
from service.cli.demo.show import Screen


class Measure(Protocol):
    """What a group's module offers."""

    def __call__(self, screen: Screen, *, full: bool) -> Measured:
        """Measure all of the group in one go; `full` takes all sizes and seeds."""
        ...


GROUPS: Mapping[str, Measure] = {
    "deactivation": deactivation.measure,
    "burst": burst.measure,
    "swaps": swaps.measure,
    "training": training.measure,
    "ensemble": ensemble.measure,
    "merged": merged.measure,
    "ridge": ridge.measure,
    "accuracy": accuracy.measure,
    "capacity": capacity.measure,
    "rebuild": rebuild.measure,
    "ledger": ledger.measure,
    "export": exports.measure,
}


def main() -> int:
    """Run; the exit code is 0 only if every group was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=GROUPS, nargs="+", help="measure these groups; the file's other figures stay")
    parser.add_argument("--full", action="store_true", help="all sizes and seeds")
    options = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 120, highlight=False)
    screen = Screen(console)
    run = Run.now(shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]))
    names: list[str] = options.only or list(GROUPS)
    measured: dict[str, Measured] = {}
    for name in names:
        screen.title(name)
        began = time.monotonic()
        try:
            measured[name] = GROUPS[name](screen, full=options.full)
        except (BenchmarkError, DemoError, httpx.HTTPError) as error:
            console.print(f"{name} failed: {error or type(error).__name__}", style="red", markup=False)
            continue
        except KeyboardInterrupt:
            console.print("interrupted; nothing was written, what was started is stopped", style="yellow")
            return 130
        for figure, value in measured[name].figures.items():
            screen.say(f"  {name}.{figure:<20} {value:.4g}")
        screen.say(f"  [dim]{time.monotonic() - began:.0f} s")
    if measured:
        results.write(run, measured, keep=options.only is not None)
        screen.say(f"\nwritten: {results.FILE}")
    return 0 if len(measured) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
