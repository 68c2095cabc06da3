"""`capacity`: deletions until the first shard is dead, and until all are, simulated against the closed forms."""

import math

from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.show import Screen
from shards import capacity
from shards.scenario import Scenario
from shards.trials import lifetimes

SHARDS = 5
GRIDS = ((6, 6), (4, 1), (4, 2), (4, 4), (5, 3), (6, 1), (6, 3))
"""Slices and orders; the first gives the figures, all must agree. S3T's and SISA's (one order) own sizes."""
HISTORIES, HISTORIES_FULL = 3000, 30_000
STANDARD_ERRORS = 3.0


def measure(screen: Screen, *, full: bool) -> Measured:
    """Delete from uniformly random cells, no rebuild, until every shard of every history is dead."""
    figures: dict[str, float] = {}
    grids: list[dict[str, float]] = []
    histories = HISTORIES_FULL if full else HISTORIES
    with screen.bar("histories without rebuild", len(GRIDS)) as advance:
        for seed, (slices, orders) in enumerate(GRIDS):
            scenario = Scenario(
                users=10**9,
                per_day=1,
                rows=10**6,
                shards=SHARDS,
                slices=slices,
                orders=orders,
                histories=histories,
                seed=seed,
            )
            found = lifetimes(scenario)
            firsts = capacity.uniform(SHARDS, slices, orders)
            row: dict[str, float] = {"slices": slices, "orders": orders}
            for name, deletions, expected in (
                ("first_dead", found.first_dead, capacity.first_dead(firsts)),
                ("all_dead", found.all_dead, capacity.all_dead_uniform(SHARDS, slices, orders)),
            ):
                mean, error = float(deletions.mean()), float(deletions.std(ddof=1) / math.sqrt(histories))
                row |= {f"{name}.mean": mean, f"{name}.expected": expected, f"{name}.stderr": error}
                if abs(mean - expected) > STANDARD_ERRORS * error:
                    raise BenchmarkError(
                        f"{name} of {SHARDS} shards, {slices} slices, {orders} orders: {mean:.2f} is more than"
                        f" {STANDARD_ERRORS:g} standard errors from {expected:.2f}"
                    )
            grids.append({name: round(value, 3) for name, value in row.items()})
            figures = figures or {name: value for name, value in row.items() if "." in name}
            advance(1)
    return Measured(figures, {"shards": SHARDS, "histories": histories, "grids": grids})
