"""A model as values, for tests of the planner: training gives a stage its name."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shards.assembly import Assembly
from shards.plan import assemble, missing, tainted
from shards.rebuild import Policy, Rebuild, plan_rebuild
from shards.recipe import Recipe
from shards.stages import CellRoot, Stage

Cell = tuple[int, int]
NOW = 1_000_000.0


def recipe(shards: int, slices: int, orders: int = 1, engine: str = "s3t", **more: Any) -> Recipe:
    body = {"backbone": {"source": "/somewhere", "digest": "d" * 64}, "classes": ["no", "yes"]}
    return Recipe.from_json({**body, "shards": shards, "slices": slices, "orders": orders, "engine": engine, **more})


def sisa_deletion(records: float, slices: int, epochs: float, layers: int) -> float:
    """Expected work of one uniformly random deletion in a shard under SISA with full fine-tuning.

    e' * D * (2/3 + 1/(3R)) records pass (facts/exact-unlearning.md, section 2), each through every layer thrice.
    """
    return 3 * layers * epochs * records * (2 / 3 + 1 / (3 * slices))


@dataclass
class World:
    """A model as values: training gives a stage its name."""

    recipe: Recipe
    live: dict[str, Stage] = field(default_factory=dict)
    version: dict[Cell, int] = field(default_factory=dict)
    rows: dict[Cell, int] = field(default_factory=dict)
    queued: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        grid = [(shard, piece) for shard in range(self.recipe.shards) for piece in range(self.recipe.slices)]
        self.rows = dict.fromkeys(grid, 10) | self.rows

    @property
    def roots(self) -> dict[int, dict[int, str]]:
        slices = range(self.recipe.slices)
        return {s: {p: f"{s}.{p}.{self.version.get((s, p), 0)}" for p in slices} for s in range(self.recipe.shards)}

    def train(self, stages: Iterable[Stage] | None = None) -> None:
        found = missing(self.recipe, self.roots, self.live.keys()) if stages is None else stages
        self.live |= {stage.key: stage for stage in found}

    def delete(self, *cells: Cell) -> None:
        for s, p in cells:
            out = {CellRoot(s, p, f"{s}.{p}.{v}") for v in range(self.version.get((s, p), 0) + 1)}
            for key in tainted(self.live.values(), out):
                del self.live[key]
            self.version[s, p] = self.version.get((s, p), 0) + 1

    def grow(self, *cells: Cell) -> None:
        for cell in cells:
            self.version[cell] = self.version.get(cell, 0) + 1

    def plan(self, kind: str = "now", **asked: Any) -> Rebuild:
        fields = {name: asked.pop(name) for name in ("spares", "min_depth") if name in asked}
        policy = Policy.from_json({"kind": kind, **fields})
        defaults: dict[str, Any] = {"now": NOW, "due": None, "seconds_per_work": None, "have": self.queued}
        return plan_rebuild(
            recipe=self.recipe,
            live=self.live,
            roots=self.roots,
            rows=self.rows,
            policy=policy,
            **{**defaults, **asked},
        )

    def assembly(self) -> Assembly:
        return assemble(self.recipe, self.live, {key: f"artefact of {key}" for key in self.live}, self.roots)

    def reaches(self, shard: int, *, fresh: bool = False) -> dict[int, int]:
        """The longest live prefix by first slice."""
        found: dict[int, int] = {}
        for stage in self.live.values():
            today = all(self.roots[shard][s] == r for s, r in zip(stage.prefix, stage.roots, strict=True)) or not fresh
            if stage.shard == shard and today:
                found[stage.prefix[0]] = max(stage.depth, found.get(stage.prefix[0], 0))
        return found


POLICIES = [
    {"kind": "now"},
    {"kind": "by_deadline"},
    {"kind": "rebuild_first"},
    *({"kind": "spares", "spares": spares} for spares in range(3)),
    {"kind": "spares", "spares": 1, "min_depth": 1},
    *({"kind": "min_depth", "min_depth": depth} for depth in (1, 2)),
]
