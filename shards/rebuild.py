"""The rebuild planner: the cheapest stages to train and when, as a pure function (design.md, section 4)."""

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from shards.chains import Cost, Grid, Holding, everything, full_depth, with_spares
from shards.errors import RecipeError
from shards.plan import Roots, ancestry
from shards.recipe import Recipe
from shards.stages import Stage
from shards.work import Prefix, shard_costs

Kind = Literal["now", "by_deadline", "rebuild_first", "spares", "min_depth"]
SAFETY = 1.5
"""A batch is begun this many times its expected duration before the due date."""
MARGIN = 3600.0
"""Seconds kept free before the due date: gate, publication, certificate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When lost depth is trained back, and how much of it."""

    kind: Kind = "now"
    """
    - `now`: all orders of the recipe at full depth, at once.
    - `by_deadline`: the same in one batch, at the latest safe start before the first due date.
    - `rebuild_first`: the same at once; the swap waits for it.
    - `spares`: one order a shard at full depth and `spares` more with other first slices, at once.
    - `min_depth`: nothing until a shard serves less than `min_depth`, then one order at full depth.
    """
    spares: int = 0
    min_depth: int = 0
    """For kind `spares`: how deep each spare is kept; 0 is full depth."""

    def __post_init__(self) -> None:
        """Refuse what means nothing, naming the field."""
        if self.kind not in get_args(Kind):
            raise RecipeError(f"policy.kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        for name in ("spares", "min_depth"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise RecipeError(f"policy.{name} must be a whole number of at least 0, not {value!r}")
        if self.spares and self.kind != "spares":
            raise RecipeError(
                f"policy.spares is for kind spares: leave it out, or set kind (now {self.kind}) to spares"
            )
        if self.kind == "min_depth" and not self.min_depth:
            raise RecipeError("policy.min_depth must be at least 1 for kind min_depth: the depth that is always served")
        if self.min_depth and self.kind not in {"spares", "min_depth"}:
            raise RecipeError(f"policy.min_depth is not for kind {self.kind}: leave it out, or set kind to min_depth")

    def check(self, recipe: Recipe) -> None:
        """Refuse a policy that the recipe's grid cannot keep.

        Raises:
            RecipeError: names the field.
        """
        most = min(recipe.slices, len({order[0] for order in recipe.slice_orders}))
        firsts = recipe.slices if recipe.engine == "s3t" else most
        if self.spares >= firsts:
            raise RecipeError(f"policy.spares must be below {firsts}, the number of possible first slices")
        if self.min_depth > recipe.slices:
            raise RecipeError(f"policy.min_depth must be at most the recipe's slices ({recipe.slices})")

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON, without the fields its kind has no use for."""
        body: dict[str, Any] = {"kind": self.kind, "spares": self.spares, "min_depth": self.min_depth}
        return {name: value for name, value in body.items() if value}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read a policy.

        Raises:
            RecipeError: an unknown or ill-typed field, by name.
        """
        if unknown := sorted(set(body) - {"kind", "spares", "min_depth"}):
            raise RecipeError(f"policy has no field {unknown[0]!r}; it has kind, min_depth, spares")
        return cls(**body)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """What to train, and when."""

    stages: tuple[Stage, ...]
    """Parents before children; those that restore depth before those that only take in new records."""
    start: float | None
    """Epoch seconds at which training should begin; at or before now is at once. None: nothing to do."""
    work: float
    """Passes of one record through one layer (`shards.work`)."""
    last_safe_start: float | None = None
    """The latest start from which even a rebuild of everything ends before the due date; None where unknown."""


def plan_rebuild(
    *,
    recipe: Recipe,
    live: Mapping[str, Stage],
    roots: Roots,
    rows: Mapping[tuple[int, int], int],
    policy: Policy,
    now: float,
    due: float | None,
    seconds_per_work: float | None,
    have: AbstractSet[str] = frozenset(),
    layers: int | None = None,
) -> Rebuild:
    """The cheapest stages that keep the policy's promise.

    Where the whole recipe is asked for explicitly (the first training, an operator's `rebuild`), plan with kind `now`.
    Stale stages serve until depth is restored; they are trained behind it, and only where the policy trains anyway
    (`now` and `rebuild_first` always do). Engine `ridge` has single cells, which every policy but `by_deadline`
    trains at once: they cost one forward pass.

    Args:
        recipe: the model's.
        live: clean stages with a live artefact, by key.
        roots: today's manifests.
        rows: records by (shard, slice).
        policy: the model's.
        now: epoch seconds.
        due: epoch seconds of the earliest due date among the deletions that wait for the rebuild.
        seconds_per_work: measured duration of one unit of work over all trainers; None where nothing was trained yet.
        have: keys that are queued.
        layers: layers of the backbone, for engines that train all of them.
    """
    grid = Grid.of(recipe)
    cells = {(shard, index): 0 for shard in roots for index in range(grid.slices)}
    cost = shard_costs(recipe, cells | dict(rows), layers)
    lost: list[Stage] = []
    old: list[Stage] = []
    names = {shard: _Namer(recipe.digest, shard, roots[shard]) for shard in sorted(roots)}
    for shard, holding in _holdings(grid, recipe.digest, live, names, have).items():
        urgent, later = wanted(policy, grid, holding, cost[shard])
        lost += map(names[shard], urgent)
        old += map(names[shard], later)
    always = policy.kind in {"now", "rebuild_first"}
    stages = tuple(dict.fromkeys(lost + old)) if lost or always else ()
    if not stages:
        return Rebuild((), None, 0.0)
    work = sum(cost[stage.shard](stage.prefix) for stage in stages)
    whole = sum(cost[shard](prefix) for shard in roots for prefix in grid.nodes)
    latest = last_safe_start(max(work, whole), due, seconds_per_work)
    start = max(now, latest) if policy.kind == "by_deadline" and latest is not None else now
    return Rebuild(stages, start, work, latest)


def last_safe_start(work: float, due: float | None, seconds_per_work: float | None) -> float | None:
    """When training must begin to end before the due date, in epoch seconds; None where it cannot be said."""
    if due is None or seconds_per_work is None:
        return None
    return due - work * seconds_per_work * SAFETY - MARGIN


def wanted(policy: Policy, grid: Grid, holding: Holding, cost: Cost) -> tuple[list[Prefix], list[Prefix]]:
    """Prefixes of one shard that restore depth, and those that take in new records."""
    if grid.cells or policy.kind in {"now", "by_deadline", "rebuild_first"}:
        return everything(grid, holding)
    if policy.kind == "min_depth":
        lost = full_depth(grid, holding, cost) if holding.depth < policy.min_depth else []
        known = Holding(holding.fresh | frozenset(lost))
        return lost, full_depth(grid, known, cost) if known.depth < holding.depth else []
    depth = policy.min_depth or grid.slices
    lost = with_spares(grid, holding, cost, policy.spares, depth)
    known = Holding(holding.fresh | frozenset(lost))
    return lost, with_spares(grid, known, cost, policy.spares, depth)


class _Namer:
    """Stages of one shard by prefix, on today's manifests; each key is computed once."""

    def __init__(self, recipe: str, shard: int, roots: Mapping[int, str]) -> None:
        self._recipe, self._shard, self._roots = recipe, shard, roots
        self._named: dict[Prefix, Stage] = {}

    def reads(self, stage: Stage) -> bool:
        """Whether the stage was trained on today's manifests."""
        return all(self._roots[index] == root for index, root in zip(stage.prefix, stage.roots, strict=True))

    def __call__(self, prefix: Prefix) -> Stage:
        if prefix not in self._named:
            parent = self(prefix[:-1]).key if len(prefix) > 1 else None
            read = tuple(self._roots[index] for index in prefix)
            self._named[prefix] = Stage(self._recipe, self._shard, prefix, read, parent)
        return self._named[prefix]


def holdings(recipe: Recipe, live: Mapping[str, Stage], roots: Roots) -> dict[int, Holding]:
    """What each shard has that is trained, by shard; arguments as for `plan_rebuild`."""
    names = {shard: _Namer(recipe.digest, shard, roots[shard]) for shard in sorted(roots)}
    return _holdings(Grid.of(recipe), recipe.digest, live, names, frozenset())


def _holdings(
    grid: Grid, recipe: str, live: Mapping[str, Stage], names: Mapping[int, _Namer], have: AbstractSet[str]
) -> dict[int, Holding]:
    fresh: dict[int, set[Prefix]] = {shard: set() for shard in names}
    stale: dict[int, set[Prefix]] = {shard: set() for shard in names}
    for stage in live.values():
        if stage.recipe == recipe and ancestry(stage, live) is not None:
            kind = fresh if names[stage.shard].reads(stage) else stale
            kind[stage.shard].add(stage.prefix)
    left = set(have - live.keys())
    for search in (_own, _strange) if grid.flexible else (_own,):
        for shard, found in fresh.items():
            for prefix in search(grid, found) if left else ():
                key = names[shard](prefix).key
                if key in left:
                    left.discard(key)
                    found.add(prefix)
    return {shard: Holding(frozenset(found), frozenset(stale[shard] - found)) for shard, found in fresh.items()}


def _own(grid: Grid, found: AbstractSet[Prefix]) -> Iterator[Prefix]:
    """Stages of the recipe's own orders that could be queued, given what was found; it may grow meanwhile."""
    yield from (prefix for prefix in grid.nodes if prefix not in found and (len(prefix) == 1 or prefix[:-1] in found))


def _strange(grid: Grid, found: AbstractSet[Prefix]) -> Iterator[Prefix]:
    """The same of all orders there are."""
    reached: list[Prefix] = [(), *sorted(found)]
    while reached:
        parent = reached.pop()
        for prefix in ((*parent, index) for index in range(grid.slices) if index not in parent):
            if prefix not in found:
                yield prefix
                if prefix in found:
                    reached.append(prefix)
