"""The evidence behind a deletion certificate: committed rows, flat, nothing computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from shards.stages import CellRoot, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRow:
    """One object of the artefact store that had to go; its row in `artifact`."""

    object_name: str
    digest: str | None
    """None for an object whose upload was never finished."""
    destroyed_at: datetime | None
    absent_at: datetime | None
    """The last look that found it absent (`checked_at`); not before `destroyed_at`."""
    stage_key: str | None = None
    """The tainted stage that it belongs to; None for a cell's payloads."""
    shard: int | None = None
    slice: int | None = None
    """The cell whose payloads it held; None for a stage's artefact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRow:
    """A cell that was written again without the deleted records."""

    shard: int
    slice: int
    before: str
    """Root of the last manifest with a deleted record (generation `tombstone.removed` - 1)."""
    after: str
    """Root of the first manifest without (generation `tombstone.removed`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRow:
    """A deleted record, as its tombstone keeps it."""

    record_id: UUID
    commitment: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeRow:
    """When the target first entered a state."""

    state: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRow:
    """What became of one model server process that could have answered from a tainted stage."""

    process_id: UUID
    covers: int
    """Lowest version that it may still answer from."""
    how: str
    """`acknowledged`, `fenced_by_expiry` (its lease ran out) or `ended` (it said so itself)."""
    at: datetime
    """When; not after `deactivated`."""
    freed: bool
    """Whether it has reported that no tainted weight is left in its memory."""
    freed_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that a certificate says, as committed rows; one target (request and model)."""

    request_id: UUID
    kind: str
    regime: str | None
    received_at: datetime
    due_at: datetime
    subject_commitment: bytes
    outcome: str
    """`erased` or `restricted`."""

    model_name: str
    recipe_digest: str
    engine: str = "s3t"
    backbone_digest: str | None
    """None: the model has no pretrained backbone."""
    provenance: str | None

    version_before: int
    """The version that the deactivation replaced; 0 where nothing was served."""
    assembly_before: str | None
    """Its assembly's digest; None for version 0."""
    version_after: int
    """The version that deactivated (`request_target.version`)."""
    floor: int
    """The model's floor, at least `version_after`."""
    assembly_after: Mapping[str, Any]
    """Body of the assembly of `version_after`."""
    served_stages: tuple[Stage, ...]
    """Every stage of that assembly and all their ancestors."""

    tainted_stages: tuple[Stage, ...]
    """Every stage of the model whose lineage holds a manifest in `touched`, whatever became of it."""
    tainted_objects: tuple[ObjectRow, ...]
    """All artefact rows of those stages, each with its `stage_key`."""
    touched: tuple[CellRoot, ...]
    """Every manifest that ever held a deleted record: generations `added` to `removed` - 1 of its cell."""
    cells: tuple[CellRow, ...]
    """Cells written again; none for a restriction."""
    records: tuple[RecordRow, ...]
    payloads: tuple[ObjectRow, ...]
    """Every file of the records' cells that may have held them, those of lost races too."""

    times: tuple[TimeRow, ...]
    replicas: tuple[ReplicaRow, ...]
    platforms: tuple[str, ...]
    """Fingerprints of the platforms on which the served stages were trained."""
    tool_version: str
    issued_at: datetime
    backup_retention_days: int | None = None
    """What the operator states for snapshots, base backups and WAL archives; None: nothing stated."""
    retrain_equal: bool = True
    """Whether training is known to give the same bits again; a command of the operator's own may not."""
    open_items: tuple[tuple[str, str], ...] = ()
    """Further (code, detail) pairs; unconfirmed memory releases are added by `build`."""
