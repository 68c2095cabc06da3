"""The grid of a model: which cells speak through which stages now."""

from dataclasses import dataclass
from typing import Any, LiteralString

from psycopg.rows import class_row

from service.store import cells, models
from service.store.cells import GridCell
from service.store.database import Connection
from service.store.models import Model
from service.store.stages import HOLDS
from shards.assembly import Assembly, Member
from shards.recipe import Recipe

LIST: LiteralString = (
    """
SELECT s.stage_key, s.shard, s.prefix, s.roots, j.state AS job,
       EXISTS (SELECT FROM artifact a
               WHERE a.stage_key = s.stage_key AND a.kind = 'stage' AND a.state = 'live') AS live,
       EXISTS (SELECT FROM stage_cell sc
               JOIN tombstone t ON t.cell_id = sc.cell_id AND t.lifted_at IS NULL
               WHERE sc.stage_key = s.stage_key AND """
    + HOLDS
    + """
                 AND NOT EXISTS (SELECT FROM deferral d
                                 WHERE d.model_id = s.model_id AND d.record_id = t.record_id)) AS tainted
FROM stage s LEFT JOIN stage_job j USING (stage_key)
WHERE s.model_id = %(model_id)s::bigint
"""
)
COUNT_JOBS: LiteralString = """
SELECT model_id, state, count(*) AS jobs FROM stage_job
WHERE %(model_id)s::bigint IS NULL OR model_id = %(model_id)s::bigint
GROUP BY model_id, state
ORDER BY model_id, state
"""


@dataclass(frozen=True, slots=True)
class GridStage:
    """A stage, trained or on its way."""

    stage_key: str
    shard: int
    prefix: list[int]
    roots: list[str]
    job: str | None
    live: bool
    tainted: bool

    @property
    def usable(self) -> bool:
        """Whether it may serve."""
        return self.live and not self.tainted


@dataclass(frozen=True, slots=True)
class JobCount:
    """How many training jobs of a model are in a state."""

    model_id: int
    state: str
    jobs: int


def count_jobs(connection: Connection, model_id: int | None = None) -> list[JobCount]:
    """Training jobs by model and state."""
    with connection.cursor(row_factory=class_row(JobCount)) as cursor:
        return cursor.execute(COUNT_JOBS, {"model_id": model_id}).fetchall()


def served(connection: Connection, model: Model) -> Assembly | None:
    """What the model's version serves; None before the first training."""
    version = models.find_version(connection, model.model_id, model.version)
    return Assembly.from_json(version.body) if version else None


def depths(recipe: Recipe, assembly: Assembly | None) -> list[int]:
    """Per shard the number of live slices: of engine `ridge` those whose cells serve."""
    seats = recipe.seats // recipe.shards
    found = assembly.depths if assembly else (0,) * recipe.seats
    return [sum(found[shard * seats : (shard + 1) * seats]) for shard in range(recipe.shards)]


def grid(connection: Connection, model: Model) -> list[dict[str, Any]]:
    """Per shard: what serves, each slice's rows and state, and how far each order could serve.

    `stage` is the one that serves; None where none or, of engine `ridge`, several do, one for each slice of `prefix`.
    A slice is `served`, or `running` or `queued` where a job would bring it back, else `inactive`; it is `stale` where
    the stage that serves lacks records that were ingested since.
    """
    recipe = model.parsed_recipe
    assembly = served(connection, model)
    members = assembly.members if assembly else (None,) * recipe.seats
    seats = recipe.seats // recipe.shards
    places = cells.list_grid(connection, model.dataset_id)
    with connection.cursor(row_factory=class_row(GridStage)) as cursor:
        stages = cursor.execute(LIST, {"model_id": model.model_id}).fetchall()
    return [
        _shard(
            shard,
            [member for member in members[shard * seats : (shard + 1) * seats] if member],
            [place for place in places if place.shard == shard],
            [stage for stage in stages if stage.shard == shard],
            recipe.slice_orders,
        )
        for shard in range(recipe.shards)
    ]


def _shard(
    shard: int,
    members: list[Member],
    places: list[GridCell],
    stages: list[GridStage],
    orders: tuple[tuple[int, ...], ...],
) -> dict[str, Any]:
    prefix = tuple(number for member in members for number in member.prefix)
    keys = [member.stage for member in members]
    roots = {place.slice: place.root for place in places}
    read = {
        number: root
        for stage in stages
        if stage.stage_key in keys
        for number, root in zip(stage.prefix, stage.roots, strict=True)
    }
    return {
        "shard": shard,
        "depth": len(prefix),
        "stage": keys[0] if len(keys) == 1 else None,
        "prefix": list(prefix),
        "stale": any(roots[number] != root for number, root in read.items()),
        "slices": [
            {
                "slice": place.slice,
                "rows": place.rows,
                "state": _state(place.slice, prefix, stages),
                "stale": read.get(place.slice, place.root) != place.root,
            }
            for place in places
        ],
        "orders": [{"order": list(order), "depth": _depth(order, stages)} for order in orders],
    }


def _state(number: int, prefix: tuple[int, ...], stages: list[GridStage]) -> str:
    if number in prefix:
        return "served"
    jobs = {stage.job for stage in stages if number in stage.prefix}
    return next((state for state in ("running", "queued") if state in jobs), "inactive")


def _depth(order: tuple[int, ...], stages: list[GridStage]) -> int:
    """The longest prefix of the order that may serve."""
    usable = {tuple(stage.prefix) for stage in stages if stage.usable}
    depth = 0
    while depth < len(order) and order[: depth + 1] in usable:
        depth += 1
    return depth
