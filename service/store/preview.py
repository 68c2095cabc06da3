"""What a deletion would do, without doing it: the planner's own pure functions on today's rows."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.domain.deadlines import due_at
from service.store import active, cells, deferrals, evaluations, grid, models, publish, rebuilds, stages
from service.store.artifacts import Artifacts
from service.store.database import Connection, get_time
from service.store.evaluations import Answers
from service.store.models import Model
from shards import plan
from shards.assembly import Assembly
from shards.rebuild import Kind, Policy
from shards.stages import CellRoot, Stage

LIST_MANIFESTS: LiteralString = """
SELECT DISTINCT c.shard, c.slice, m.root
FROM record r
JOIN cell c ON c.cell_id = r.cell_id
JOIN cell_manifest m ON m.cell_id = r.cell_id AND r.added <= m.generation
WHERE r.record_id = ANY(%(record_ids)s::uuid[]) AND r.dataset_id = %(dataset_id)s::uuid
  AND NOT EXISTS (SELECT FROM tombstone t WHERE t.record_id = r.record_id AND t.removed <= m.generation)
  AND NOT EXISTS (SELECT FROM absence b WHERE b.record_id = r.record_id
                    AND b.removed <= m.generation AND m.generation < b.returned)
"""

LIST_KNOWN: LiteralString = """
SELECT r.record_id FROM record r
WHERE r.record_id = ANY(%(record_ids)s::uuid[]) AND r.dataset_id = %(dataset_id)s::uuid
  AND NOT EXISTS (SELECT FROM tombstone t WHERE t.record_id = r.record_id AND t.lifted_at IS NULL)
"""

COUNT_PLACES: LiteralString = """
SELECT c.shard, c.slice, count(*) AS rows
FROM record r JOIN cell c ON c.cell_id = r.cell_id
WHERE r.record_id = ANY(%(record_ids)s::uuid[])
GROUP BY c.shard, c.slice
"""

KINDS: tuple[Kind, ...] = ("now", "by_deadline", "rebuild_first")


@dataclass(frozen=True, slots=True)
class _Count:
    shard: int
    slice: int
    rows: int


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
    """Measured on the evaluation set with the very stages that serve after deactivation (under `rebuild_first`: should
    the replacement not be there in time). None where `accuracy_note` says why.
    """
    accuracy_note: str | None
    stages_to_rebuild: int
    rows_to_train: int
    """Records that the rebuild reads, summed over its stages (one epoch each)."""
    policy: str
    """Kind of the model's rebuild policy."""
    policies: dict[str, dict[str, Any]]
    """Per policy, what would be trained once the deletion is in effect: `stages`, `work` (passes of one record through
    one layer), `seconds` at the measured speed, and the `start`, None for at once; the model's other losses included.
    """
    due_at: str
    """When a request received now would have to be answered."""
    last_safe_start: str | None
    """The latest start from which a rebuild of everything ends before that."""

    def to_json(self) -> dict[str, Any]:
        """As the API gives it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Draft:
    """A preview whose accuracy is not measured yet, for that reads files."""

    preview: Preview
    before: Answers
    after: Answers

    def measured(self, artifacts: Artifacts) -> Preview:
        """The whole preview; to be called outside of the transaction."""
        before, after = (evaluations.measure(artifacts, each) for each in (self.before, self.after))
        note = after.note or before.note
        return replace(self.preview, accuracy_before=before.share, accuracy_after=after.share, accuracy_note=note)


def preview(connection: Connection, model: Model, record_ids: Sequence[UUID]) -> Draft:
    """Plan the deletion of `record_ids` from `model` on the rows as they are now; changes nothing."""
    recipe = model.parsed_recipe
    record_ids = _known(connection, model, record_ids)
    touched = _touched(connection, model, record_ids)
    counts = _counts(connection, record_ids)
    open_stages = stages.list_open(connection, model.model_id, model.recipe_digest)
    out = stages.list_touched(connection, open_stages.stages)
    barred = deferrals.list_touched(connection, model.model_id, open_stages.stages) if model.deferring else out
    gone = plan.tainted(open_stages.stages.values(), barred)
    hit = plan.tainted(open_stages.stages.values(), touched)

    def assembly(without: Sequence[UUID], more: AbstractSet[CellRoot] = frozenset()) -> Assembly:
        cells = active.ask_cells(connection, model.dataset_id, without=without)()
        roots = active.list_roots(connection, cells, open_stages.stages, out | more)
        bars = plan.tainted(open_stages.stages.values(), barred | more)
        live = open_stages.live(without=bars | open_stages.gated)
        pinned = publish.find_pinned(connection, model, open_stages, bars)
        return pinned or plan.assemble(recipe, live, open_stages.digests, roots)

    before, after = assembly(()), assembly(record_ids, touched)
    lost = [stage for key, stage in open_stages.live(without=gone).items() if key in hit]
    newest = models.find_version(connection, model.model_id, model.version)
    served = Assembly.from_json(newest.body) if newest else before
    drafted = Preview(
        model=model.name,
        records=len(record_ids),
        cells=[{"shard": shard, "slice": s} for shard, s in sorted({(each.shard, each.slice) for each in touched})],
        stages_tainted=len(lost),
        depth_before=grid.depths(recipe, served),
        depth_after=grid.depths(recipe, after),
        accuracy_before=None,
        accuracy_after=None,
        accuracy_note=None,
        stages_to_rebuild=len(lost),
        rows_to_train=_rows(connection, model, lost, counts),
        policy=model.policy.kind,
        **_policies(connection, model, counts, hit),
    )
    answers = [evaluations.find_answers(connection, model, each) for each in (served, after)]
    return Draft(drafted, *answers)


def _policies(
    connection: Connection, model: Model, counts: Mapping[tuple[int, int], int], hit: AbstractSet[str]
) -> dict[str, Any]:
    """Work and start under each policy that needs no figure, and the model's own."""
    after = rebuilds.survey(connection, model).without(hit, counts)
    now = get_time(connection)
    due = due_at(now, None)
    first = min(due, model.rebuild_due) if model.rebuild_due else due
    chosen = [Policy(kind=kind) for kind in KINDS]
    planned = {each.kind: after.plan(each, now=now, due=first) for each in dict.fromkeys((*chosen, model.policy))}
    return {
        "policies": {
            kind: {
                "stages": len(each.stages),
                "work": each.work,
                "seconds": each.work * after.seconds_per_work,
                "start": _iso(each.start) if each.start and each.start > now.timestamp() else None,
            }
            for kind, each in planned.items()
        },
        "due_at": due.isoformat(),
        "last_safe_start": _iso(planned["now"].last_safe_start),
    }


def _iso(seconds: float | None) -> str | None:
    moment = rebuilds.moment(seconds)
    return moment.isoformat() if moment else None


def _known(connection: Connection, model: Model, record_ids: Sequence[UUID]) -> list[UUID]:
    """Those of the records that the model's dataset holds and that are in service."""
    values = {"record_ids": list(record_ids), "dataset_id": model.dataset_id}
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_KNOWN, values).fetchall()


def _touched(connection: Connection, model: Model, record_ids: Sequence[UUID]) -> frozenset[CellRoot]:
    values = {"record_ids": list(record_ids), "dataset_id": model.dataset_id}
    with connection.cursor(row_factory=class_row(CellRoot)) as cursor:
        return frozenset(cursor.execute(LIST_MANIFESTS, values).fetchall())


def _counts(connection: Connection, record_ids: Sequence[UUID]) -> dict[tuple[int, int], int]:
    """How many of the records lie in each (shard, slice)."""
    with connection.cursor(row_factory=class_row(_Count)) as cursor:
        found = cursor.execute(COUNT_PLACES, {"record_ids": list(record_ids)}).fetchall()
    return {(each.shard, each.slice): each.rows for each in found}


def _rows(connection: Connection, model: Model, lost: Sequence[Stage], counts: Mapping[tuple[int, int], int]) -> int:
    rows = {(cell.shard, cell.slice): cell.rows for cell in cells.list_grid(connection, model.dataset_id)}
    read = [(stage.shard, index) for stage in lost for index in stage.prefix]
    return sum(rows[place] - counts.get(place, 0) for place in read)
