"""The register of exports: which assembly went where, and whether a deletion has tainted it since."""

from dataclasses import dataclass
from datetime import datetime
from typing import LiteralString
from uuid import UUID, uuid4

from psycopg.rows import class_row

from service.domain.errors import ConflictError, NotFoundError
from service.evidence.events import EventKind
from service.store import events, models, stages
from service.store.artifacts import ArtifactMissingError, Artifacts
from service.store.database import Connection
from service.store.models import Model
from service.store.stages import HOLDS, TAINTED_CELL
from shards import merged
from shards.assembly import Assembly
from shards.digest import sha256_hex
from shards.errors import ArtifactDigestError

INSERT: LiteralString = """
INSERT INTO export (export_id, model_id, version, assembly, digest, recipient, created_by)
VALUES (%(export_id)s::uuid, %(model_id)s::bigint, %(version)s::bigint, %(assembly)s::text, %(digest)s::text,
        %(recipient)s::text, %(created_by)s::text)
"""
LIST: LiteralString = (
    """
SELECT e.export_id, m.name AS model, e.version, e.assembly, e.digest, e.recipient, e.created_at, e.withdrawn_at,
       EXISTS (SELECT FROM assembly a
               CROSS JOIN LATERAL jsonb_array_elements(a.body -> 'members') AS member
               JOIN stage_cell sc ON sc.stage_key = member ->> 'stage'
               WHERE a.digest = e.assembly AND ("""
    + TAINTED_CELL
    + """)) AS tainted
FROM export e
JOIN model m ON m.model_id = e.model_id
WHERE (%(model_id)s::bigint IS NULL OR e.model_id = %(model_id)s::bigint)
  AND (%(before)s::timestamptz IS NULL
       OR (e.created_at, e.export_id) < (%(before)s::timestamptz, %(before_id)s::uuid))
ORDER BY e.created_at DESC, e.export_id DESC
LIMIT %(limit)s::int
"""
)
MARK_WITHDRAWN: LiteralString = """
UPDATE export SET withdrawn_at = clock_timestamp(), withdrawn_by = %(actor)s::text
WHERE export_id = %(export_id)s::uuid AND withdrawn_at IS NULL
RETURNING export_id, model_id
"""
EXISTS: LiteralString = "SELECT export_id, model_id FROM export WHERE export_id = %(export_id)s::uuid"
# By lineage and not by the plan's stages: one that an earlier erasure has destroyed lives on in what was handed out.
LIST_OPEN: LiteralString = (
    """
SELECT e.export_id, e.version, e.recipient, e.created_at
FROM export e
WHERE e.model_id = %(model_id)s::bigint AND e.withdrawn_at IS NULL
  AND EXISTS (
      SELECT FROM assembly a
      CROSS JOIN LATERAL jsonb_array_elements(a.body -> 'members') AS member
      JOIN stage_cell sc ON sc.stage_key = member ->> 'stage'
      JOIN tombstone t ON t.cell_id = sc.cell_id AND t.lifted_at IS NULL
           AND """
    + HOLDS
    + """
      JOIN deletion_request_record q ON q.record_id = t.record_id AND q.request_id = %(request_id)s::uuid
      WHERE a.digest = e.assembly)
ORDER BY e.created_at, e.export_id
"""
)


@dataclass(frozen=True, slots=True)
class Export:
    """One file that was handed out."""

    export_id: UUID
    model: str
    version: int
    assembly: str
    digest: str
    recipient: str
    created_at: datetime
    withdrawn_at: datetime | None
    tainted: bool
    """A stage in it was trained on a record that is out of service now: it has to be withdrawn."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a model serves, and where its stages' files lie."""

    model: Model
    version: int
    assembly: Assembly
    objects: dict[str, str]
    """Object name by artefact digest."""


@dataclass(frozen=True, slots=True)
class Files:
    """A merged adapter as files of a peft adapter directory."""

    version: int
    assembly: str
    digest: str
    """SHA-256 of the weight file."""
    weights: bytes
    config: bytes


@dataclass(frozen=True, slots=True)
class _Row:
    export_id: UUID
    model_id: int


@dataclass(frozen=True, slots=True)
class _OpenRow:
    export_id: UUID
    version: int
    recipient: str
    created_at: datetime


def get_served(connection: Connection, name: str) -> Served:
    """What the newest version of a model serves.

    Raises:
        NotFoundError: there is no such model.
        ConflictError: the engine's stages are no adapters, or nothing is served.
    """
    model = models.get_model(connection, name)
    recipe = model.parsed_recipe
    if recipe.engine != "s3t":
        raise ConflictError(f"a model of engine {recipe.engine} has no adapters to merge; export one of engine s3t")
    version = models.find_version(connection, model.model_id, model.version)
    assembly = Assembly.from_json(version.body) if version else None
    if version is None or assembly is None or not any(assembly.members):
        raise ConflictError("the model serves no stage: train it, or wait for its rebuild, then export again")
    objects = stages.list_open(connection, model.model_id, model.recipe_digest).objects
    return Served(model, version.version, assembly, objects)


def merge_served(artifacts: Artifacts, served: Served) -> Files:
    """A served assembly as one adapter. Takes seconds for large models: never inside a transaction.

    Raises:
        ConflictError: a stage of it has gone out of service meanwhile.
        ArtifactDigestError: a file is damaged.
    """
    recipe = served.model.parsed_recipe
    lines = [
        [merged.tensors_of(_verified(artifacts, served.objects, digest)) for digest in member.artifacts]
        for member in served.assembly.members
        if member
    ]
    tensors = merged.merge(lines, merged.lora_scale(recipe))
    weights = merged.adapter_bytes(tensors)
    config = merged.adapter_config(recipe, tensors)
    return Files(served.version, served.assembly.digest, sha256_hex(weights), weights, config)


def insert_export(connection: Connection, served: Served, files: Files, *, recipient: str, actor: str) -> UUID:
    """Enter a file into the register before it leaves.

    Raises:
        ConflictError: a deletion has put its version out of service meanwhile, or waits for its replacement.
    """
    model = models.share_model(connection, served.model.model_id)
    if files.version < model.floor:
        raise ConflictError("a deletion came between and put this version out of service: export again")
    if stages.list_touched(connection, [member.stage for member in served.assembly.members if member]):
        raise ConflictError(
            "a record that a served stage was trained on is being deleted, and no file with it may leave: export again"
            " when the next version serves"
        )
    export_id = uuid4()
    connection.execute(
        INSERT,
        {
            "export_id": export_id,
            "model_id": model.model_id,
            "version": files.version,
            "assembly": files.assembly,
            "digest": files.digest,
            "recipient": recipient,
            "created_by": actor,
        },
    )
    events.append(
        connection,
        EventKind.EXPORT_CREATED,
        model_id=model.model_id,
        export_id=str(export_id),
        version=files.version,
        assembly=files.assembly,
        digest=files.digest,
        actor=actor,
    )
    return export_id


def list_exports(
    connection: Connection, model_id: int | None, *, before: tuple[datetime, UUID] | None, limit: int
) -> list[Export]:
    """The register, newest first, from behind the export that `before` names."""
    moment, export_id = before or (None, None)
    values = {"model_id": model_id, "before": moment, "before_id": export_id, "limit": limit}
    with connection.cursor(row_factory=class_row(Export)) as cursor:
        return cursor.execute(LIST, values).fetchall()


def mark_withdrawn(connection: Connection, export_id: UUID, *, actor: str) -> None:
    """Record an operator's word that the recipient holds the file no more; again is no error.

    Raises:
        NotFoundError: there is no such export.
    """
    values = {"export_id": export_id, "actor": actor}
    with connection.cursor(row_factory=class_row(_Row)) as cursor:
        row = cursor.execute(MARK_WITHDRAWN, values).fetchone()
        if row is None:
            if cursor.execute(EXISTS, {"export_id": export_id}).fetchone() is None:
                raise NotFoundError("there is no export of that id")
            return
    events.append(connection, EventKind.EXPORT_WITHDRAWN, model_id=row.model_id, export_id=str(export_id), actor=actor)


def open_items(connection: Connection, model_id: int, request_id: UUID) -> list[tuple[str, str]]:
    """Exports that learnt the request's records and are not known to be withdrawn: id and description."""
    values = {"model_id": model_id, "request_id": request_id}
    with connection.cursor(row_factory=class_row(_OpenRow)) as cursor:
        rows = cursor.execute(LIST_OPEN, values).fetchall()
    return [(str(row.export_id), _open_item(row)) for row in rows]


def _open_item(row: _OpenRow) -> str:
    handed = f"export {row.export_id} of version {row.version} to {row.recipient}, {row.created_at:%Y-%m-%d}"
    return f"{handed}: it holds a tainted stage, and the recipient has to destroy it"


def _verified(artifacts: Artifacts, objects: dict[str, str], digest: str) -> bytes:
    if digest not in objects:
        raise ConflictError("a served stage has just gone out of service: try again")
    try:
        data = artifacts.get(objects[digest])
    except ArtifactMissingError:
        raise ConflictError("a served stage has just gone out of service: try again") from None
    if sha256_hex(data) != digest:
        raise ArtifactDigestError(f"artefact {digest[:12]} is damaged: replay it, or train it again")
    return data
