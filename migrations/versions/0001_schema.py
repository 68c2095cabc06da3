"""The first schema: subjects to records to cells to stages to versions, requests, leases, events.

What the columns mean and why each constraint stands is said beside them; the words are design.md's.
"""

from alembic import op

revision = "0001"
down_revision = None

ROLES = """
DO $$ BEGIN
    CREATE ROLE expunge_app LOGIN;
EXCEPTION WHEN duplicate_object THEN NULL;
END $$;
"""

ENUMS = """
CREATE TYPE deletion_kind AS ENUM ('erase', 'restrict', 'object');
CREATE TYPE deletion_state AS ENUM (
    'received', 'awaiting_identity', 'awaiting_approval', 'deactivating', 'deactivated', 'erasing', 'completed',
    'rejected', 'revoked', 'expired', 'duplicate', 'lifted', 'failed'
);
CREATE TYPE deletion_outcome AS ENUM ('erased', 'restricted', 'no_match', 'partial');
CREATE TYPE job_state AS ENUM ('queued', 'running', 'done', 'cancelled', 'failed');
CREATE TYPE artifact_kind AS ENUM ('stage', 'evaluation', 'cell');
CREATE TYPE artifact_state AS ENUM ('writing', 'live', 'doomed', 'destroyed', 'lost');
CREATE TYPE version_cause AS ENUM ('train', 'deactivate', 'rebuild', 'rollback');
"""

DATA = """
-- Which pepper and partition key this data was made with: with others every look-up would miss, silently.
CREATE TABLE key_check (
    name text PRIMARY KEY CHECK (name IN ('pepper', 'partition')),
    digest bytea NOT NULL CHECK (octet_length(digest) = 32)
);

CREATE TABLE subject (
    subject_id uuid PRIMARY KEY,  -- random: says nothing about the person, decides the cell
    created_at timestamptz NOT NULL DEFAULT now()
);

-- How callers name a subject. Only the keyed hash (pepper) of the normalised value is kept.
CREATE TABLE subject_alias (
    type text NOT NULL CHECK (type ~ '^[a-z][a-z0-9_]{0,31}$'),
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    subject_id uuid NOT NULL REFERENCES subject,
    PRIMARY KEY (type, digest)
);
CREATE INDEX subject_alias_subject ON subject_alias (subject_id);

CREATE TABLE dataset (
    dataset_id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
    shards int NOT NULL CHECK (shards BETWEEN 1 AND 4096),
    slices int NOT NULL CHECK (slices BETWEEN 1 AND 64),
    classes text[] NOT NULL CHECK (cardinality(classes) >= 2),
    deletable boolean NOT NULL,  -- false: an evaluation set, whose subjects cannot be deleted from it
    subject_row_cap int NOT NULL CHECK (subject_row_cap >= 1),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- A cell's generation counts its manifests; its payloads are one Parquet object (rule 23).
CREATE TABLE cell (
    cell_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    dataset_id uuid NOT NULL REFERENCES dataset,
    shard int NOT NULL,
    slice int NOT NULL,
    generation bigint NOT NULL DEFAULT 0,
    object_name text,  -- NULL while the cell is empty
    UNIQUE (dataset_id, shard, slice)
);
CREATE TABLE cell_manifest (
    cell_id bigint NOT NULL REFERENCES cell,
    generation bigint NOT NULL,
    root text NOT NULL CHECK (root ~ '^[0-9a-f]{64}$'),
    rows bigint NOT NULL CHECK (rows >= 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (cell_id, generation)
);

-- record_id is a keyed hash of the caller's id; the payload lies in the cell's object only.
-- The record is in manifest g of its cell iff added <= g and (removed is null or g < removed).
CREATE TABLE record (
    record_id uuid PRIMARY KEY,
    dataset_id uuid NOT NULL REFERENCES dataset,
    cell_id bigint NOT NULL REFERENCES cell,
    owner_id uuid NOT NULL REFERENCES subject,
    commitment bytea NOT NULL CHECK (octet_length(commitment) = 32),
    added bigint NOT NULL
);
CREATE INDEX record_cell ON record (cell_id);
CREATE INDEX record_owner ON record (owner_id, dataset_id);
CREATE TABLE record_subject (
    record_id uuid NOT NULL REFERENCES record ON DELETE CASCADE,
    subject_id uuid NOT NULL REFERENCES subject,
    PRIMARY KEY (record_id, subject_id)
);
CREATE INDEX record_subject_subject ON record_subject (subject_id);
"""

REQUESTS = """
CREATE TABLE api_key (
    prefix text PRIMARY KEY CHECK (prefix ~ '^[A-Za-z0-9]{8}$'),
    name text NOT NULL,
    secret_hash bytea NOT NULL CHECK (octet_length(secret_hash) = 32),
    scopes text[] NOT NULL CHECK (scopes <@ ARRAY[
        'deletion:write', 'deletion:read', 'deletion:approve', 'data:write', 'model:predict', 'model:admin',
        'audit:read'
    ]),
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);

CREATE TABLE deletion_request (
    request_id uuid PRIMARY KEY,
    kind deletion_kind NOT NULL,
    state deletion_state NOT NULL,  -- the least advanced target's
    outcome deletion_outcome,
    subject_id uuid REFERENCES subject,  -- NULL: no such subject, or a request by record ids
    subject_commitment bytea NOT NULL CHECK (octet_length(subject_commitment) = 32),
    regime text CHECK (regime IN ('gdpr', 'ccpa', 'voluntary')),
    reference text CHECK (reference ~ '^[A-Za-z0-9._:/#-]{1,200}$'),  -- the caller's ticket: no room for a name
    received_at timestamptz NOT NULL CHECK (received_at >= '2000-01-01'),
    due_at timestamptz NOT NULL CHECK (due_at > received_at),
    created_at timestamptz NOT NULL DEFAULT now(),
    created_by text NOT NULL REFERENCES api_key,
    CHECK ((outcome IS NULL) = (state <> 'completed'))
);
CREATE INDEX deletion_request_page ON deletion_request (created_at DESC, request_id DESC);
CREATE INDEX deletion_request_subject ON deletion_request (subject_id) WHERE subject_id IS NOT NULL;
CREATE INDEX deletion_request_state ON deletion_request (state, created_at DESC, request_id DESC);
CREATE TABLE deletion_request_record (
    request_id uuid NOT NULL REFERENCES deletion_request,
    record_id uuid NOT NULL,
    PRIMARY KEY (request_id, record_id)
);
CREATE INDEX deletion_request_record_record ON deletion_request_record (record_id);
CREATE INDEX deletion_request_open ON deletion_request (received_at)
    WHERE state NOT IN ('completed', 'rejected', 'revoked', 'expired', 'duplicate', 'lifted');

CREATE TABLE idempotency_key (
    api_key text NOT NULL REFERENCES api_key,
    key text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    body_digest bytea NOT NULL,
    request_id uuid NOT NULL REFERENCES deletion_request,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (api_key, key)
);

-- A record out of service. Kept for ever once erased: its id never comes back (rule 19).
CREATE TABLE tombstone (
    record_id uuid PRIMARY KEY,
    dataset_id uuid NOT NULL REFERENCES dataset,
    cell_id bigint NOT NULL REFERENCES cell,
    commitment bytea NOT NULL,
    added bigint NOT NULL,
    removed bigint CHECK (removed > added),  -- the first generation without it; NULL while the payload is sealed
    request_id uuid NOT NULL REFERENCES deletion_request,
    created_at timestamptz NOT NULL DEFAULT now(),
    erased_at timestamptz,
    lifted_at timestamptz,
    CHECK (erased_at IS NULL OR removed IS NOT NULL),
    CHECK (erased_at IS NULL OR lifted_at IS NULL)
);
-- A clean stage meets only the few with removed > g.
CREATE INDEX tombstone_cell ON tombstone (cell_id, removed);
CREATE INDEX tombstone_sealed ON tombstone (dataset_id, cell_id) WHERE removed IS NULL AND lifted_at IS NULL;
CREATE INDEX tombstone_request ON tombstone (request_id);

CREATE TABLE do_not_train (
    subject_id uuid NOT NULL REFERENCES subject,
    dataset_id uuid REFERENCES dataset,  -- NULL: every dataset
    request_id uuid NOT NULL REFERENCES deletion_request,
    since timestamptz NOT NULL DEFAULT now(),
    until timestamptz,
    lifted_at timestamptz
);
CREATE UNIQUE INDEX do_not_train_open ON do_not_train (subject_id, dataset_id) NULLS NOT DISTINCT
    WHERE lifted_at IS NULL;

CREATE TABLE hold (
    hold_id uuid PRIMARY KEY,
    subject_id uuid NOT NULL REFERENCES subject,
    reason_code text NOT NULL CHECK (reason_code ~ '^[a-z][a-z0-9_]{0,63}$'),
    created_by text NOT NULL REFERENCES api_key,
    created_at timestamptz NOT NULL DEFAULT now(),
    released_at timestamptz
);
CREATE INDEX hold_open ON hold (subject_id) WHERE released_at IS NULL;
"""

MODELS = """
CREATE TABLE model (
    model_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
    dataset_id uuid NOT NULL REFERENCES dataset,
    evaluation_id uuid REFERENCES dataset,  -- a non-deletable dataset that stages are evaluated on
    recipe jsonb NOT NULL,
    recipe_digest text NOT NULL UNIQUE,  -- stage keys name it: models with one recipe need seeds of their own
    version bigint NOT NULL DEFAULT 0,  -- the target
    floor bigint NOT NULL DEFAULT 0,    -- the lowest that may be served
    cleared bigint NOT NULL DEFAULT 0,  -- every process covers this floor, or its lease has run out
    published_at timestamptz,           -- of the newest deactivation: rule 27's spacing
    erase_after interval NOT NULL DEFAULT '0',
    rebuild_wanted boolean NOT NULL DEFAULT false,  -- stages may be missing: the state that rings model.rebuild
    building boolean NOT NULL DEFAULT false,        -- jobs were queued whose result is not published yet
    created_at timestamptz NOT NULL DEFAULT now(),
    CHECK (cleared <= floor AND floor <= version)
);

CREATE TABLE stage (
    stage_key text PRIMARY KEY CHECK (stage_key ~ '^[0-9a-f]{64}$'),
    model_id bigint NOT NULL REFERENCES model,
    shard int NOT NULL,
    prefix int[] NOT NULL CHECK (cardinality(prefix) >= 1),
    roots text[] NOT NULL CHECK (cardinality(roots) = cardinality(prefix)),
    parent text REFERENCES stage,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX stage_model ON stage (model_id);
-- The stage's lineage: which generation of which cells it reads.
CREATE TABLE stage_cell (
    stage_key text NOT NULL REFERENCES stage,
    cell_id bigint NOT NULL,
    generation bigint NOT NULL,
    PRIMARY KEY (stage_key, cell_id),
    FOREIGN KEY (cell_id, generation) REFERENCES cell_manifest
);
CREATE INDEX stage_cell_cell ON stage_cell (cell_id, generation);

CREATE TABLE stage_job (
    stage_key text PRIMARY KEY REFERENCES stage,
    model_id bigint NOT NULL REFERENCES model,
    state job_state NOT NULL DEFAULT 'queued',
    token bigint NOT NULL DEFAULT 0,  -- raised by each claim and each cancellation: a fence against zombies
    attempts int NOT NULL DEFAULT 0,
    error text,                       -- a class of error, never a message with data in it
    queued_at timestamptz NOT NULL DEFAULT now(),
    beat_at timestamptz,
    ended_at timestamptz
);
CREATE INDEX stage_job_open ON stage_job (model_id, state) WHERE state IN ('queued', 'running');

-- Platform fingerprints (instruction set, libraries, dtype) that artefacts were made on.
CREATE TABLE platform (
    fingerprint text PRIMARY KEY CHECK (fingerprint ~ '^[0-9a-f]{64}$'),
    body jsonb NOT NULL
);

CREATE TABLE artifact (
    object_name text PRIMARY KEY,  -- unique for ever (rule 18)
    kind artifact_kind NOT NULL,
    stage_key text REFERENCES stage,
    cell_id bigint REFERENCES cell,
    fingerprint text REFERENCES platform,
    parent_digest text,
    digest text CHECK (digest ~ '^[0-9a-f]{64}$'),
    bytes bigint,
    state artifact_state NOT NULL DEFAULT 'writing',
    created_at timestamptz NOT NULL DEFAULT now(),
    doomed_at timestamptz,
    destroyed_at timestamptz,
    checked_at timestamptz,  -- the last look that found it absent
    sweeps int NOT NULL DEFAULT 0,
    CHECK ((kind = 'cell') = (cell_id IS NOT NULL)),
    CHECK ((kind = 'cell') = (stage_key IS NULL)),
    CHECK (state NOT IN ('live') OR digest IS NOT NULL),
    CHECK ((state = 'destroyed') = (destroyed_at IS NOT NULL))
);
-- Two digests under one key and fingerprint would mean that retrain-equal is broken (design.md 2.7).
CREATE UNIQUE INDEX artifact_stage_live ON artifact (stage_key, kind, fingerprint) WHERE state = 'live';
CREATE INDEX artifact_stage ON artifact (stage_key) WHERE stage_key IS NOT NULL;
CREATE INDEX artifact_held ON artifact (stage_key, kind, state) WHERE stage_key IS NOT NULL AND state <> 'destroyed';
CREATE INDEX artifact_sweep ON artifact (destroyed_at) WHERE state = 'destroyed' AND sweeps < 3;
CREATE INDEX artifact_cell ON artifact (cell_id) WHERE cell_id IS NOT NULL;
CREATE INDEX artifact_open ON artifact (state, created_at) WHERE state IN ('writing', 'doomed');

CREATE TABLE assembly (
    digest text PRIMARY KEY CHECK (digest ~ '^[0-9a-f]{64}$'),
    body jsonb NOT NULL
);
CREATE TABLE model_version (
    model_id bigint NOT NULL REFERENCES model,
    version bigint NOT NULL CHECK (version >= 1),
    assembly text NOT NULL REFERENCES assembly,
    cause version_cause NOT NULL,
    canonical boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (model_id, version)
);

-- One row per process, never reused, renamed or re-opened (rule 2).
CREATE TABLE lease (
    process_id uuid PRIMARY KEY,
    model_id bigint NOT NULL REFERENCES model,
    name text NOT NULL,
    covers bigint NOT NULL,  -- lowest version it may still answer from
    freed bigint NOT NULL,   -- lowest version whose weights it may still hold in memory
    ttl_ms int NOT NULL CHECK (ttl_ms > 0),
    beats bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),  -- under the model's lock: after any declaration
    ended_at timestamptz,
    freed_at timestamptz
);
CREATE INDEX lease_open ON lease (model_id) WHERE ended_at IS NULL;

-- The state machine runs per model (rule 26).
CREATE TABLE request_target (
    request_id uuid NOT NULL REFERENCES deletion_request,
    model_id bigint NOT NULL REFERENCES model,
    state deletion_state NOT NULL,
    outcome deletion_outcome,
    version bigint,  -- the floor that this target waits for
    plan jsonb,      -- frozen by the planner
    attempts int NOT NULL DEFAULT 0,  -- since the last step forward
    attempted_at timestamptz,
    error text,                       -- a class of error, never a message with data in it
    deactivated_at timestamptz,
    erased_at timestamptz,
    completed_at timestamptz,
    PRIMARY KEY (request_id, model_id),
    CHECK (state IN ('received', 'awaiting_identity', 'awaiting_approval', 'rejected', 'revoked', 'expired',
                     'duplicate', 'failed') OR version IS NOT NULL OR outcome IS NOT DISTINCT FROM 'no_match'),
    CHECK ((state = 'completed') = (outcome IS NOT NULL))
);
CREATE INDEX request_target_open ON request_target (model_id, state)
    WHERE state IN ('received', 'deactivating', 'deactivated', 'erasing');

CREATE TABLE certificate (
    request_id uuid NOT NULL REFERENCES deletion_request,
    model_id bigint NOT NULL REFERENCES model,
    envelope jsonb NOT NULL,
    digest text NOT NULL,
    issued_at timestamptz NOT NULL,
    PRIMARY KEY (request_id, model_id)
);
"""

EVENTS = """
-- The durable record of every step, written in the transaction of what it records (rule 13). A sequencer moves the
-- rows into the ledger; the programs may only append and read.
CREATE TABLE event_pending (
    id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1) PRIMARY KEY,
    event_id uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
    kind text NOT NULL CHECK (kind ~ '^[a-z]+([._][a-z]+)+$'),
    request_id uuid,
    model_id bigint,
    body jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX event_pending_request ON event_pending (request_id, id) WHERE request_id IS NOT NULL;
CREATE INDEX event_pending_model ON event_pending (model_id, id);
CREATE INDEX event_pending_process ON event_pending ((body ->> 'process_id')) WHERE kind LIKE 'replica.%';
"""

GRANTS = """
GRANT USAGE ON SCHEMA public TO expunge_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO expunge_app;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO expunge_app;
REVOKE UPDATE, DELETE ON key_check, event_pending, certificate, assembly, model_version, cell_manifest FROM expunge_app;
REVOKE DELETE ON tombstone, deletion_request, request_target, do_not_train, lease, artifact FROM expunge_app;
REVOKE INSERT, UPDATE, DELETE ON alembic_version FROM expunge_app;
"""


def upgrade() -> None:
    for statements in (ROLES, ENUMS, DATA, REQUESTS, MODELS, EVENTS, GRANTS):
        op.execute(statements)
