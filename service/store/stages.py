"""Stages, their lineage and their artefacts as the planner sees them."""

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from service.store.database import Connection, ask
from shards.assembly import Assembly, Member
from shards.stages import CellRoot, Stage

HOLDS: LiteralString = """
    t.added <= sc.generation AND (t.removed IS NULL OR sc.generation < t.removed)
    AND NOT EXISTS (SELECT FROM absence b WHERE b.record_id = t.record_id
                      AND b.removed <= sc.generation AND sc.generation < b.returned)
"""
"""Whether the manifest that a lineage row `sc` names held the record of a tombstone `t`."""
TAINTED_CELL: LiteralString = """
    EXISTS (SELECT FROM tombstone t
            WHERE t.cell_id = sc.cell_id AND t.lifted_at IS NULL AND t.added <= sc.generation AND t.removed IS NULL
              AND NOT EXISTS (SELECT FROM absence b WHERE b.record_id = t.record_id
                                AND b.removed <= sc.generation AND sc.generation < b.returned))
    OR EXISTS (SELECT FROM tombstone t
               WHERE t.cell_id = sc.cell_id AND t.lifted_at IS NULL AND t.added <= sc.generation
                 AND t.removed > sc.generation
                 AND NOT EXISTS (SELECT FROM absence b WHERE b.record_id = t.record_id
                                   AND b.removed <= sc.generation AND sc.generation < b.returned))
"""
"""Whether it held a record that is out: as `HOLDS`, in two looks that an index answers each."""
LIST_OPEN: LiteralString = """
SELECT s.stage_key, s.shard, s.prefix, s.roots, s.parent, a.digest, a.parent_digest, a.object_name, s.gated
FROM stage s
LEFT JOIN artifact a ON a.stage_key = s.stage_key AND a.kind = 'stage' AND a.state = 'live'
WHERE s.model_id = %(model_id)s::bigint AND s.stage_key IN (  -- never a walk over all stages that ever were
    SELECT l.stage_key FROM artifact l WHERE l.kind = 'stage' AND l.state = 'live' AND l.stage_key IS NOT NULL
    UNION ALL
    SELECT j.stage_key FROM stage_job j WHERE j.model_id = %(model_id)s::bigint AND j.state IN ('queued', 'running'))
ORDER BY cardinality(s.prefix), s.stage_key, a.digest
"""
# `%()b`: a list of hundreds of keys is sent in a tenth of the time.
LIST_TOUCHED: LiteralString = (
    """
SELECT c.shard, c.slice, m.root
FROM (  -- each manifest once: many stages read the same
    SELECT DISTINCT r.cell_id, r.generation FROM stage_cell r WHERE r.stage_key = ANY(%(stage_keys)b::text[])) sc
JOIN cell c ON c.cell_id = sc.cell_id
JOIN cell_manifest m ON m.cell_id = sc.cell_id AND m.generation = sc.generation
WHERE """
    + TAINTED_CELL
)
LIST_TOUCHED_BY: LiteralString = (
    """
SELECT DISTINCT rr.request_id, c.shard, c.slice, m.root
FROM deletion_request_record rr
JOIN tombstone t ON t.record_id = rr.record_id AND t.lifted_at IS NULL
JOIN cell c ON c.cell_id = t.cell_id
JOIN stage_cell sc ON sc.cell_id = t.cell_id
     AND """
    + HOLDS
    + """
JOIN cell_manifest m ON m.cell_id = sc.cell_id AND m.generation = sc.generation
WHERE sc.stage_key = ANY(%(stage_keys)b::text[]) AND rr.request_id = ANY(%(request_ids)s::uuid[])
"""
)
# Of all stages at once: each statement is an event.
INSERT: LiteralString = """
INSERT INTO stage (stage_key, model_id, shard, prefix, roots, parent, gated)
SELECT q.stage_key, %(model_id)s::bigint, q.shard, q.prefix, q.roots, q.parent, %(gated)s::boolean
FROM jsonb_to_recordset(%(stages)s::jsonb) q (stage_key text, shard int, prefix int[], roots text[], parent text)
ORDER BY cardinality(q.prefix), q.stage_key
ON CONFLICT DO NOTHING
"""
INSERT_CELLS: LiteralString = """
INSERT INTO stage_cell (stage_key, cell_id, generation)
SELECT * FROM unnest(%(stage_keys)s::text[], %(cell_ids)s::bigint[], %(generations)s::bigint[])
ON CONFLICT DO NOTHING
"""
LIST_HELD: LiteralString = """
SELECT s.stage_key, s.shard, s.prefix, s.roots, s.parent,
       NULL::text AS digest, NULL::text AS parent_digest, NULL::text AS object_name, gated
FROM stage s
WHERE s.model_id = %(model_id)s::bigint
  AND s.shard IN (SELECT c.shard FROM cell c WHERE c.cell_id = ANY(%(cell_ids)s::bigint[]))
  AND s.stage_key IN (
    SELECT l.stage_key FROM artifact l WHERE l.state <> 'destroyed' AND l.stage_key IS NOT NULL
    UNION ALL
    SELECT j.stage_key FROM stage_job j WHERE j.model_id = %(model_id)s::bigint AND j.state IN ('queued', 'running'))
"""
LIST_BY_KEY: LiteralString = """
SELECT stage_key, shard, prefix, roots, parent,
       NULL::text AS digest, NULL::text AS parent_digest, NULL::text AS object_name, gated
FROM stage WHERE stage_key = ANY(%(stage_keys)s::text[])
"""


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage that is live or on its way; without an artefact, `digest` and what follows are None."""

    stage_key: str
    shard: int
    prefix: list[int]
    roots: list[str]
    parent: str | None
    digest: str | None
    parent_digest: str | None
    object_name: str | None
    gated: bool
    """Not let into service yet by the model's gate or canary."""

    def stage(self, recipe: str) -> Stage:
        """The stage as the core knows it."""
        return _stage(recipe, self.shard, tuple(self.prefix), tuple(self.roots), self.parent)


@lru_cache(maxsize=2**16)
def _stage(recipe: str, shard: int, prefix: tuple[int, ...], roots: tuple[str, ...], parent: str | None) -> Stage:
    """One value per stage and process: its key, a digest, is derived once and not at each plan."""
    return Stage(recipe, shard, prefix, roots, parent)


@dataclass(frozen=True, slots=True)
class TouchedRow:
    """A manifest that a request's records lie in."""

    request_id: UUID
    shard: int
    slice: int
    root: str


@dataclass(frozen=True, slots=True)
class OpenStages:
    """All of a model that can be served or is being trained."""

    stages: dict[str, Stage]
    """By key, those without an artefact included."""
    digests: dict[str, str]
    """Artefact digest of each live stage; one that fits the chosen digest of its parent."""
    objects: dict[str, str]
    """Object name of each of those digests."""
    gated: set[str]
    """Keys that the model's gate or canary has not let into service yet."""
    made: set[tuple[str, str]]
    """All live artefacts: stage key and digest."""

    def live(self, without: Iterable[str] = ()) -> dict[str, Stage]:
        """Stages with an artefact, but for the keys `without`."""
        out = set(without)
        return {key: stage for key, stage in self.stages.items() if key in self.digests and key not in out}

    def carry(self, assembly: Assembly, without: AbstractSet[str]) -> bool:
        """Whether every artefact of the assembly is live, and none of a stage in `without`."""
        members = [member for member in assembly.members if member]
        return bool(members) and all(self._carry(member, without) for member in members)

    def _carry(self, member: Member, without: AbstractSet[str]) -> bool:
        key: str | None = member.stage
        for digest in reversed(member.artifacts):
            if key is None or key in without or (key, digest) not in self.made:
                return False
            key = self.stages[key].parent
        return key is None


def list_open(connection: Connection, model_id: int, recipe: str) -> OpenStages:
    """Live and coming stages of a model, with one artefact each.

    Where two platforms trained one key, the smallest digest whose parent digest is the one chosen for the parent is
    taken: a child stands on the parent it was trained on.
    """
    with connection.cursor(row_factory=class_row(StageRow)) as cursor:
        rows = cursor.execute(LIST_OPEN, {"model_id": model_id}).fetchall()
    found = OpenStages({}, {}, {}, set(), set())
    for row in rows:  # parents first
        found.stages[row.stage_key] = row.stage(recipe)
        if row.gated:
            found.gated.add(row.stage_key)
        if row.digest:
            found.made.add((row.stage_key, row.digest))
        fits = row.parent is None or found.digests.get(row.parent) == row.parent_digest
        if row.digest and row.object_name and row.stage_key not in found.digests and fits:
            found.digests[row.stage_key] = row.digest
            found.objects[row.digest] = row.object_name
    return found


def ask_held(
    connection: Connection, model_id: int, recipe: str, cell_ids: Iterable[int]
) -> Callable[[], dict[str, Stage]]:
    """Stages in the shards of these cells of which any trace is left or coming: what a plan may have to name.

    See `database.ask`.
    """
    values = {"model_id": model_id, "cell_ids": list(cell_ids)}
    rows = ask(connection, LIST_HELD, values, class_row(StageRow))
    return lambda: {row.stage_key: row.stage(recipe) for row in rows()}


def list_by_key(connection: Connection, stage_keys: Iterable[str], recipe: str) -> dict[str, Stage]:
    """Stages by key, whatever became of them."""
    with connection.cursor(row_factory=class_row(StageRow)) as cursor:
        rows = cursor.execute(LIST_BY_KEY, {"stage_keys": list(stage_keys)}).fetchall()
    return {row.stage_key: row.stage(recipe) for row in rows}


def list_touched(connection: Connection, stage_keys: Iterable[str]) -> frozenset[CellRoot]:
    """The manifests in those stages' lineage that hold a record with an open tombstone."""
    with connection.cursor(row_factory=class_row(CellRoot)) as cursor:
        return frozenset(cursor.execute(LIST_TOUCHED, {"stage_keys": list(stage_keys)}).fetchall())


def list_touched_by(
    connection: Connection, stage_keys: Iterable[str], request_ids: Sequence[UUID]
) -> dict[UUID, frozenset[CellRoot]]:
    """Per request the manifests in those stages' lineage that hold one of the request's own records."""
    values = {"stage_keys": list(stage_keys), "request_ids": list(request_ids)}
    with connection.cursor(row_factory=class_row(TouchedRow)) as cursor:
        rows = cursor.execute(LIST_TOUCHED_BY, values).fetchall()
    touched: dict[UUID, set[CellRoot]] = {request_id: set() for request_id in request_ids}
    for row in rows:
        touched[row.request_id].add(CellRoot(row.shard, row.slice, row.root))
    return {request_id: frozenset(cells) for request_id, cells in touched.items()}


def insert_stages(
    connection: Connection,
    model_id: int,
    stages: Sequence[Stage],
    places: dict[tuple[int, int], tuple[int, int]],
    *,
    gated: bool = False,
) -> None:
    """Stages with their lineage; `places` gives (cell id, generation) by (shard, slice). Known ones stay as they are.

    New ones that are `gated` serve only after their model's gate and canary.
    """
    if not stages:
        return
    made = [
        {
            "stage_key": stage.key,
            "shard": stage.shard,
            "prefix": list(stage.prefix),
            "roots": list(stage.roots),
            "parent": stage.parent,
        }
        for stage in stages
    ]
    connection.execute(INSERT, {"model_id": model_id, "stages": Jsonb(made), "gated": gated})
    reads = [(stage.key, *places[stage.shard, piece]) for stage in stages for piece in stage.prefix]
    values = {
        "stage_keys": [stage_key for stage_key, _, _ in reads],
        "cell_ids": [cell_id for _, cell_id, _ in reads],
        "generations": [generation for _, _, generation in reads],
    }
    connection.execute(INSERT_CELLS, values)
