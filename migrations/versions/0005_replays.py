"""Replays: stages drawn to be trained again from nothing, and what came of each; artefacts kept as evidence."""

from typing import LiteralString

from alembic import op

revision = "0005"
down_revision = "0004"

SCHEMA: LiteralString = """
-- Out of service and kept as evidence: only an erasure of what it was trained on destroys it.
ALTER TYPE artifact_state ADD VALUE IF NOT EXISTS 'quarantined' AFTER 'lost';

CREATE TYPE replay_outcome AS ENUM ('equal', 'mismatch', 'other_platform', 'skipped', 'failed');

-- The machine that wrote the artefact: a replay elsewhere says more. NULL: written before this was kept.
ALTER TABLE artifact ADD COLUMN host text;

-- The platform that each machine trained a model's stages on last.
CREATE TABLE machine (
    model_id bigint NOT NULL REFERENCES model,
    host text NOT NULL,
    fingerprint text NOT NULL REFERENCES platform,
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (model_id, host)
);

-- A served stage drawn on one day, and what training its chain from nothing gave. Rows are never deleted.
CREATE TABLE replay (
    replay_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    model_id bigint NOT NULL REFERENCES model,
    stage_key text NOT NULL REFERENCES stage,
    digest text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),  -- served when it was drawn
    fingerprint text NOT NULL REFERENCES platform,           -- the artefact's
    made_by text,                                            -- host that trained the artefact
    drawn_on date NOT NULL,
    drawn_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    token bigint NOT NULL DEFAULT 0,   -- raised by each claim: a fence against zombies
    attempts int NOT NULL DEFAULT 0,
    due_at timestamptz NOT NULL DEFAULT clock_timestamp(),  -- nobody else may take it before: claims and beats raise it
    host text,                                     -- that took it last
    platform text REFERENCES platform,             -- it was trained again on
    found text CHECK (found ~ '^[0-9a-f]{64}$'),   -- digest that training from nothing gave
    differs_at text REFERENCES stage,              -- the first stage of its line that differs, which `found` is then of
    outcome replay_outcome,                        -- NULL: waiting or under way
    reason text,                                   -- a class of error, never a message with data in it
    started_at timestamptz,
    ended_at timestamptz,
    released_at timestamptz,  -- an operator found that the replay was at fault
    UNIQUE (model_id, drawn_on, stage_key),
    CHECK ((outcome IS NULL) = (ended_at IS NULL)),
    CHECK (released_at IS NULL OR outcome = 'mismatch'),
    CHECK (outcome NOT IN ('equal', 'mismatch') OR found IS NOT NULL)
);
CREATE INDEX replay_open ON replay (due_at) WHERE outcome IS NULL;
CREATE INDEX replay_model ON replay (model_id, replay_id DESC);
GRANT SELECT, INSERT, UPDATE ON replay, machine TO expunge_app;
"""


def upgrade() -> None:
    op.execute(SCHEMA)
