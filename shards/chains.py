"""Which orders of one shard to train, given what it has: prefixes alone, no keys, no manifests.

The planner (`shards.rebuild`) and the simulation (`shards.simulate`) both ask here.
"""

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from shards.recipe import Recipe
from shards.work import Prefix

STOP_GAP_COSTS = 1.02
"""A new order must be cheaper by this factor than the recipe's own: those alone make a `canonical` assembly."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What one shard has that is clean. Both sets hold the prefixes of their members that are of the same kind."""

    fresh: frozenset[Prefix]
    """Trained, or queued, on today's manifests."""
    stale: frozenset[Prefix] = frozenset()
    """Serving, on manifests that lack records ingested since."""

    @property
    def depth(self) -> int:
        """The longest prefix, stale or not."""
        return max(map(len, self.fresh | self.stale), default=0)

    def reach(self) -> dict[int, int]:
        """The longest prefix by first slice."""
        found: dict[int, int] = {}
        for prefix in self.fresh | self.stale:
            found[prefix[0]] = max(found.get(prefix[0], 0), len(prefix))
        return found


@dataclass(frozen=True)
class Grid:
    """What of a recipe decides which orders are trained."""

    slices: int
    orders: tuple[Prefix, ...]
    """The recipe's own."""
    rates: tuple[float, ...]
    """Deletion prior by slice; equal where none is declared, infinite where the date is known."""
    flexible: bool
    """Whether orders that are not the recipe's may be trained: engine `s3t`."""
    cells: bool = False
    """Whether stages are single cells that all serve together: engine `ridge`."""

    @classmethod
    def of(cls, recipe: Recipe) -> "Grid":
        """The grid of a recipe."""
        rates = (
            tuple(float("inf") if each.expires else each.rate for each in recipe.prior for _ in range(each.slices))
            or (1.0,) * recipe.slices
        )
        return cls(recipe.slices, recipe.slice_orders, rates, recipe.engine == "s3t", recipe.engine == "ridge")

    @cached_property
    def nodes(self) -> tuple[Prefix, ...]:
        """Every stage of the recipe's own orders once, order by order, parents before children."""
        return tuple(dict.fromkeys(order[:depth] for order in self.orders for depth in range(1, len(order) + 1)))


Cost = Callable[[Prefix], float]
"""Work of training the stage of a prefix, its parent being there."""


def everything(grid: Grid, holding: Holding) -> tuple[list[Prefix], list[Prefix]]:
    """Full depth of the recipe's own orders: stages that restore depth, then those that only take in new records."""
    lost: list[Prefix] = []
    old: list[Prefix] = []
    for order in grid.orders:
        chain = _missing(order, holding.fresh)
        there = all(prefix in holding.stale for prefix in chain)
        (old if there else lost).extend(chain)
    return list(dict.fromkeys(lost)), list(dict.fromkeys(old))


def full_depth(grid: Grid, holding: Holding, cost: Cost) -> list[Prefix]:
    """The cheapest stages that give the shard one order at full depth; none where it has one."""
    if holding.depth == grid.slices:
        return []
    return _missing(_cheapest(grid, holding, cost, grid.slices, frozenset()), holding.fresh)


def with_spares(grid: Grid, holding: Holding, cost: Cost, spares: int, depth: int) -> list[Prefix]:
    """The cheapest stages that give the shard one order at full depth and `spares` more with other first slices.

    Args:
        grid: the recipe's.
        holding: what the shard has.
        cost: of one stage.
        spares: how many; more than the engine or the slices allow are as many as they allow.
        depth: how deep each spare is kept.
    """
    wanted = full_depth(grid, holding, cost)
    known = Holding(holding.fresh | frozenset(wanted), holding.stale)
    for _ in range(spares):
        enough = frozenset(first for first, reach in known.reach().items() if reach >= depth)
        if len(enough) > spares:
            break
        order = _cheapest(grid, known, cost, depth, enough)
        more = _missing(order, known.fresh)
        if not more:
            break
        wanted += more
        known = Holding(known.fresh | frozenset(more), known.stale)
    return wanted


def _cheapest(grid: Grid, holding: Holding, cost: Cost, depth: int, without: AbstractSet[int]) -> Prefix:
    """The order of that depth whose missing stages cost least, its first slice not among `without`; () if none.

    Ties: the recipe's own orders, as they stand there; then new ones, by their first slice.
    """
    late = _late(grid, holding, cost)
    found = [
        (_price(order, holding, cost) * STOP_GAP_COSTS**strange, strange, place, order)
        for strange, place, order in _candidates(grid, holding, late, depth)
        if order[0] not in without
    ]
    return min(found)[-1] if found else ()


def _candidates(grid: Grid, holding: Holding, late: Prefix, depth: int) -> Iterator[tuple[int, int, Prefix]]:
    """Orders that could be trained: how strange to the recipe, their place among their like, the order.

    New ones carry a clean prefix on, or begin with any slice: where all slices are hit alike by rotation, which keeps
    a slice at another place in each order, so that one deletion leaves the most; and with what is hit last at the end.
    """
    for place, order in enumerate(grid.orders):
        yield 0, place, order[:depth]
    if not grid.flexible:
        return
    uniform = len(set(grid.rates)) == 1
    turn = grid.orders[0] * 2
    for prefix in (*holding.fresh, *((index,) for index in late)):
        if uniform:
            rest = turn[turn.index(prefix[-1]) :]
            yield 1, late.index(prefix[0]), _carried(prefix, rest)[:depth]
        yield 2, late.index(prefix[0]), _carried(prefix, late)[:depth]


def _carried(prefix: Prefix, rest: Prefix) -> Prefix:
    return tuple(dict.fromkeys(prefix + rest))


def _late(grid: Grid, holding: Holding, cost: Cost) -> Prefix:
    """Slices in the order in which a new chain should take them: likely and recent deletions last, then large ones."""
    kept = {index for prefix in holding.fresh for index in prefix}
    places = range(grid.slices)
    return tuple(sorted(places, key=lambda index: (grid.rates[index], index not in kept, cost((index,)), index)))


def _price(order: Prefix, holding: Holding, cost: Cost) -> float:
    return sum(map(cost, _missing(order, holding.fresh)))


def _missing(order: Prefix, fresh: AbstractSet[Prefix]) -> list[Prefix]:
    return [order[:depth] for depth in range(1, len(order) + 1) if order[:depth] not in fresh]
