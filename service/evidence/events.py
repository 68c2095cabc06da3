"""Events: what is recorded of each step, with closed fields; none can hold an identifier or a caller's text."""

from enum import StrEnum
from typing import Any


class EventKind(StrEnum):
    """One kind per thing that can happen, `noun.verb` or `noun.state`."""

    REQUEST_RECEIVED = "request.received"
    TARGET_DEFERRED = "target.deferred"
    TARGET_DEACTIVATING = "target.deactivating"
    TARGET_DEACTIVATED = "target.deactivated"
    TARGET_ERASING = "target.erasing"
    TARGET_COMPLETED = "target.completed"
    TARGET_FAILED = "target.failed"
    TARGET_RETRIED = "target.retried"
    TARGET_LIFTED = "target.lifted"
    TARGET_REVOKED = "target.revoked"
    HOLD_PLACED = "hold.placed"
    HOLD_RELEASED = "hold.released"
    VERSION_PUBLISHED = "version.published"
    VERSION_CLEARED = "version.cleared"
    VERSION_GATED = "version.gated"
    VERSION_OVERRIDDEN = "version.overridden"
    VERSION_ROLLED_BACK = "version.rolled_back"
    VERSION_UNPINNED = "version.unpinned"
    CANARY_STARTED = "canary.started"
    CANARY_PROMOTED = "canary.promoted"
    CANARY_ABORTED = "canary.aborted"
    REPLICA_REGISTERED = "replica.registered"
    REPLICA_ACKNOWLEDGED = "replica.acknowledged"
    REPLICA_FENCED = "replica.fenced"
    REPLICA_ENDED = "replica.ended"
    ARTIFACT_DOOMED = "artifact.doomed"
    ARTIFACT_DESTROYED = "artifact.destroyed"
    ARTIFACT_LOST = "artifact.lost"
    ARTIFACT_REAPPEARED = "artifact.reappeared"
    ARTIFACT_QUARANTINED = "artifact.quarantined"
    CELL_INGESTED = "cell.ingested"
    CELL_ERASED = "cell.erased"
    MODEL_POLICY = "model.policy_changed"
    MODEL_MIN_SHARDS = "model.min_shards_changed"
    MODEL_ANSWERS = "model.answers_changed"
    MODEL_GATE = "model.gate_changed"
    MODEL_CANARY = "model.canary_changed"
    MODEL_REPRODUCIBLE = "model.reproducible"
    REBUILD_SCHEDULED = "rebuild.scheduled"
    STAGE_QUEUED = "stage.queued"
    STAGE_TRAINED = "stage.trained"
    STAGE_CANCELLED = "stage.cancelled"
    STAGE_FAILED = "stage.failed"
    STAGE_REFUSED = "stage.refused"
    STAGE_MISMATCH = "stage.digest_mismatch"
    STAGE_REPLAY_EQUAL = "stage.replay_equal"
    STAGE_REPLAY_MISMATCH = "stage.replay_mismatch"
    STAGE_REPLAY_OTHER_PLATFORM = "stage.replay_other_platform"
    STAGE_REPLAY_SKIPPED = "stage.replay_skipped"
    STAGE_REPLAY_FAILED = "stage.replay_failed"
    STAGE_REPLAY_RELEASED = "stage.replay_released"
    EXPORT_CREATED = "export.created"
    EXPORT_WITHDRAWN = "export.withdrawn"
    CHALLENGE_OPENED = "challenge.opened"
    AUDIT_EXPORTED = "audit.exported"
    AUDIT_EXPORT_ENDED = "audit.export_ended"
    CERTIFICATE_ISSUED = "certificate.issued"
    CERTIFICATE_SUPPLEMENTED = "certificate.supplemented"
    INGESTION_REFUSED = "ingestion.refused"
    LEDGER_OPENINGS_ERASED = "ledger.openings_erased"
    ROWS_CHANGED = "rows.changed"
    """Rows as they are after a step, written by triggers: what a restore applies. The other kinds change nothing."""
    ATTEMPT_REFUSED = "attempt.refused"
    DATASET_DECLARED = "dataset.declared"
    MODEL_DECLARED = "model.declared"
    REBUILD_REQUESTED = "rebuild.requested"
    API_KEY_CREATED = "api_key.created"
    API_KEY_REVOKED = "api_key.revoked"
    DO_NOT_TRAIN_LIFTED = "do_not_train.lifted"
    DO_NOT_TRAIN_ENDED = "do_not_train.ended"
    CERTIFICATES_ERASED = "certificate.erased_by_age"
    KEY_ROTATED = "key.rotated"
    RESTORE_LEAF_LOST = "restore.leaf_lost"
    RESTORE_LOSS_ACCEPTED = "restore.loss_accepted"
    RESTORE_COMPLETED = "restore.completed"


FIELDS: dict[EventKind, frozenset[str]] = {
    EventKind.REQUEST_RECEIVED: frozenset({"kind", "subject_commitment", "actor", "models"}),
    EventKind.TARGET_DEFERRED: frozenset({"until", "records", "stages"}),
    EventKind.TARGET_DEACTIVATING: frozenset({"version", "records", "stages"}),
    EventKind.TARGET_DEACTIVATED: frozenset({"version"}),
    EventKind.TARGET_ERASING: frozenset({"artifacts"}),
    EventKind.TARGET_COMPLETED: frozenset({"outcome"}),
    EventKind.TARGET_FAILED: frozenset({"error", "attempts"}),
    EventKind.TARGET_RETRIED: frozenset({"actor", "state"}),
    EventKind.TARGET_LIFTED: frozenset({"actor", "reason_code", "records", "version"}),
    EventKind.TARGET_REVOKED: frozenset({"actor", "reason_code", "records", "version"}),
    EventKind.HOLD_PLACED: frozenset({"hold_id", "actor", "reason_code"}),
    EventKind.HOLD_RELEASED: frozenset({"hold_id", "actor", "reason_code"}),
    EventKind.VERSION_PUBLISHED: frozenset({"version", "floor", "assembly", "cause", "canonical"}),
    EventKind.VERSION_CLEARED: frozenset({"floor", "acknowledged", "fenced"}),
    EventKind.VERSION_GATED: frozenset({"assembly", "base", "verdict", "score", "base_score", "rows", "error"}),
    EventKind.VERSION_OVERRIDDEN: frozenset({"assembly", "actor", "reason_code"}),
    EventKind.VERSION_ROLLED_BACK: frozenset({"version", "of", "actor", "reason_code"}),
    EventKind.VERSION_UNPINNED: frozenset({"version", "actor", "reason_code"}),
    EventKind.CANARY_STARTED: frozenset({"version", "stable", "share", "until"}),
    EventKind.CANARY_PROMOTED: frozenset({"version", "actor", "reason_code"}),
    EventKind.CANARY_ABORTED: frozenset({"version", "actor", "reason_code"}),
    EventKind.REPLICA_REGISTERED: frozenset({"process_id", "covers"}),
    EventKind.REPLICA_ACKNOWLEDGED: frozenset({"process_id", "covers"}),
    EventKind.REPLICA_FENCED: frozenset({"process_id", "floor"}),
    EventKind.REPLICA_ENDED: frozenset({"process_id"}),
    EventKind.ARTIFACT_DOOMED: frozenset({"object_name", "digest"}),
    EventKind.ARTIFACT_DESTROYED: frozenset({"object_name", "digest", "absent_at"}),
    EventKind.ARTIFACT_LOST: frozenset({"object_name", "digest"}),
    EventKind.ARTIFACT_REAPPEARED: frozenset({"object_name", "digest"}),
    EventKind.ARTIFACT_QUARANTINED: frozenset({"object_name", "digest"}),
    EventKind.CELL_INGESTED: frozenset({"shard", "slice", "generation", "root", "rows"}),
    EventKind.CELL_ERASED: frozenset({"shard", "slice", "generation", "root", "rows", "records"}),
    EventKind.MODEL_POLICY: frozenset({"actor", "policy"}),
    EventKind.MODEL_MIN_SHARDS: frozenset({"actor", "min_shards"}),
    EventKind.MODEL_ANSWERS: frozenset({"actor", "answers"}),
    EventKind.MODEL_GATE: frozenset({"actor", "gate"}),
    EventKind.MODEL_CANARY: frozenset({"actor", "canary"}),
    EventKind.MODEL_REPRODUCIBLE: frozenset({"stage", "digests", "fingerprint"}),
    EventKind.REBUILD_SCHEDULED: frozenset({"start", "stages", "work"}),
    EventKind.STAGE_QUEUED: frozenset({"stages"}),
    EventKind.STAGE_TRAINED: frozenset({"stage", "digest", "fingerprint"}),
    EventKind.STAGE_CANCELLED: frozenset({"stage"}),
    EventKind.STAGE_FAILED: frozenset({"stage", "error", "attempts"}),
    EventKind.STAGE_REFUSED: frozenset({"stage", "reason"}),
    EventKind.STAGE_MISMATCH: frozenset({"stage", "digests", "fingerprint"}),
    EventKind.STAGE_REPLAY_EQUAL: frozenset({"stage", "digest", "fingerprint"}),
    EventKind.STAGE_REPLAY_MISMATCH: frozenset({"stage", "digest", "replayed", "fingerprint", "artifacts"}),
    EventKind.STAGE_REPLAY_OTHER_PLATFORM: frozenset({"stage", "digest", "fingerprint", "platform", "differs"}),
    EventKind.STAGE_REPLAY_SKIPPED: frozenset({"stage", "digest", "reason"}),
    EventKind.STAGE_REPLAY_FAILED: frozenset({"stage", "digest", "error"}),
    EventKind.STAGE_REPLAY_RELEASED: frozenset({"stage", "replay", "actor"}),
    EventKind.EXPORT_CREATED: frozenset({"export_id", "version", "assembly", "digest", "actor"}),
    EventKind.EXPORT_WITHDRAWN: frozenset({"export_id", "actor"}),
    EventKind.CHALLENGE_OPENED: frozenset({"challenge_id", "version", "size", "witness", "stages", "actor"}),
    EventKind.AUDIT_EXPORTED: frozenset({"export_id", "actor", "format", "what", "since", "until", "about"}),
    EventKind.AUDIT_EXPORT_ENDED: frozenset({"export_id", "digest", "bytes", "whole"}),
    EventKind.CERTIFICATE_ISSUED: frozenset({"digest"}),
    EventKind.CERTIFICATE_SUPPLEMENTED: frozenset({"certificate", "number", "digest"}),
    EventKind.INGESTION_REFUSED: frozenset({"lines", "reason"}),
    EventKind.LEDGER_OPENINGS_ERASED: frozenset({"openings", "days"}),
    EventKind.ROWS_CHANGED: frozenset({"changes"}),
    EventKind.ATTEMPT_REFUSED: frozenset({"attempt", "reason", "actor"}),
    EventKind.DATASET_DECLARED: frozenset({"dataset_id", "actor"}),
    EventKind.MODEL_DECLARED: frozenset({"recipe", "actor"}),
    EventKind.REBUILD_REQUESTED: frozenset({"actor"}),
    EventKind.API_KEY_CREATED: frozenset({"prefix", "scopes"}),
    EventKind.API_KEY_REVOKED: frozenset({"prefix"}),
    EventKind.DO_NOT_TRAIN_LIFTED: frozenset({"entries", "actor", "reason_code"}),
    EventKind.DO_NOT_TRAIN_ENDED: frozenset({"entries"}),
    EventKind.CERTIFICATES_ERASED: frozenset({"certificates", "days"}),
    EventKind.KEY_ROTATED: frozenset({"old", "new", "statement"}),
    EventKind.RESTORE_LEAF_LOST: frozenset({"of"}),
    EventKind.RESTORE_LOSS_ACCEPTED: frozenset({"size", "root", "leaves", "openings", "refused"}),
    EventKind.RESTORE_COMPLETED: frozenset(
        {
            "database",
            "files",
            "high_water",
            "replayed",
            "redestroyed",
            "lost",
            "strays",
            "stages",
            "recovered",
            "records",
        }
    ),
}


def event_body(kind: EventKind, fields: dict[str, Any]) -> dict[str, Any]:
    """The body to record.

    Raises:
        ValueError: a field that the kind does not have, or one that is missing.
    """
    if fields.keys() != FIELDS[kind]:
        raise ValueError(f"{kind} has the fields {sorted(FIELDS[kind])}, not {sorted(fields)}")
    return fields
