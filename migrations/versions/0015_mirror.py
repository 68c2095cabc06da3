"""Changes of state are events, whole: the ledger's files can rebuild the rows (docs/restore.md)."""

# ruff: noqa: S608 - names are constants of this file

from alembic import op

from migrations.mirror import mirror

revision = "0015"
down_revision = "0014"

REQUEST = "request_id kind state outcome subject_id subject_commitment regime received_at due_at created_at created_by"
TARGET = "request_id model_id state outcome version plan error deferred_until deactivated_at erased_at completed_at"
HOLD = "hold_id subject_id reason_code created_by created_at released_at"


def change(table: str, rows: str) -> str:
    """SQL of one of an event's changes."""
    return f"jsonb_build_object('table', '{table}', 'change', 'insert', 'rows', ({rows}))"


# Subjects that somebody asked about: who must stay refused after a restore, though who was ingested is not recorded.
SUBJECTS = ",\n        ".join(
    change(table, f"SELECT jsonb_agg(to_jsonb(s)) FROM {table} s WHERE s.subject_id = ANY(whom)")
    for table in ("subject", "subject_alias")
)
RECEIVED = f"""
-- A request comes with its targets, in one statement: so all of it is one event, since intake is the busiest write.
-- One plan for each statement, not one a call, and none that reads a whole table since that was small once.
CREATE FUNCTION mirror_received() RETURNS trigger LANGUAGE plpgsql
SET search_path = public, pg_temp SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
DECLARE targets jsonb; which uuid[]; requests jsonb; whom uuid[];
BEGIN
    IF current_setting('expunge.mode', true) = 'applying' THEN RETURN NULL; END IF;
    SELECT jsonb_agg(to_jsonb(n)), array_agg(n.request_id) INTO targets, which
    FROM (SELECT {TARGET.replace(" ", ", ")} FROM fresh) n;
    IF targets IS NULL THEN RETURN NULL; END IF;
    SELECT jsonb_agg(to_jsonb(n)), array_agg(n.subject_id) INTO requests, whom
    FROM (SELECT {REQUEST.replace(" ", ", ")} FROM deletion_request d WHERE d.request_id = ANY(which)) n;
    INSERT INTO event_pending (kind, body) VALUES ('rows.changed', jsonb_build_object('changes', jsonb_build_array(
        {SUBJECTS},
        {change("deletion_request", "requests")},
        {change("request_target", "targets")})));
    RETURN NULL;
END $$;
CREATE TRIGGER mirror_insert AFTER INSERT ON request_target REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION mirror_received();
CREATE FUNCTION mirror_held() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE holds jsonb; whom uuid[];
BEGIN
    IF current_setting('expunge.mode', true) = 'applying' THEN RETURN NULL; END IF;
    SELECT jsonb_agg(to_jsonb(n)), array_agg(n.subject_id) INTO holds, whom
    FROM (SELECT {HOLD.replace(" ", ", ")} FROM fresh) n;
    IF holds IS NULL THEN RETURN NULL; END IF;
    INSERT INTO event_pending (kind, body) VALUES ('rows.changed', jsonb_build_object('changes', jsonb_build_array(
        {SUBJECTS},
        {change("hold", "holds")})));
    RETURN NULL;
END $$;
CREATE TRIGGER mirror_insert AFTER INSERT ON hold REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION mirror_held();
"""

EVERY = ("INSERT", "UPDATE", "DELETE")
LATER = ("UPDATE", "DELETE")
"""Of tables whose new rows are in an event of `RECEIVED`."""
MIRRORED: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "dataset",
        "dataset_id name shards slices classes task input width deletable subject_row_cap created_at",
        "dataset_id",
        EVERY,
    ),
    ("prior_class", "dataset_id prior name slices expires", "dataset_id prior", EVERY),
    ("cell", "cell_id dataset_id shard slice generation object_name", "cell_id", EVERY),
    ("cell_manifest", "cell_id generation root rows created_at", "cell_id generation", EVERY),
    ("record", "record_id", "record_id", ("DELETE",)),
    ("subject_prior", "dataset_id subject_id", "dataset_id subject_id", ("DELETE",)),
    ("api_key", "prefix scopes created_at revoked_at", "prefix", EVERY),
    ("deletion_request", REQUEST, "request_id", LATER),
    ("deletion_request_record", "request_id record_id", "request_id record_id", EVERY),
    (
        "tombstone",
        "record_id dataset_id cell_id commitment added removed request_id created_at erased_at lifted_at",
        "record_id",
        EVERY,
    ),
    ("absence", "record_id removed returned", "record_id removed", EVERY),
    ("do_not_train", "entry_id subject_id dataset_id request_id since until lifted_at", "entry_id", EVERY),
    ("hold", HOLD, "hold_id", LATER),
    (
        "model",
        (
            "model_id name dataset_id evaluation_id recipe recipe_digest version floor cleared published_at"
            " erase_after created_at rebuild_policy min_shards reproducible deferring gate canary stable canary_until"
            " pinned answers"
        ),
        "model_id",
        EVERY,
    ),
    ("request_target", TARGET, "request_id model_id", LATER),
    ("deferral", "model_id record_id", "model_id record_id", EVERY),
    ("stage", "stage_key model_id shard prefix roots parent created_at gated", "stage_key", EVERY),
    ("stage_cell", "stage_key cell_id generation", "stage_key cell_id", EVERY),
    ("platform", "fingerprint body", "fingerprint", EVERY),
    (
        "artifact",
        (
            "object_name kind stage_key cell_id fingerprint parent_digest digest bytes state created_at doomed_at"
            " destroyed_at checked_at host"
        ),
        "object_name",
        EVERY,
    ),
    ("assembly", "digest body", "digest", EVERY),
    ("model_version", "model_id version assembly cause canonical created_at", "model_id version", EVERY),
    (
        "gate",
        "model_id assembly base policy state score base_score rows error created_at decided_at",
        "model_id assembly",
        EVERY,
    ),
    ("challenge", "challenge_id model_id version checkpoint witness stages created_at", "challenge_id", EVERY),
    (
        "replay",
        (
            "replay_id model_id stage_key digest fingerprint made_by drawn_on drawn_at platform found differs_at"
            " outcome reason started_at ended_at released_at challenge_id"
        ),
        "replay_id",
        EVERY,
    ),
    (
        "export",
        "export_id model_id version assembly digest created_by created_at withdrawn_by withdrawn_at",
        "export_id",
        EVERY,
    ),
)
"""Table, columns, key and changes; `service.store.mirror` applies them."""


def upgrade() -> None:
    op.execute(RECEIVED)
    for table, columns, key, changes in MIRRORED:
        op.execute(mirror(table, columns.split(), key.split(), changes))
