"""Challenge audits: stages that a witness's cosignature drew, and their replays."""

from typing import LiteralString

from alembic import op

revision = "0014"
down_revision = "0013"

# Programs are stopped while migrations run, and a replay a day makes a short table.
SCHEMA: LiteralString = """
-- squawk-ignore-file adding-foreign-key-constraint, ban-drop-constraint, require-concurrent-index-creation
-- What an auditor asked for. The cosignature in `checkpoint` draws the stages: nobody could know them when they were
-- trained. Rows are never changed.
CREATE TABLE challenge (
    challenge_id uuid PRIMARY KEY,
    model_id bigint NOT NULL REFERENCES model,
    version bigint NOT NULL,   -- whose stages are drawn from
    checkpoint text NOT NULL,  -- a tree head with the witness's cosignature
    witness text NOT NULL,     -- its public key (C2SP vkey)
    stages int NOT NULL CHECK (stages >= 1),  -- how many were asked for
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX challenge_model ON challenge (model_id, created_at DESC);
GRANT SELECT, INSERT ON challenge TO expunge_app;

-- A day's own sample has each stage once; a challenge asks anew, whatever was replayed before it.
ALTER TABLE replay ADD COLUMN challenge_id uuid REFERENCES challenge;
ALTER TABLE replay DROP CONSTRAINT replay_model_id_drawn_on_stage_key_key;
CREATE UNIQUE INDEX replay_day ON replay (model_id, drawn_on, stage_key) WHERE challenge_id IS NULL;
-- How a challenge finds what the ledger says of a stage.
CREATE INDEX event_pending_stage ON event_pending USING gin (body jsonb_path_ops) WHERE kind LIKE 'stage.%';
CREATE UNIQUE INDEX replay_challenge ON replay (challenge_id, stage_key) WHERE challenge_id IS NOT NULL;
"""


def upgrade() -> None:
    op.execute(SCHEMA)
