"""What the rebuild planner has to know of a model, read from the tables: it plans, nothing is queued here."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from service.store import cells, jobs, stages
from service.store.database import Connection
from service.store.models import Model
from shards import plan
from shards.digest import digest_of
from shards.rebuild import Policy, Rebuild, plan_rebuild
from shards.recipe import Recipe
from shards.stages import Stage
from shards.work import stage_work


@dataclass(frozen=True, slots=True)
class Survey:
    """Today's grid of a model, and what of it is clean."""

    recipe: Recipe
    live: dict[str, Stage]
    """Clean stages with a live artefact, by key. One that holds a deferred record is not clean."""
    queued: frozenset[str]
    """Keys of clean stages that are being trained or wait for it."""
    roots: dict[int, dict[int, str]]
    rows: dict[tuple[int, int], int]
    """Records by (shard, slice)."""
    places: dict[tuple[int, int], tuple[int, int]]
    """(cell id, generation) by (shard, slice)."""
    seconds_per_work: float

    def plan(self, policy: Policy, *, now: datetime, due: datetime | None) -> Rebuild:
        """The cheapest stages that keep the policy's promise, and when to begin."""
        return plan_rebuild(
            recipe=self.recipe,
            live=self.live,
            roots=self.roots,
            rows=self.rows,
            policy=policy,
            now=now.timestamp(),
            due=due.timestamp() if due else None,
            seconds_per_work=self.seconds_per_work,
            have=self.queued,
        )

    def work(self, stage: Stage) -> float:
        """Work of one stage, as the planner counts it."""
        rows = {index: rows for (shard, index), rows in self.rows.items() if shard == stage.shard}
        return stage_work(self.recipe, stage.prefix, rows)

    def without(self, tainted: AbstractSet[str], counts: Mapping[tuple[int, int], int]) -> "Survey":
        """The grid after a deletion that taints these stages and takes that many records from each (shard, slice)."""
        roots = {shard: dict(found) for shard, found in self.roots.items()}
        rows = dict(self.rows)
        for (shard, index), count in counts.items():
            roots[shard][index] = digest_of({"after": roots[shard][index]})  # whatever it is, no stage has read it
            rows[shard, index] -= count
        return replace(
            self,
            live={key: stage for key, stage in self.live.items() if key not in tainted},
            queued=self.queued - tainted,
            roots=roots,
            rows=rows,
        )


def survey(connection: Connection, model: Model) -> Survey:
    """Read it as it is now."""
    open_stages = stages.list_open(connection, model.model_id, model.recipe_digest)
    tainted = plan.tainted(open_stages.stages.values(), stages.list_touched(connection, open_stages.stages))
    roots: dict[int, dict[int, str]] = {}
    grid = cells.list_grid(connection, model.dataset_id)
    for cell in grid:
        roots.setdefault(cell.shard, {})[cell.slice] = cell.root
    return Survey(
        recipe=model.parsed_recipe,
        live=open_stages.live(without=tainted),
        queued=frozenset(open_stages.stages) - open_stages.digests.keys() - tainted,
        roots=roots,
        rows={(cell.shard, cell.slice): cell.rows for cell in grid},
        places={(cell.shard, cell.slice): (cell.cell_id, cell.generation) for cell in grid},
        seconds_per_work=jobs.seconds_per_work(connection, model.model_id),
    )


def moment(seconds: float | None) -> datetime | None:
    """The planner's epoch seconds as a moment."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
