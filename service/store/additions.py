"""What has become of a certificate's open ends: the rows behind its next supplement."""

import base64
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row

from service.evidence.rows import Addition, LiftRow, OpenRow, ProcessRow, RebuildRow, RecordRow, SweepRow
from service.store import evidence, manifests, models, told
from service.store.certificates import Certificate, Supplement
from service.store.database import Connection, get_time
from service.store.told import About
from shards.assembly import Assembly

# A restriction that was lifted has no other open ends any more: its records serve again.
LIST_DUE: LiteralString = """
SELECT o.request_id, o.model_id, max(c.issued_at) AS issued_at
FROM certificate_open o
JOIN certificate c USING (request_id, model_id)
JOIN request_target t USING (request_id, model_id)
WHERE o.due_at <= clock_timestamp()
  AND t.state = CASE o.what WHEN 'lift' THEN 'lifted' ELSE 'completed' END::deletion_state AND CASE o.what
    WHEN 'process' THEN EXISTS (
        SELECT FROM lease l WHERE l.process_id = o.name::uuid
           AND (l.freed >= t.version OR l.freed_at IS NOT NULL OR l.ended_at > c.issued_at))
    WHEN 'export' THEN EXISTS (SELECT FROM export e WHERE e.export_id = o.name::uuid AND e.withdrawn_at IS NOT NULL)
    WHEN 'rebuild' THEN EXISTS (
        SELECT FROM model_version v
        WHERE v.model_id = o.model_id AND v.version > t.version AND v.cause = 'rebuild')
    ELSE true END
GROUP BY o.request_id, o.model_id
ORDER BY min(o.due_at), o.request_id, o.model_id
LIMIT %(limit)s::int
"""
LIST_SWEEPS: LiteralString = """
SELECT o.name::int AS sweep FROM certificate_open o
WHERE o.request_id = %(request_id)s::uuid AND o.model_id = %(model_id)s::bigint AND o.what = 'sweep'
  AND o.due_at <= clock_timestamp()
ORDER BY sweep
"""
GET_SWEPT: LiteralString = """
SELECT count(*) AS objects, coalesce(min(a.sweeps), 3) AS sweeps, max(a.checked_at) AS absent_at
FROM artifact a WHERE a.object_name = ANY(%(object_names)s::text[]) AND a.state = 'destroyed'
"""
LIST_REAPPEARED: LiteralString = """
SELECT DISTINCT body ->> 'object_name' AS object_name FROM event_pending
WHERE kind = 'artifact.reappeared' AND body ->> 'object_name' = ANY(%(object_names)s::text[])
  AND created_at > %(since)s::timestamptz
"""
LIST_PROCESSES: LiteralString = """
SELECT l.process_id,
       CASE WHEN l.freed >= t.version OR l.freed_at IS NOT NULL THEN 'freed'
            WHEN EXISTS (SELECT FROM event_pending e WHERE e.kind LIKE 'replica.%%' AND e.kind = 'replica.fenced'
                            AND e.body ->> 'process_id' = l.process_id::text) THEN 'fenced_by_expiry'
            ELSE 'ended' END AS how,
       coalesce(CASE WHEN l.freed >= t.version AND l.ended_at IS NULL THEN clock_timestamp() END,
                l.freed_at, l.ended_at, clock_timestamp()) AS at
FROM certificate_open o
JOIN certificate c USING (request_id, model_id)
JOIN request_target t USING (request_id, model_id)
JOIN lease l ON l.process_id = o.name::uuid
WHERE o.what = 'process' AND o.request_id = %(request_id)s::uuid AND o.model_id = %(model_id)s::bigint
  AND (l.freed >= t.version OR l.freed_at IS NOT NULL OR l.ended_at > c.issued_at)
"""
LIST_EXPORTS: LiteralString = """
SELECT e.export_id::text AS name, e.withdrawn_at AS at
FROM certificate_open o JOIN export e ON e.export_id = o.name::uuid
WHERE o.what = 'export' AND o.request_id = %(request_id)s::uuid AND o.model_id = %(model_id)s::bigint
  AND e.withdrawn_at IS NOT NULL
"""
FIND_REBUILT: LiteralString = """
SELECT v.version, m.floor, e.created_at AS published_at
FROM certificate_open o
JOIN request_target t USING (request_id, model_id)
JOIN model m USING (model_id)
JOIN model_version v ON v.model_id = o.model_id AND v.version > t.version AND v.cause = 'rebuild'
JOIN event_pending e ON e.kind = 'version.published' AND e.model_id = v.model_id
     AND (e.body ->> 'version')::bigint = v.version
WHERE o.what = 'rebuild' AND o.request_id = %(request_id)s::uuid AND o.model_id = %(model_id)s::bigint
ORDER BY v.version
LIMIT 1
"""
FIND_LIFTED: LiteralString = """
SELECT e.created_at AS at, (e.body ->> 'version')::bigint AS version
FROM certificate_open o
JOIN request_target t USING (request_id, model_id)
JOIN event_pending e USING (request_id, model_id)
WHERE o.what = 'lift' AND o.request_id = %(request_id)s::uuid AND o.model_id = %(model_id)s::bigint
  AND t.state = 'lifted' AND e.kind = 'target.lifted'
ORDER BY e.id DESC
LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Due:
    """A certificate with something to add."""

    request_id: UUID
    model_id: int
    issued_at: datetime


@dataclass(frozen=True, slots=True)
class _Swept:
    objects: int
    sweeps: int
    absent_at: datetime | None


@dataclass(frozen=True, slots=True)
class _Number:
    sweep: int


@dataclass(frozen=True, slots=True)
class _Name:
    object_name: str


@dataclass(frozen=True, slots=True)
class _Withdrawn:
    name: str
    at: datetime


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    version: int
    floor: int
    published_at: datetime


def list_due(connection: Connection, *, limit: int = 100) -> list[Due]:
    """Certificates whose open ends have an answer, or whose next sweep is due."""
    with connection.cursor(row_factory=class_row(Due)) as cursor:
        return cursor.execute(LIST_DUE, {"limit": limit}).fetchall()


def get_addition(
    connection: Connection, certificate: Certificate, before: list[Supplement], request_id: UUID, *, checkpoint: str
) -> Addition | None:
    """What is to be said next of a certificate; None when there is nothing, or its events are not published yet."""
    said = _said(certificate.envelope)
    last = _said(before[-1].envelope) if before else said
    at: dict[str, Any] = {"request_id": request_id, "model_id": certificate.model_id}
    lifted = next(iter(_list(connection, LiftRow, FIND_LIFTED, at)), None)
    names = _objects(said)
    since = before[-1].issued_at if before else certificate.issued_at
    sweeps = _sweeps(connection, at, names, since)
    processes: list[ProcessRow] = _list(connection, ProcessRow, LIST_PROCESSES, at)
    exports = [(row.name, row.at) for row in _list(connection, _Withdrawn, LIST_EXPORTS, at)]
    rebuild = _rebuild(connection, at)
    if lifted:  # what else was open of a restriction that is over concerns nobody
        processes, exports, rebuild = [], [], None
    if not (sweeps or processes or exports or rebuild or lifted):
        return None
    about = About(
        request_id=request_id,
        model_id=certificate.model_id,
        kinds=["certificate.issued", "certificate.supplemented", "target.lifted"],
        version=rebuild.version if rebuild else None,
        reappeared=list(sweeps[-1].reappeared) if sweeps else [],
        since=since,
        processes=[str(row.process_id) for row in processes],
        exports=[name for name, _ in exports],
    )
    ledger = told.find_ledger(connection, about, checkpoint, since=last["ledger"]["checkpoint"])
    if ledger is None:
        return None
    issued_at = get_time(connection)
    closed = {str(row.process_id) for row in processes} | {name for name, _ in exports}
    if any(row.sweep == 3 for row in sweeps):
        closed.add("artefact store")
    return Addition(
        certificate=certificate.digest,
        number=len(before) + 1,
        previous=before[-1].digest if before else None,
        request_id=request_id,
        model_name=certificate.model,
        records=_records(said),
        sweeps=tuple(sweeps),
        processes=tuple(processes),
        exports=tuple(exports),
        rebuild=rebuild,
        lifted=lifted,
        open_items=() if lifted else tuple(_still_open(last["open_items"], closed, issued_at)),
        ledger=ledger,
        tool_version=evidence.TOOL_VERSION,
        issued_at=issued_at,
    )


def _sweeps(connection: Connection, at: dict[str, Any], names: list[str], since: datetime) -> list[SweepRow]:
    """The sweeps that every object has had, the last of them with what had appeared again."""
    due = [row.sweep for row in _list(connection, _Number, LIST_SWEEPS, at)]
    if not due:
        return []
    (swept,) = _list(connection, _Swept, GET_SWEPT, {"object_names": names})
    done = [number for number in due if number <= swept.sweeps]
    if not done or swept.objects < len(names) or (names and swept.absent_at is None):
        return []
    again = _list(connection, _Name, LIST_REAPPEARED, {"object_names": names, "since": since})
    absent_at = swept.absent_at or get_time(connection)
    return [
        SweepRow(
            sweep=number,
            objects=len(names),
            absent_at=absent_at,
            reappeared=tuple(row.object_name for row in again) if number == done[-1] else (),
        )
        for number in done
    ]


def _rebuild(connection: Connection, at: dict[str, Any]) -> RebuildRow | None:
    found = _list(connection, _Rebuilt, FIND_REBUILT, at)
    if not found:
        return None
    model = models.get_model_by_id(connection, at["model_id"])
    version = models.find_version(connection, model.model_id, found[0].version)
    if version is None:
        return None
    assembly = Assembly.from_json(version.body)
    served = evidence.with_ancestors(connection, assembly, model.recipe_digest)
    return RebuildRow(
        version=version.version,
        floor=found[0].floor,
        published_at=found[0].published_at,
        assembly=assembly.to_json(),
        stages=tuple(served.values()),
        platforms=evidence.platforms(connection, served, assembly),
        manifests=manifests.list_manifests(  # of all its records: restricted ones may have been erased since
            connection, at["request_id"], model.dataset_id, "erased", served, stages_only=True
        ),
    )


def _said(envelope: dict[str, Any]) -> dict[str, Any]:
    """The predicate of a statement that this installation signed."""
    return json.loads(base64.b64decode(envelope["payload"]))["predicate"]


def _objects(said: dict[str, Any]) -> list[str]:
    listed = [*said["payloads"], *(each for entry in said["tainted"] for each in entry["artifacts"])]
    return [entry["object_name"] for entry in listed]


def _records(said: dict[str, Any]) -> tuple[RecordRow, ...]:
    return tuple(
        RecordRow(
            record_id=UUID(entry["record_id"]),
            commitment=bytes.fromhex(entry["commitment"]),
            shard=entry["shard"],
            slice=entry["slice"],
        )
        for entry in said["records"]
    )


def _still_open(items: list[dict[str, Any]], closed: set[str], now: datetime) -> list[OpenRow]:
    rows: list[OpenRow] = []
    for item in items:
        until = datetime.fromisoformat(item["until"]) if item["until"] else None
        over = item["code"] == "backups" and until is not None and until < now
        if item["name"] not in closed and not over:
            rows.append(OpenRow(code=item["code"], name=item["name"], detail=item["detail"], until=until))
    return rows


def _list(connection: Connection, kind: type[Any], query: LiteralString, values: dict[str, Any]) -> list[Any]:
    with connection.cursor(row_factory=class_row(kind)) as cursor:
        return cursor.execute(query, values).fetchall()
