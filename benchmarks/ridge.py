"""`ridge`: taking one record out of exact sums and solving again, against fitting all that remain from nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np

from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.show import Screen
from shards.solver import Weights, pin_threads, solve
from shards.sums import Features, Grid, Sums, Targets, sums_of, total

ROWS = 100_000
WIDTH, WIDE = 384, 1536
"""Features: one layer of MiniLM, and four side by side."""
WIDE_ROWS = 10_000
"""Of the wide case, whose times do not depend on them: nothing is fitted again there."""
CELLS = 12
DELETIONS = 200
REFITS, REFITS_FULL = 5, 20
GRID = Grid(bits=8, clip=16.0, penalty=30.0, target_bits=0)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fit:
    """Made-up records, summed."""

    features: Features
    targets: Targets
    sums: Sums

    def without(self, gone: int) -> tuple[Features, Targets]:
        """All records but the first `gone`."""
        return self.features[gone:], self.targets[gone:]


def measure(screen: Screen, *, full: bool) -> Measured:
    """Delete records one by one, then fit the rest from nothing: to the same bits, or there is no figure."""
    pin_threads()
    refits = REFITS_FULL if full else REFITS
    fit = _made(ROWS, WIDTH)
    with screen.bar(f"deleting single records of {ROWS:,}", DELETIONS) as advance:
        left, weights, deleted = _delete(fit, DELETIONS, advance)
    with screen.bar(f"fitting the remaining {ROWS - DELETIONS:,} from nothing", refits) as advance:
        again, refitted = _refit(fit, DELETIONS, refits, advance)
    if not again[0].same(left) or again[1].tobytes() != weights.tobytes():
        raise BenchmarkError("the sums or weights after the deletions are not those of a refit")
    wide = _made(WIDE_ROWS, WIDE)
    with screen.bar(f"the same with {WIDE:,} features", DELETIONS // 10) as advance:
        _, _, wide_deleted = _delete(wide, DELETIONS // 10, advance)
    return Measured(
        {
            "delete_ms": 1e3 * deleted,
            "over_refit": refitted / deleted,
            "refit_ms": 1e3 * refitted,
            "build_ms": 1e3 * _build(fit),
            "wide_delete_ms": 1e3 * wide_deleted,
            "wide_build_ms": 1e3 * _build(wide),
        },
        {
            "rows": ROWS,
            "features": WIDTH,
            "wide_features": WIDE,
            "classes": fit.targets.shape[1],
            "deletions": DELETIONS,
            "refits": refits,
            "cells": CELLS,
            "threads": 1,
            "data": f"made up, on the grid of 2^-{GRID.bits}; beside the features a constant for the bias",
            "note": "medians; a deletion is the record's products, the subtraction and the solve, its features being "
            "at hand (one pass of the backbone otherwise); a refit is exact float64 products in blocks and the solve; "
            "after all deletions sums and weights were those of the refit, bit for bit; a build adds up the cells and "
            "solves, as a model server does in a swap",
        },
    )


def _made(rows: int, width: int) -> Fit:
    numbers = np.random.default_rng(0)
    features = np.empty((rows, width + 1), np.int32)
    for at in range(0, rows, 10_000):
        part = numbers.standard_normal((min(10_000, rows - at), width), np.float32)
        features[at : at + len(part)] = GRID.features(part)
    targets = np.eye(2, dtype=np.int32)[numbers.integers(0, 2, rows)]
    return Fit(features, targets, sums_of(GRID, features, targets))


def _delete(fit: Fit, count: int, advance: Callable[[float], None]) -> tuple[Sums, Weights, float]:
    """Take out the first `count` records, one after the other; what is left, its weights, and seconds for one."""
    left, weights = fit.sums, solve(GRID, fit.sums)
    seconds: list[float] = []
    for row in range(count):
        began = time.perf_counter()
        left = left.subtract(sums_of(GRID, fit.features[row : row + 1], fit.targets[row : row + 1]))
        weights = solve(GRID, left)
        seconds.append(time.perf_counter() - began)
        advance(1)
    return left, weights, median(seconds)


def _refit(fit: Fit, gone: int, count: int, advance: Callable[[float], None]) -> tuple[tuple[Sums, Weights], float]:
    """Fit all but the first `gone` records from nothing, `count` times; the fit, and seconds for one."""

    def refit() -> tuple[Sums, Weights]:
        sums = sums_of(GRID, *fit.without(gone))
        advance(1)
        return sums, solve(GRID, sums)

    found, seconds = zip(*(_timed(refit) for _ in range(count)), strict=True)
    return found[-1], median(seconds)


def _build(fit: Fit) -> float:
    """Seconds to add up the sums of `CELLS` cells and solve once."""
    cells = [fit.sums] * CELLS
    return median(_timed(lambda: solve(GRID, total(GRID, cells)))[1] for _ in range(11))


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began
