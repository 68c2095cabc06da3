"""The rows behind a deletion certificate, read in one snapshot; nothing is computed here but their arrangement."""

from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from service.evidence.certificate import EvidenceError
from service.evidence.events import EventKind
from service.evidence.rows import CellRow, Evidence, ObjectRow, RecordRow, ReplicaRow, TimeRow
from service.store import events, models, stages, targets
from service.store.database import Connection
from shards.assembly import Assembly
from shards.stages import CellRoot, Stage

TOOL_VERSION = version("expunge")

GET_REQUEST: LiteralString = """
SELECT r.request_id, r.kind::text, r.regime, r.received_at, r.due_at, r.subject_commitment, r.created_at,
       t.version, t.plan, t.deactivated_at, clock_timestamp() AS issued_at
FROM request_target t JOIN deletion_request r ON r.request_id = t.request_id
WHERE t.request_id = %(request_id)s::uuid AND t.model_id = %(model_id)s::bigint AND t.erased_at IS NOT NULL
"""
LIST_RECORDS: LiteralString = """
SELECT t.record_id, t.commitment
FROM deletion_request_record q JOIN tombstone t ON t.record_id = q.record_id
WHERE q.request_id = %(request_id)s::uuid AND t.dataset_id = %(dataset_id)s::uuid
ORDER BY t.record_id
"""
LIST_TOUCHED: LiteralString = """
SELECT DISTINCT c.shard, c.slice, m.root
FROM deletion_request_record q
JOIN tombstone t ON t.record_id = q.record_id
JOIN cell c ON c.cell_id = t.cell_id
JOIN cell_manifest m ON m.cell_id = t.cell_id AND t.added <= m.generation AND m.generation < t.removed
WHERE q.request_id = %(request_id)s::uuid AND t.dataset_id = %(dataset_id)s::uuid
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
LIST_LEASES: LiteralString = """
SELECT l.process_id, l.covers, l.freed, l.freed_at, l.started_at, l.ended_at
FROM lease l
WHERE l.model_id = %(model_id)s::bigint AND l.started_at <= %(until)s::timestamptz
  AND (l.ended_at IS NULL OR l.ended_at >= %(since)s::timestamptz)
ORDER BY l.process_id
"""
LIST_REPLICA_EVENTS: LiteralString = """
SELECT id, event_id, kind, request_id, model_id, body, created_at
FROM event_pending
WHERE body ->> 'process_id' = ANY(%(processes)s::text[]) AND kind LIKE 'replica.%%'
  AND created_at <= %(until)s::timestamptz
ORDER BY id
"""
LIST_PLATFORMS: LiteralString = """
SELECT DISTINCT a.fingerprint FROM artifact a
WHERE a.stage_key = ANY(%(stage_keys)s::text[]) AND a.digest = ANY(%(digests)s::text[]) AND a.fingerprint IS NOT NULL
ORDER BY a.fingerprint
"""
INSERT_CERTIFICATE: LiteralString = """
INSERT INTO certificate (request_id, model_id, envelope, digest, issued_at)
VALUES (%(request_id)s::uuid, %(model_id)s::bigint, %(envelope)s::jsonb, %(digest)s::text, %(issued_at)s::timestamptz)
ON CONFLICT DO NOTHING
RETURNING digest
"""
MARK_COMPLETED: LiteralString = """
UPDATE request_target SET state = 'completed', outcome = 'erased', completed_at = clock_timestamp(), error = NULL
WHERE request_id = %(request_id)s::uuid AND model_id = %(model_id)s::bigint AND state = 'erasing'
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


@dataclass(frozen=True, slots=True)
class _Lease:
    process_id: UUID
    covers: int
    freed: int
    freed_at: datetime | None
    started_at: datetime
    ended_at: datetime | None


def get_evidence(connection: Connection, request_id: UUID, model_id: int) -> Evidence | None:
    """Evidence of an erased target, issued now by the database's clock; None when it is not erased.

    Raises:
        EvidenceError: a process that ran is unaccounted for.
    """
    at: dict[str, Any] = {"request_id": request_id, "model_id": model_id}
    with connection.cursor(row_factory=class_row(_Request)) as cursor:
        request = cursor.execute(GET_REQUEST, at).fetchone()
    if request is None:
        return None
    issued_at = request.issued_at
    model = models.get_model_by_id(connection, model_id)
    recipe = model.parsed_recipe
    at["dataset_id"] = model.dataset_id
    after = models.find_version(connection, model_id, request.version)
    before = models.find_version(connection, model_id, request.version - 1)
    assembly = Assembly.from_json(after.body) if after else Assembly(model.recipe_digest, (None,) * recipe.shards)
    served = _with_ancestors(connection, assembly, model.recipe_digest)
    tainted = stages.list_by_key(connection, request.plan["stages"], model.recipe_digest)
    return Evidence(
        request_id=request_id,
        kind=request.kind,
        regime=request.regime,
        received_at=request.received_at,
        due_at=request.due_at,
        subject_commitment=bytes(request.subject_commitment),
        outcome="erased",
        model_name=model.name,
        recipe_digest=model.recipe_digest,
        backbone_digest=recipe.backbone.digest,
        provenance=recipe.backbone.provenance,
        version_before=before.version if before else 0,
        assembly_before=before.assembly if before else None,
        version_after=request.version,
        floor=model.floor,
        assembly_after=assembly.to_json(),
        served_stages=tuple(served.values()),
        tainted_stages=tuple(tainted.values()),
        tainted_objects=_objects(connection, LIST_OBJECTS, {"stage_keys": list(tainted)}),
        touched=_rows(connection, CellRoot, LIST_TOUCHED, at),
        cells=_rows(connection, CellRow, LIST_CELLS, at),
        records=_rows(connection, RecordRow, LIST_RECORDS, at),
        payloads=_objects(connection, LIST_PAYLOADS, at),
        times=_times(connection, request, model_id, issued_at),
        replicas=_replicas(connection, model_id, request),
        platforms=_platforms(connection, served, assembly),
        tool_version=TOOL_VERSION,
        issued_at=issued_at,
    )


def insert_certificate(
    connection: Connection, evidence: Evidence, model_id: int, envelope: dict[str, Any], digest: str
) -> bool:
    """Store the certificate and complete its target; False when another worker has done it."""
    values: dict[str, Any] = {"request_id": evidence.request_id, "model_id": model_id}
    stored = connection.execute(
        INSERT_CERTIFICATE,
        {**values, "envelope": Jsonb(envelope), "digest": digest, "issued_at": evidence.issued_at},
    ).fetchone()
    if stored is None:
        return False
    connection.execute(MARK_COMPLETED, values)
    targets.refresh_requests(connection, [evidence.request_id])
    events.append(connection, EventKind.CERTIFICATE_ISSUED, digest=digest, **values)
    events.append(connection, EventKind.TARGET_COMPLETED, outcome="erased", **values)
    return True


def _with_ancestors(connection: Connection, assembly: Assembly, recipe: str) -> dict[str, Stage]:
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


def _times(connection: Connection, request: _Request, model_id: int, issued_at: datetime) -> tuple[TimeRow, ...]:
    """When the target first entered each state, from the events; the certificate itself makes it `completed`."""
    first: dict[str, datetime] = {"received": request.created_at}
    for event in events.list_of_request(connection, request.request_id):
        noun, _, state = event.kind.partition(".")
        if noun == "target" and event.model_id == model_id and state in {"deactivating", "deactivated", "erasing"}:
            first.setdefault(state, event.created_at)
    first["completed"] = issued_at
    return tuple(TimeRow(state=state, at=at) for state, at in first.items())


def _replicas(connection: Connection, model_id: int, request: _Request) -> tuple[ReplicaRow, ...]:
    """Per process that ran between plan and `deactivated`: how it came to answer from no tainted stage."""
    until = request.deactivated_at
    values: dict[str, Any] = {"model_id": model_id, "until": until, "since": request.created_at}
    leases = _rows(connection, _Lease, LIST_LEASES, values)
    values["processes"] = [str(lease.process_id) for lease in leases]
    with connection.cursor(row_factory=class_row(events.Event)) as cursor:
        told = cursor.execute(LIST_REPLICA_EVENTS, values).fetchall()
    how: dict[str, tuple[str, datetime]] = {}
    for event in told:
        process = event.body["process_id"]
        if process in how:
            continue
        if event.kind in {EventKind.REPLICA_REGISTERED, EventKind.REPLICA_ACKNOWLEDGED}:
            if event.body["covers"] >= request.version:
                how[process] = ("acknowledged", event.created_at)
        else:
            how[process] = (
                "fenced_by_expiry" if event.kind == EventKind.REPLICA_FENCED else "ended",
                event.created_at,
            )
    if any(str(lease.process_id) not in how for lease in leases):
        raise EvidenceError("a process ran during the deactivation and no event says what became of it")
    return tuple(
        ReplicaRow(
            process_id=lease.process_id,
            covers=lease.covers,
            how=how[str(lease.process_id)][0],
            at=how[str(lease.process_id)][1],
            freed=lease.freed >= request.version or lease.freed_at is not None,
            freed_at=lease.freed_at,
        )
        for lease in leases
    )


def _platforms(connection: Connection, served: dict[str, Stage], assembly: Assembly) -> tuple[str, ...]:
    digests = sorted({digest for member in assembly.members if member for digest in member.artifacts})
    with connection.cursor() as cursor:
        return tuple(
            str(row[0]) for row in cursor.execute(LIST_PLATFORMS, {"stage_keys": list(served), "digests": digests})
        )
