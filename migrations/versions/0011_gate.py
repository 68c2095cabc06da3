"""Quality gate, canary and rollback of versions."""

from typing import LiteralString

from alembic import op

revision = "0011"
down_revision = "0010"

# Programs are stopped while migrations run, and there are few models.
SCHEMA: LiteralString = """
-- squawk-ignore-file constraint-missing-not-valid
ALTER TYPE version_cause ADD VALUE 'canary' AFTER 'rebuild';
CREATE TYPE gate_state AS ENUM ('evaluating', 'refused', 'canary', 'aborted', 'admitted');

ALTER TABLE model
    ADD COLUMN gate jsonb,    -- bounds that a rebuilt assembly must keep before it serves; NULL: none
    ADD COLUMN canary jsonb,  -- share of traffic that a rebuilt assembly gets at first, and how long; NULL: all at once
    ADD COLUMN stable bigint, -- while a canary runs: the version that answers the rest of the traffic
    ADD COLUMN canary_until timestamptz,  -- when the canary is promoted; NULL: when an operator says so
    ADD COLUMN pinned bigint, -- version that an operator rolled back to: serves while all of it is clean
    ADD CONSTRAINT model_stable CHECK (floor <= stable AND stable < version),
    ADD CONSTRAINT model_pinned CHECK (pinned <= version);

-- Trained while a gate or canary was on, and not let into service yet: a deactivation does without it.
ALTER TABLE stage ADD COLUMN gated boolean NOT NULL DEFAULT false;

-- What became of each assembly that a rebuild brought to a gate or a canary.
CREATE TABLE gate (
    model_id bigint NOT NULL REFERENCES model,
    assembly text NOT NULL REFERENCES assembly,
    base text REFERENCES assembly,  -- what served then; NULL: nothing
    policy jsonb,                   -- the gate's bounds then; NULL: a canary without a gate
    state gate_state NOT NULL,
    score double precision,
    base_score double precision,
    rows int CHECK (rows >= 0),     -- of the evaluation set
    error text,                     -- class of what kept it from being measured
    attempts int NOT NULL DEFAULT 0,
    attempted_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    decided_at timestamptz,
    PRIMARY KEY (model_id, assembly)
);
CREATE UNIQUE INDEX gate_evaluating ON gate (model_id) WHERE state = 'evaluating';
CREATE UNIQUE INDEX gate_canary ON gate (model_id) WHERE state = 'canary';
GRANT SELECT, INSERT, UPDATE, DELETE ON gate TO expunge_app;
"""


# How much the model's answers tell (service/domain/answers.py).
ANSWERS: LiteralString = """
ALTER TABLE model
    ADD COLUMN answers text NOT NULL DEFAULT 'probabilities' CHECK (answers IN ('probabilities', 'top1'));
"""


def upgrade() -> None:
    op.execute(SCHEMA)
    op.execute(ANSWERS)
