"""What a deletion would do, without doing it: the planner's own pure functions on today's rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.store import cells, evaluations, models, publish, stages
from service.store.artifacts import LocalArtifacts
from service.store.database import Connection
from service.store.models import Model
from shards import plan
from shards.assembly import Assembly
from shards.stages import CellRoot, Stage

LIST_MANIFESTS: LiteralString = """
SELECT DISTINCT c.shard, c.slice, m.root
FROM record r
JOIN cell c ON c.cell_id = r.cell_id
JOIN cell_manifest m ON m.cell_id = r.cell_id AND r.added <= m.generation
WHERE r.record_id = ANY(%(record_ids)s::uuid[]) AND r.dataset_id = %(dataset_id)s::uuid
  AND NOT EXISTS (SELECT FROM tombstone t WHERE t.record_id = r.record_id AND t.removed <= m.generation)
"""

LIST_KNOWN: LiteralString = """
SELECT r.record_id FROM record r
WHERE r.record_id = ANY(%(record_ids)s::uuid[]) AND r.dataset_id = %(dataset_id)s::uuid
  AND NOT EXISTS (SELECT FROM tombstone t WHERE t.record_id = r.record_id AND t.lifted_at IS NULL)
"""


@dataclass(frozen=True, slots=True)
class Preview:
    """The effect of a deletion on one model."""

    model: str
    records: int
    cells: list[dict[str, int]]
    """Cells (shard, slice) that the records lie in."""
    stages_tainted: int
    """Trained stages that would be deactivated and, on erasure, destroyed."""
    depth_before: list[int]
    depth_after: list[int]
    """Per shard the live slices after deactivation."""
    accuracy_before: float | None
    accuracy_after: float | None
    """Measured on the evaluation set with the very stages that would serve; None without one."""
    stages_to_rebuild: int
    rows_to_train: int
    """Records that the rebuild reads, summed over its stages (one epoch each)."""

    def to_json(self) -> dict[str, Any]:
        """As the API gives it."""
        return asdict(self)


def preview(connection: Connection, artifacts: LocalArtifacts, model: Model, record_ids: Sequence[UUID]) -> Preview:
    """Plan the deletion of `record_ids` from `model` on the rows as they are now; changes nothing."""
    recipe = model.parsed_recipe
    record_ids = _known(connection, model, record_ids)
    touched = _touched(connection, model, record_ids)
    open_stages = stages.list_open(connection, model.model_id, model.recipe_digest)
    gone = plan.tainted(open_stages.stages.values(), stages.list_touched(connection, open_stages.stages))
    hit = plan.tainted(open_stages.stages.values(), touched)
    roots = publish.today(connection, model)

    def assembly(without: frozenset[str]) -> Assembly:
        live = open_stages.live(without=without)
        return plan.assemble(model.recipe_digest, recipe.shards, recipe.slice_orders, live, open_stages.digests, roots)

    before, after = assembly(gone), assembly(gone | hit)
    lost = [stage for key, stage in open_stages.live(without=gone).items() if key in hit]
    newest = models.find_version(connection, model.model_id, model.version)
    served = Assembly.from_json(newest.body) if newest else before
    return Preview(
        model=model.name,
        records=len(record_ids),
        cells=[{"shard": shard, "slice": s} for shard, s in sorted({(each.shard, each.slice) for each in touched})],
        stages_tainted=len(lost),
        depth_before=list(served.depths),
        depth_after=list(after.depths),
        accuracy_before=evaluations.accuracy(connection, artifacts, model.evaluation_id, served),
        accuracy_after=evaluations.accuracy(connection, artifacts, model.evaluation_id, after),
        stages_to_rebuild=len(lost),
        rows_to_train=_rows(connection, model, lost, record_ids),
    )


def _known(connection: Connection, model: Model, record_ids: Sequence[UUID]) -> list[UUID]:
    """Those of the records that the model's dataset holds and that are in service."""
    values = {"record_ids": list(record_ids), "dataset_id": model.dataset_id}
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_KNOWN, values).fetchall()


def _touched(connection: Connection, model: Model, record_ids: Sequence[UUID]) -> frozenset[CellRoot]:
    values = {"record_ids": list(record_ids), "dataset_id": model.dataset_id}
    with connection.cursor(row_factory=class_row(CellRoot)) as cursor:
        return frozenset(cursor.execute(LIST_MANIFESTS, values).fetchall())


def _rows(connection: Connection, model: Model, lost: Sequence[Stage], record_ids: Sequence[UUID]) -> int:
    rows = {(cell.shard, cell.slice): cell.rows for cell in cells.list_grid(connection, model.dataset_id)}
    read = sum(rows[stage.shard, index] for stage in lost for index in stage.prefix)
    return max(0, read - len(record_ids) * len(lost))
