"""The rows behind a deletion certificate, read in one snapshot; nothing is computed here but their arrangement."""

from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.domain.requests import Kind, Outcome, State
from service.evidence.events import EventKind
from service.evidence.rows import CellRow, Evidence, ObjectRow, PlatformRow, ReplayRow, TimeRow
from service.store import events, exports, manifests, models, processes, stages, told
from service.store.database import Connection
from service.store.told import About
from shards import plan
from shards.assembly import Assembly
from shards.stages import CellRoot, Stage

TOOL_VERSION = version("expunge")

GET_REQUEST: LiteralString = """
SELECT r.request_id, r.kind::text, r.regime, r.received_at, r.due_at, r.subject_commitment, r.created_at,
       t.version, t.plan, t.deactivated_at, clock_timestamp() AS issued_at
FROM request_target t JOIN deletion_request r ON r.request_id = t.request_id
WHERE t.request_id = %(request_id)s::uuid AND t.model_id = %(model_id)s::bigint
  AND (t.erased_at IS NOT NULL OR t.state = 'deactivated' AND r.kind <> 'erase')
"""
FIND_STATE: LiteralString = """
SELECT t.state
FROM request_target t JOIN deletion_request r ON r.request_id = t.request_id
WHERE t.request_id = %(request_id)s::uuid AND t.model_id = %(model_id)s::bigint
  AND (t.state = 'erasing' AND t.erased_at IS NOT NULL OR t.state = 'deactivated' AND r.kind <> 'erase')
"""
LIST_TOUCHED: LiteralString = """
SELECT DISTINCT c.shard, c.slice, m.root
FROM deletion_request_record q
JOIN tombstone t ON t.record_id = q.record_id
JOIN cell c ON c.cell_id = t.cell_id
JOIN cell_manifest m ON m.cell_id = t.cell_id AND t.added <= m.generation
     AND (t.removed IS NULL OR m.generation < t.removed)
     AND NOT EXISTS (SELECT FROM absence b WHERE b.record_id = t.record_id
                       AND b.removed <= m.generation AND m.generation < b.returned)
WHERE q.request_id = %(request_id)s::uuid AND t.dataset_id = %(dataset_id)s::uuid
  AND (%(outcome)s::deletion_outcome = 'erased' OR t.erased_at IS NULL)
"""
LIST_CELLS: LiteralString = """
SELECT c.shard, c.slice, b.root AS before, a.root AS after
FROM (
    SELECT t.cell_id, max(t.removed) AS removed  -- when the last of the request's records left the cell
    FROM deletion_request_record q
    JOIN tombstone t ON t.record_id = q.record_id
    WHERE q.request_id = %(request_id)s::uuid AND t.dataset_id = %(dataset_id)s::uuid
    GROUP BY t.cell_id) l
JOIN cell c ON c.cell_id = l.cell_id
JOIN cell_manifest b ON b.cell_id = l.cell_id AND b.generation = l.removed - 1
JOIN cell_manifest a ON a.cell_id = l.cell_id AND a.generation = l.removed
"""
LIST_OBJECTS: LiteralString = """
SELECT a.object_name, a.digest, a.destroyed_at, a.checked_at AS absent_at, a.stage_key,
       NULL::int AS shard, NULL::int AS slice
FROM artifact a
WHERE a.stage_key = ANY(%(stage_keys)s::text[])
ORDER BY a.object_name
"""
LIST_PAYLOADS: LiteralString = """
SELECT DISTINCT a.object_name, a.digest, a.destroyed_at, a.checked_at AS absent_at, a.stage_key, c.shard, c.slice
FROM deletion_request_record q
JOIN tombstone t ON t.record_id = q.record_id
JOIN cell c ON c.cell_id = t.cell_id
JOIN cell_manifest m ON m.cell_id = t.cell_id AND m.generation = t.added
JOIN artifact a ON a.cell_id = t.cell_id AND a.state IN ('doomed', 'destroyed')
     AND a.created_at <= t.erased_at AND a.doomed_at >= m.created_at
     AND NOT EXISTS (  -- a copy of the file that remains, left by a rewrite that died, held none of the records
         SELECT FROM artifact l WHERE l.cell_id = a.cell_id AND l.state = 'live' AND l.digest = a.digest)
WHERE q.request_id = %(request_id)s::uuid AND t.dataset_id = %(dataset_id)s::uuid
ORDER BY a.object_name
"""
LIST_PLATFORMS: LiteralString = """
SELECT a.fingerprint, p.body AS fields, array_agg(DISTINCT a.stage_key) AS stages
FROM artifact a JOIN platform p USING (fingerprint)
WHERE a.stage_key = ANY(%(stage_keys)s::text[]) AND a.digest = ANY(%(digests)s::text[])
GROUP BY a.fingerprint, p.body
"""
LIST_REPLAYS: LiteralString = """
SELECT DISTINCT ON (r.stage_key) r.stage_key AS stage, r.digest, r.outcome::text, r.ended_at AS at, r.platform
FROM replay r
WHERE r.stage_key = ANY(%(stage_keys)s::text[]) AND r.digest = ANY(%(digests)s::text[]) AND r.outcome IS NOT NULL
  AND r.released_at IS NULL
ORDER BY r.stage_key, r.replay_id DESC
"""


@dataclass(frozen=True, slots=True)
class _Request:
    request_id: UUID
    kind: str
    regime: str | None
    received_at: datetime
    due_at: datetime
    subject_commitment: bytes
    created_at: datetime
    version: int
    plan: dict[str, list[str]]
    deactivated_at: datetime
    issued_at: datetime


def find_state(connection: Connection, request_id: UUID, model_id: int) -> State | None:
    """The state in which a target waits for its certificate: `erasing`, or `deactivated` for a restriction."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        found = cursor.execute(FIND_STATE, {"request_id": request_id, "model_id": model_id}).fetchone()
    return State(found) if found else None


def list_objects(connection: Connection, request_id: UUID, model_id: int) -> list[str]:
    """Names of the destroyed objects that an erased target's certificate lists."""
    at: dict[str, Any] = {"request_id": request_id, "model_id": model_id}
    with connection.cursor(row_factory=class_row(_Request)) as cursor:
        request = cursor.execute(GET_REQUEST, at).fetchone()
    if request is None or request.kind != Kind.ERASE:
        return []
    at["dataset_id"] = models.get_model_by_id(connection, model_id).dataset_id
    stage_objects = _objects(connection, LIST_OBJECTS, {"stage_keys": request.plan["stages"]})
    return [row.object_name for row in (*stage_objects, *_objects(connection, LIST_PAYLOADS, at))]


def get_evidence(
    connection: Connection, request_id: UUID, model_id: int, *, checkpoint: str, key_backup_days: int | None
) -> Evidence | None:
    """Evidence of an erased or restricted target, issued now by the database's clock; None when it is neither yet.

    None, too, while an event that it rests on is not under the published tree head `checkpoint` (rule 17).

    Raises:
        EvidenceError: a process that ran is unaccounted for.
    """
    at: dict[str, Any] = {"request_id": request_id, "model_id": model_id}
    with connection.cursor(row_factory=class_row(_Request)) as cursor:
        request = cursor.execute(GET_REQUEST, at).fetchone()
    if request is None:
        return None
    model = models.get_model_by_id(connection, model_id)
    recipe = model.parsed_recipe
    outcome = (Outcome.ERASED if request.kind == Kind.ERASE else Outcome.RESTRICTED).value
    at |= {"dataset_id": model.dataset_id, "outcome": outcome}
    after = models.find_version(connection, model_id, request.version)
    before = models.find_version(connection, model_id, request.version - 1)
    assembly = (
        Assembly.from_json(after.body) if after else Assembly(model.recipe_digest, (None,) * recipe.seats, recipe.rule)
    )
    served = with_ancestors(connection, assembly, model.recipe_digest)
    touched: tuple[CellRoot, ...] = _rows(connection, CellRoot, LIST_TOUCHED, at)
    tainted = stages.list_by_key(connection, request.plan["stages"], model.recipe_digest)
    erased = outcome == Outcome.ERASED
    if not erased:  # nor those of records that were erased for another request since
        tainted = {key: tainted[key] for key in plan.tainted(tainted.values(), frozenset(touched))}
    tainted_objects = _objects(connection, LIST_OBJECTS, {"stage_keys": list(tainted)})
    payloads = _objects(connection, LIST_PAYLOADS, at) if erased else ()
    replicas, event_ids = processes.list_replicas(
        connection, model_id, version=request.version, since=request.created_at, until=request.deactivated_at
    )
    about = About(
        request_id=request_id,
        model_id=model_id,
        version=request.version,
        event_ids=event_ids,
        destroyed=[row.object_name for row in (*tainted_objects, *payloads)],
    )
    ledger = told.find_ledger(connection, about, checkpoint)
    if ledger is None:
        return None
    return Evidence(
        request_id=request_id,
        kind=request.kind,
        regime=request.regime,
        received_at=request.received_at,
        due_at=request.due_at,
        subject_commitment=bytes(request.subject_commitment),
        outcome=outcome,
        model_name=model.name,
        recipe_digest=model.recipe_digest,
        engine=recipe.engine,
        backbone_digest=recipe.backbone.digest if recipe.backbone else None,
        provenance=recipe.backbone.provenance if recipe.backbone else None,
        retrain_equal=recipe.engine != "external" or model.reproducible is True,
        version_before=before.version if before else 0,
        assembly_before=before.assembly if before else None,
        version_after=request.version,
        floor=model.floor,
        assembly_after=assembly.to_json(),
        served_stages=tuple(served.values()),
        tainted_stages=tuple(tainted.values()),
        tainted_objects=tainted_objects,
        touched=touched,
        cells=_rows(connection, CellRow, LIST_CELLS, at) if erased else (),
        records=manifests.list_records(connection, request_id, model.dataset_id, outcome),
        manifests=manifests.list_manifests(connection, request_id, model.dataset_id, outcome, {*served, *tainted}),
        payloads=payloads,
        times=_times(connection, request, model_id),
        replicas=replicas,
        platforms=platforms(connection, served, assembly),
        replays=_of_served(connection, ReplayRow, LIST_REPLAYS, served, assembly),
        exports=tuple(exports.open_items(connection, model_id, request_id)),
        ledger=ledger,
        key_backup_days=key_backup_days,
        tool_version=TOOL_VERSION,
        issued_at=request.issued_at,
    )


def with_ancestors(connection: Connection, assembly: Assembly, recipe: str) -> dict[str, Stage]:
    """Every stage that an assembly stands on, by key."""
    found: dict[str, Stage] = {}
    wanted = {member.stage for member in assembly.members if member}
    while wanted:
        found |= stages.list_by_key(connection, wanted, recipe)
        wanted = {stage.parent for stage in found.values() if stage.parent} - set(found)
    return found


def _rows(connection: Connection, kind: type[Any], query: LiteralString, values: dict[str, Any]) -> tuple[Any, ...]:
    with connection.cursor(row_factory=class_row(kind)) as cursor:
        return tuple(cursor.execute(query, values).fetchall())


def _objects(connection: Connection, query: LiteralString, values: dict[str, Any]) -> tuple[ObjectRow, ...]:
    return _rows(connection, ObjectRow, query, values)


def _times(connection: Connection, request: _Request, model_id: int) -> tuple[TimeRow, ...]:
    """When the target first entered each state, from the events; the certificate itself makes it `completed`."""
    first: dict[str, datetime] = {"received": request.created_at}
    for event in events.list_of_request(connection, request.request_id):
        noun, _, state = event.kind.partition(".")
        if event.kind == EventKind.REQUEST_RECEIVED:
            first["received"] = event.created_at
        elif noun == "target" and event.model_id == model_id and state in {"deactivating", "deactivated", "erasing"}:
            first.setdefault(state, event.created_at)
    first["completed"] = request.issued_at
    return tuple(TimeRow(state=state, at=at) for state, at in first.items())


def platforms(connection: Connection, served: dict[str, Stage], assembly: Assembly) -> tuple[PlatformRow, ...]:
    """The platforms on which the artefacts of an assembly were trained, each with its stages."""
    return _of_served(connection, PlatformRow, LIST_PLATFORMS, served, assembly)


def _of_served(
    connection: Connection, kind: type[Any], query: LiteralString, served: dict[str, Stage], assembly: Assembly
) -> tuple[Any, ...]:
    digests = sorted({digest for member in assembly.members if member for digest in member.artifacts})
    return _rows(connection, kind, query, {"stage_keys": list(served), "digests": digests})
