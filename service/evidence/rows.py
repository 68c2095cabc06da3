"""The evidence behind a deletion certificate and its supplements: committed rows, flat, nothing computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from shards.stages import CellRoot, Stage


class EvidenceError(ValueError):
    """The rows do not make a statement; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectRow:
    """One object of the artefact store that had to go; its row in `artifact`."""

    object_name: str
    digest: str | None
    """None for an object whose upload was never finished."""
    destroyed_at: datetime | None
    absent_at: datetime | None
    """The last look that found it absent (`checked_at`); the first was at `destroyed_at`."""
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
    """A deleted record, as its tombstone keeps it, and the cell that it lay in."""

    record_id: UUID
    commitment: bytes
    shard: int
    slice: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRow:
    """One manifest of a cell, whole: Merkle paths are made of it."""

    shard: int
    slice: int
    root: str
    commitments: tuple[bytes, ...]
    """Sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformRow:
    """A platform, and which of the served stages were trained on it."""

    fingerprint: str
    fields: Mapping[str, str]
    stages: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRow:
    """The newest replay of a served artefact that has ended."""

    stage: str
    digest: str
    outcome: str
    at: datetime
    platform: str | None
    """Fingerprint of where it was trained again; None where it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryRow:
    """An event in the ledger."""

    index: int
    leaf: bytes
    opening: bytes
    path: tuple[bytes, ...]
    """Merkle path to the root of the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRows:
    """The events behind a statement, under one published tree head."""

    checkpoint: str
    entries: tuple[EntryRow, ...]
    consistency: tuple[bytes, ...] = ()
    """In a supplement: from the tree head of the statement before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRow:
    """Something that is not confirmed, or not over, when a statement is issued."""

    code: str
    name: str
    detail: str
    until: datetime | None = None


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
    manifests: tuple[ManifestRow, ...]
    """Those of the records' cells that tainted stages read, that served stages read, the last that held each record,
    and those before and after a rewrite."""
    platforms: tuple[PlatformRow, ...]
    replays: tuple[ReplayRow, ...] = ()
    ledger: LedgerRows
    tool_version: str
    issued_at: datetime
    key_backup_days: int | None = None
    """How long the operator states that backups of the key store are kept; None: nothing stated."""
    retrain_equal: bool = True
    """Whether training is known to give the same bits again; a command of the operator's own may not."""
    exports: tuple[tuple[str, str], ...] = ()
    """Id and description of each export that learnt the records and is not known to be withdrawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow:
    """A later look at every object of a certificate."""

    sweep: int
    """1 after a minute, 2 after an hour, 3 after a day."""
    objects: int
    absent_at: datetime
    """The look at the last of them."""
    reappeared: tuple[str, ...]
    """Names that were there again, and were destroyed again, since the look before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRow:
    """How an open memory release ended."""

    process_id: UUID
    how: str
    """`freed`, `ended` or `fenced_by_expiry`."""
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildRow:
    """The first version after a certificate with stages trained again."""

    version: int
    floor: int
    published_at: datetime
    assembly: Mapping[str, Any]
    stages: tuple[Stage, ...]
    platforms: tuple[PlatformRow, ...]
    manifests: tuple[ManifestRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftRow:
    """The end of a restriction."""

    at: datetime
    version: int | None
    """The version with the records' stages back; None where none was published for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """All that a supplement says."""

    certificate: str
    """Digest of the certificate's envelope."""
    number: int
    previous: str | None
    request_id: UUID
    model_name: str
    records: tuple[RecordRow, ...]
    """The certificate's, for the paths of a rebuild's manifests."""
    sweeps: tuple[SweepRow, ...] = ()
    processes: tuple[ProcessRow, ...] = ()
    exports: tuple[tuple[str, datetime], ...] = ()
    """Id and time of each withdrawal."""
    rebuild: RebuildRow | None = None
    lifted: LiftRow | None = None
    open_items: tuple[OpenRow, ...] = ()
    ledger: LedgerRows
    tool_version: str
    issued_at: datetime
