"""Capacity: how many more deletions a model stands, in closed form (facts/exact-unlearning.md, 1(d) and 5).

Deletions hit cells independently. Seen as a Poisson process with one deletion per unit of time, each cell is hit
first after an exponential time, all independent; and the expected number of deletions until an event equals the
expected time. A prefix lives until the first of its slices is hit, a depth until the last prefix of that depth is
gone, a shard until every first slice that it has an order from is hit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from shards.chains import Cost, Grid, Holding, everything
from shards.work import Prefix

MOST_SETS = 16
"""So many sets of slices are weighed exactly; the sum has up to 2 to that power terms."""
_EARLY, _LATE, _STEP = 1e-10, 60.0, 0.02
"""Where the integrals begin and end, in mean times to a hit, and their step in the logarithm of time."""


def until_all_hit(prefixes: Iterable[Prefix], rates: Sequence[float]) -> float:
    """Expected deletions until each prefix has a hit slice: inclusion and exclusion, exact.

    Of more than 16 sets of slices the first 16 are taken, which is a lower bound. 0 without prefixes, infinite where
    one is never hit.

    Args:
        prefixes: of one shard.
        rates: by slice, the share of the model's deletions that hit the slice in this shard.
    """
    terms: dict[int, int] = {}
    for own in sorted({sum(1 << index for index in prefix) for prefix in prefixes})[:MOST_SETS]:
        fresh = {own: 1}
        for union, count in terms.items():
            fresh[union | own] = fresh.get(union | own, 0) - count
        for union, count in fresh.items():
            terms[union] = terms.get(union, 0) + count
    found = 0.0
    for union, count in terms.items():
        rate = sum(each for index, each in enumerate(rates) if union >> index & 1)
        if not rate:
            return inf
        found += count / rate
    return found


def first_dead(firsts: Sequence[Sequence[float]]) -> float:
    """Expected deletions until the first shard is dead: the integral of the chance that all live.

    Args:
        firsts: by shard, the rates of the first slices from which an order still serves. A shard is dead when all of
            them have been hit.
    """
    mortal = [rates for rates in firsts if all(rates)]
    if not mortal:
        return inf
    return _integral(mortal, lambda dead: np.prod(1 - dead, axis=0))


def all_dead(firsts: Sequence[Sequence[float]]) -> float:
    """Expected deletions until the last shard is dead; `firsts` as for `first_dead`."""
    if not all(map(all, firsts)):
        return inf
    return _integral(firsts, lambda dead: 1 - np.prod(dead, axis=0))


def _integral(firsts: Sequence[Sequence[float]], alive: Callable[[np.ndarray], np.ndarray]) -> float:
    """The integral over time of `alive`, a function of each shard's chance of being dead (shards, times).

    By the trapezoid rule over the logarithm of time, which converges exponentially for these integrands.
    """
    rates = [rate for shard in firsts for rate in shard]
    if not rates:
        return 0.0
    logs = np.arange(np.log(_EARLY / max(rates)), np.log(_LATE / min(rates)), _STEP)
    times = np.exp(logs)
    dead = np.stack([np.prod(-np.expm1(-np.outer(shard, times)), axis=0) for shard in firsts])
    height = alive(dead)
    return float(_STEP * np.sum(height * times) + height[0] * times[0] / 2)


def uniform(shards: int, slices: int, orders: int) -> list[list[float]]:
    """The first slices of a full grid under uniform deletions: B' = min(B, L) distinct ones a shard."""
    return [[1 / (shards * slices)] * min(orders, slices)] * shards


def all_dead_uniform(shards: int, slices: int, orders: int) -> float:
    """The same for the last shard as a coupon collector: m * L * H(m * B') with B' = min(B, L)."""
    cells = shards * min(orders, slices)
    return shards * slices * sum(1 / number for number in range(1, cells + 1))


def expected_loss(
    nodes: Iterable[Prefix], costs: Mapping[int, Cost], weights: Mapping[tuple[int, int], float]
) -> float:
    """Expected work of training back what the next deletion takes, where every shard has these stages.

    Args:
        nodes: stages.
        costs: by shard, of one stage.
        weights: as for `outlook`.
    """
    total = sum(weights.values())
    lost = sum(
        cost(prefix) * sum(weights[shard, i] for i in prefix) for prefix in nodes for shard, cost in costs.items()
    )
    return lost / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one shard stands for today, and for how much longer."""

    shard: int
    depth: int
    """Slices that serve."""
    slices: int
    clean_orders: int
    """First slices from which an order still serves; the shard is dead at 0."""
    full_orders: int
    """Of these, how many at full depth."""
    until_loss: float
    """Expected deletions, over the whole model, until the served depth falls; 0 where the shard is dead."""
    until_dead: float
    days_until_loss: float | None
    """At the given request rate; None without one."""
    days_until_dead: float | None
    work: float
    """Work to full health: every order of the recipe at full depth."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The forecasts of a model's shards, and of the model."""

    shards: tuple[Forecast, ...]
    first_dead: float
    """Expected deletions until a shard is dead; 0 where one is."""
    all_dead: float
    work: float
    """Work to full health."""
    full_retrain: float
    """Work of training every order of every shard from nothing: the scheduled full retrain."""


def outlook(
    grid: Grid,
    holdings: Mapping[int, Holding],
    costs: Mapping[int, Cost],
    weights: Mapping[tuple[int, int], float],
    per_day: float | None = None,
) -> Outlook:
    """Forecast from what the shards have now, no rebuild coming.

    Args:
        grid: the recipe's.
        holdings: by shard.
        costs: by shard, of one stage.
        weights: by (shard, slice), how likely a deletion hits the cell, in any unit: rate times records. All zero
            is read as all equal.
        per_day: deletions a day.
    """
    total = sum(weights.values())
    equal = 1 / (len(holdings) * grid.slices) if holdings else 0.0
    found: list[Forecast] = []
    firsts: list[list[float]] = []
    for shard, holding in sorted(holdings.items()):
        rates = [weights[shard, index] / total if total else equal for index in range(grid.slices)]
        found.append(_forecast(grid, shard, holding, costs[shard], rates, per_day))
        firsts.append([rates[index] for index in holding.reach()])
    return Outlook(
        shards=tuple(found),
        first_dead=first_dead(firsts),
        all_dead=all_dead(firsts),
        work=sum(each.work for each in found),
        full_retrain=sum(costs[shard](prefix) for shard in holdings for prefix in grid.nodes),
    )


def _forecast(
    grid: Grid, shard: int, holding: Holding, cost: Cost, rates: Sequence[float], per_day: float | None
) -> Forecast:
    reach = holding.reach()
    stages = holding.fresh | holding.stale
    if grid.cells:  # all cells serve together: the next hit on any is a loss
        depth, full = len(reach), 1
        loss = until_all_hit([tuple(reach)] if reach else (), rates)
    else:
        depth, full = holding.depth, grid.slices
        loss = until_all_hit((each for each in stages if len(each) == depth), rates)
    dead = all_dead([[rates[index] for index in reach]])
    lost, old = everything(grid, holding)
    return Forecast(
        shard=shard,
        depth=depth,
        slices=grid.slices,
        clean_orders=len(reach),
        full_orders=sum(each == full for each in reach.values()),
        until_loss=loss,
        until_dead=dead,
        days_until_loss=loss / per_day if per_day else None,
        days_until_dead=dead / per_day if per_day else None,
        work=sum(map(cost, dict.fromkeys(lost + old))),
    )
