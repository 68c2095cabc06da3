"""How many more deletions a model stands, and what they would cost: the pure forecast on today's rows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, LiteralString

from psycopg.rows import scalar_row

from service.store import rebuilds
from service.store.database import Connection, get_time
from service.store.models import Model
from shards import capacity
from shards.capacity import Outlook
from shards.chains import Grid
from shards.rebuild import holdings
from shards.recipe import Recipe
from shards.scenario import MONTH
from shards.work import Prefix, shard_costs, sisa_work

GET_RATE: LiteralString = """
SELECT count(*)::float / %(days)s::int AS per_day
FROM request_target t JOIN deletion_request r USING (request_id)
WHERE t.model_id = %(model_id)s::bigint AND t.version IS NOT NULL
  AND r.received_at > now() - make_interval(days => %(days)s::int)
"""


@dataclass(frozen=True, slots=True)
class Capacity:
    """A model's capacity. Work is in passes of one record through one layer; infinity is a null in JSON."""

    outlook: Outlook
    per_day: float
    measured: bool
    """Whether `per_day` is the model's own of the last 30 days, or was given."""
    per_deletion: dict[str, float | None]
    """Expected work of the next deletion at full health: one order trained back, all orders, SISA with full
    fine-tuning (None where the number of layers is not known), a scheduled monthly full retrain's share.
    """
    seconds_per_work: float
    policy: dict[str, Any]
    planned: dict[str, Any]
    """What the policy would train now: stages, work, start."""

    def to_json(self) -> dict[str, Any]:
        """As the API gives it."""
        seen = asdict(self.outlook)
        return _finite(
            {
                "per_day": self.per_day,
                "per_day_measured": self.measured,
                **seen,
                "work_seconds": self.outlook.work * self.seconds_per_work,
                "full_retrain_seconds": self.outlook.full_retrain * self.seconds_per_work,
                "work_per_deletion": self.per_deletion,
                "policy": self.policy,
                "planned": self.planned,
            }
        )


def forecast(
    connection: Connection, model: Model, *, per_day: float | None = None, layers: int | None = None
) -> Capacity:
    """Forecast from the clean stages of now, no rebuild coming.

    Args:
        connection: of the caller's transaction.
        model: the model.
        per_day: deletions a day; None takes the model's own of the last 30 days.
        layers: layers of the backbone, which SISA would train; None takes the recipe's where it says.
    """
    found = rebuilds.survey(connection, model)
    recipe = found.recipe
    rate = _rate(connection, model.model_id) if per_day is None else per_day
    layers = layers or _layers(recipe)
    grid = Grid.of(recipe)
    rates = [each.rate for each in recipe.prior for _ in range(each.slices)] or [1.0] * recipe.slices
    weights = {(shard, index): rates[index] * rows for (shard, index), rows in found.rows.items()}
    costs = shard_costs(recipe, found.rows, layers)
    outlook = capacity.outlook(grid, holdings(recipe, found.live, found.roots), costs, weights, rate or None)
    plan = found.plan(model.policy, now=get_time(connection), due=model.rebuild_due)
    start = rebuilds.moment(plan.start)
    one = grid.nodes if grid.cells else [grid.orders[0][:depth] for depth in range(1, grid.slices + 1)]
    return Capacity(
        outlook=outlook,
        per_day=rate,
        measured=per_day is None,
        per_deletion={
            "one_order": capacity.expected_loss(one, costs, weights),
            "all_orders": capacity.expected_loss(grid.nodes, costs, weights),
            "sisa": _sisa(recipe, found.rows, weights, layers) if layers else None,
            "monthly_full_retrain": outlook.full_retrain / (MONTH * rate) if rate else None,
        },
        seconds_per_work=found.seconds_per_work,
        policy=model.policy.to_json(),
        planned={
            "stages": len(plan.stages),
            "work": plan.work,
            "seconds": plan.work * found.seconds_per_work,
            "start": start.isoformat() if start else None,
        },
    )


def _rate(connection: Connection, model_id: int) -> float:
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(GET_RATE, {"model_id": model_id, "days": MONTH}).fetchone() or 0.0


def _layers(recipe: Recipe) -> int | None:
    if recipe.trunk_layers is None:
        return None
    return recipe.trunk_layers + recipe.slices * recipe.layers_per_slice


def _sisa(
    recipe: Recipe, rows: Mapping[tuple[int, int], int], weights: Mapping[tuple[int, int], float], layers: int
) -> float:
    """The same data and grid under SISA with full fine-tuning, slices in their order."""

    def cost(shard: int) -> Callable[[Prefix], float]:
        return lambda prefix: sisa_work(
            sum(rows[shard, index] for index in prefix), recipe.slices, recipe.epochs, layers
        )

    nodes = [tuple(range(depth)) for depth in range(1, recipe.slices + 1)]
    return capacity.expected_loss(nodes, {shard: cost(shard) for shard in range(recipe.shards)}, weights)


def _finite(value: Any) -> Any:
    """JSON has no infinity: what no deletion can end is null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
