"""`rebuild`: what each rebuild policy costs at 20 million users, against monthly full retrains and against SISA."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.results import ROOT, BenchmarkError, Measured
from service.cli.demo.show import Screen
from service.cli.pictures import Point, draw_curves, draw_frontier
from shards.rebuild import Policy
from shards.scenario import Curve, Scenario, strategies
from shards.simulate import simulate
from shards.trials import Steady, steady

USERS, PER_DAY, MONTH, YEAR = 20_000_000, 17.0, 30, 360
GRIDS = ((4, 3, 3), (16, 4, 2), (64, 4, 2), (256, 4, 2))
"""Shards, slices, orders; the worst counts."""
SHOWN = 2
"""Which of them is drawn."""
HISTORIES, HISTORIES_FULL = 500, 5000
LAYERS, SLICES = 12, 3
"""Of the comparison with SISA: a backbone of BERT's, RoBERTa's or ViT's base size, one layer a slice."""
OTHERS = ((6, 3), (12, 4), (12, 6), (24, 4), (24, 6))
"""Layers and slices that are given beside it."""
TARGET = 0.45
FRONTIER = ROOT / "docs" / "pictures" / "frontier.png"
MONTHS = ROOT / "docs" / "pictures" / "capacity.png"


def measure(screen: Screen, *, full: bool) -> Measured:
    """Simulate months and a year of deletions, then single deletions in the long run."""
    histories = HISTORIES_FULL if full else HISTORIES
    months = _months(screen, histories)
    worst = max(_last(curves, "by deadline").work[-1] / _last(curves, "monthly").work[-1] for curves in months)
    missed = max(_last(curves, "by deadline").missed for curves in months)
    year = simulate(
        replace(_scenario(GRIDS[0], histories // 5), days=YEAR, full_days=0.5),
        [each for each in strategies(3) if each.policy.kind == "by_deadline" or each.way == "monthly"],
    )
    if missed or year[0].missed:
        raise BenchmarkError("by_deadline missed a due date: its work would not mean what its name says")
    shown = GRIDS[SHOWN]
    title = f"20 million users, {PER_DAY:g} deletions a day, {shown[0]} shards x {shown[1]} slices, {shown[2]} orders"
    draw_curves(months[SHOWN], title, MONTHS)
    figures, sizes = _against_sisa(screen, histories)
    figures |= {
        "by_deadline_over_monthly": worst,
        "by_deadline_missed": missed,
        "by_deadline_year_over_monthly": year[0].work[-1] / year[1].work[-1],
    }
    sizes |= {"users": USERS, "deletions_per_day": PER_DAY, "days": MONTH, "histories": histories}
    sizes["year"] = {"days": YEAR, "full_retrain_days": 0.5}
    sizes["months"] = [
        {"shards": grid[0], "slices": grid[1], "orders": grid[2], **_shown(curves)}
        for grid, curves in zip(GRIDS, months, strict=True)
    ]
    return Measured(figures, sizes)


def _scenario(grid: tuple[int, int, int], histories: int) -> Scenario:
    shards, slices, orders = grid
    return Scenario(
        users=USERS, per_day=PER_DAY, rows=USERS, shards=shards, slices=slices, orders=orders, histories=histories
    )


def _months(screen: Screen, histories: int) -> list[Sequence[Curve]]:
    with screen.bar("a month of every policy", sum(MONTH * len(strategies(grid[1])) for grid in GRIDS)) as advance:
        return [simulate(_scenario(grid, histories), tick=lambda: advance(1)) for grid in GRIDS]


def _last(curves: Sequence[Curve], name: str) -> Curve:
    return next(curve for curve in curves if name in curve.name)


def _shown(curves: Sequence[Curve]) -> dict[str, Any]:
    """Work over monthly full retrains, and served depth before the nightly rebuild, by policy."""
    monthly = _last(curves, "monthly").work[-1]
    return {
        curve.name: {"work_over_monthly": round(curve.work[-1] / monthly, 3), "depth": round(curve.depth[-1], 3)}
        for curve in curves
    }


def _against_sisa(screen: Screen, histories: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Training work per deletion, each rebuilt before the next; the hit shard's depth meanwhile."""
    points: list[Point] = []
    with screen.bar("spares against SISA", 2 + SLICES * (SLICES - 1) + len(OTHERS)) as advance:
        scenario = _long_run(LAYERS, SLICES, histories)
        sisa = steady(scenario, "sisa", Policy())
        points.append(_point("SISA", sisa, sisa, "SISA, full fine-tuning"))
        advance(1)
        for spares in range(SLICES):
            for depth in range(1, SLICES + 1) if spares else (SLICES,):
                found = steady(scenario, policy=Policy(kind="spares", spares=spares, min_depth=depth if spares else 0))
                group = f"S3T, spares at depth {depth} of {SLICES}" if spares else "S3T, one order"
                points.append(_point(f"{spares}" if spares else "no spare", found, sisa, group))
                advance(1)
        others = [_other(layers, slices, histories) for layers, slices in OTHERS]
        advance(len(OTHERS))
    draw_frontier(
        points, f"Work and depth: {LAYERS} layers, {SLICES} slices; numbers are spare orders", TARGET, FRONTIER
    )
    one, spare = points[1], next(each for each in points if each.label == "1" and "depth 2" in each.group)
    figures = {
        "work_over_sisa": one.work,
        "work_over_sisa_least_depth": one.least,
        "work_over_sisa_mean_depth": one.depth,
        "half_spare_over_sisa": spare.work,
        "half_spare_over_sisa_least_depth": spare.least,
    }
    frontier = [
        {"kind": each.group, "spares": each.label, "work": each.work, "depth": each.depth, "least": each.least}
        for each in points
    ]
    uncached = steady(replace(scenario, cached=False)).work / sisa.work
    sizes = {"layers": LAYERS, "slices": SLICES, "work_over_sisa_without_cached_features": round(uncached, 4)}
    return figures, {**sizes, "frontier": frontier, "other_grids": others}


def _long_run(layers: int, slices: int, histories: int) -> Scenario:
    return replace(_scenario((1, slices, 1), histories), rows=30_000, layers=layers)


def _point(label: str, found: Steady, sisa: Steady, group: str) -> Point:
    return Point(label, round(found.work / sisa.work, 4), round(found.depth, 3), round(found.least, 3), group)


def _other(layers: int, slices: int, histories: int) -> dict[str, float]:
    scenario = _long_run(layers, slices, histories)
    found, sisa = steady(scenario), steady(scenario, "sisa", Policy())
    return {"layers": layers, "slices": slices, "work_over_sisa": round(found.work / sisa.work, 4)}
