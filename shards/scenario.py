"""What is simulated: a model, its users' deletions, and the strategies that are compared on them."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from shards.automaton import Automaton
from shards.chains import Grid
from shards.errors import RecipeError
from shards.rebuild import Policy
from shards.recipe import Backbone, PriorClass, Recipe
from shards.work import Prefix, stage_features, stage_work

MONTH = 30
"""Days between scheduled full retrains."""
MOST_AT_ONCE = 2e7
"""Deletions of one step, over all histories; they take 16 bytes each."""
Engine = Literal["s3t", "sisa"]
Way = Literal["policy", "monthly", "never"]
"""What begins a rebuild: the policy, the calendar (all orders from nothing, whatever is left), or nothing."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is simulated."""

    users: int
    per_day: float
    """Deletions a day while all users are there."""
    rows: int
    """Records in all; each cell has the same number."""
    shards: int
    slices: int
    orders: int
    days: int = MONTH
    layers: int = 12
    """Layers of the backbone; SISA trains all of them."""
    layers_per_slice: int = 1
    cached: bool = True
    """Whether the hidden states below each block are kept; if not, each stage computes them once more."""
    epochs: int = 3
    rates: tuple[float, ...] = ()
    """Deletion prior: how often each slice is hit, in any unit; () is equally often."""
    full_days: float = 1.0
    """Days that training every order of every shard takes."""
    due_days: float = 30.0
    """Days from a deletion to its due date."""
    plans_per_day: int = 1
    """How often a day the planner runs; deletions between two runs are rebuilt together."""
    histories: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated, naming the field."""
        for name in ("users", "rows", "shards", "slices", "days", "layers", "plans_per_day", "histories"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("per_day", "full_days", "due_days"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"{name} must be a positive number, not {getattr(self, name)}")
        if self.rows < self.shards * self.slices:
            raise RecipeError(f"rows must be at least one for each of {self.shards} x {self.slices} cells")
        if self.slices * self.layers_per_slice > self.layers:
            raise RecipeError(
                f"slices: {self.slices} need as many blocks of layers, and there are {self.layers} layers"
            )
        if self.seed < 0:
            raise RecipeError(f"seed must be at least 0, not {self.seed}")
        at_once = min(self.per_day, self.users) / self.plans_per_day
        if self.histories * at_once > MOST_AT_ONCE:
            raise RecipeError(
                f"histories: {self.histories} with {at_once:,.0f} deletions between two plans take too much memory:"
                " lower histories or per_day, or raise plans_per_day"
            )
        _ = self.recipe("s3t")

    @property
    def deletions(self) -> float:
        """Expected deletions over all days: nobody deletes twice."""
        return self.users * -math.expm1(-self.per_day * self.days / self.users)

    def recipe(self, engine: Engine) -> Recipe:
        """The recipe that this grid would have."""
        prior = tuple(PriorClass(name=f"slice {i}", rate=rate, slices=1) for i, rate in enumerate(self.rates))
        return Recipe(
            shards=self.shards,
            slices=self.slices,
            backbone=Backbone(source="", digest="0" * 64),
            classes=("0", "1"),
            orders=self.orders if engine == "s3t" else 1,
            engine=engine,
            epochs=self.epochs,
            layers_per_slice=self.layers_per_slice,
            prior=prior,
        )

    @cached_property
    def chances(self) -> np.ndarray:
        """How likely a deletion hits each slice of a shard, adding up to 1."""
        rates = np.array(self.rates or (1.0,) * self.slices)
        return rates / rates.sum()

    def automaton(self, engine: Engine = "s3t", policy: Policy | None = None) -> Automaton:
        """One shard under a policy."""
        recipe = self.recipe(engine)
        rows = dict.fromkeys(range(self.slices), self.rows / (self.shards * self.slices))

        def cost(prefix: Prefix) -> float:
            below = 0.0 if self.cached or engine != "s3t" else stage_features(recipe, prefix, rows, self.layers)
            return stage_work(recipe, prefix, rows, self.layers) + below

        return Automaton(Grid.of(recipe), cost, policy or Policy())

    @cached_property
    def full_retrain(self) -> float:
        """Work of training every order of every shard from nothing: the unit of the curves."""
        return self.automaton().whole * self.shards


@dataclass(frozen=True, slots=True)
class Strategy:
    """One curve."""

    name: str
    engine: Engine = "s3t"
    way: Way = "policy"
    policy: Policy = field(default_factory=Policy)


def strategies(slices: int) -> tuple[Strategy, ...]:
    """What `simulate` compares unless it is told otherwise."""
    shallow = Policy(kind="spares", spares=1, min_depth=max(1, slices // 2))
    return (
        Strategy("SISA", "sisa"),
        Strategy("S3T, no rebuild", way="never"),
        Strategy("S3T, now"),
        Strategy("S3T, rebuild first", policy=Policy(kind="rebuild_first")),
        Strategy("S3T, by deadline", policy=Policy(kind="by_deadline")),
        Strategy("S3T, one order", policy=Policy(kind="spares")),
        *([Strategy("S3T, one order, half-deep spare", policy=shallow)] if slices > 1 else []),
        Strategy("S3T, minimal depth 1", policy=Policy(kind="min_depth", min_depth=1)),
        Strategy("S3T, monthly full retrain", way="monthly"),
    )


@dataclass(frozen=True, slots=True)
class Curve:
    """Means over the histories, by day."""

    name: str
    depth: tuple[float, ...]
    """Share of the slices that serve at the end of the day, before its rebuild; mean over shards."""
    least: tuple[float, ...]
    """The same of the shard that serves least."""
    work: tuple[float, ...]
    """Cumulative training work, in full retrains of the S3T grid."""
    work_error: float
    """Standard error of the last."""
    lag: float | None
    """Mean days from the first deletion that a rebuild takes in to the rebuild's end; None without rebuilds. With
    `rebuild_first` the deletion takes effect no sooner, unless it is due."""
    missed: float
    """Rebuilds that ended after the due date of a deletion which they took in, per history."""
