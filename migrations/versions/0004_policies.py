"""When a model's missing stages are trained, how fast training goes, and deletions that wait for their replacement."""

from typing import LiteralString

from alembic import op

revision = "0004"
down_revision = "0003"

SCHEMA: LiteralString = """
ALTER TABLE model
    ADD COLUMN rebuild_policy jsonb NOT NULL DEFAULT '{"kind": "now"}',
    ADD COLUMN rebuild_forced boolean NOT NULL DEFAULT false,  -- an operator asked: the policy's waiting is over
    ADD COLUMN rebuild_due timestamptz,  -- earliest due date of the deletions that were not rebuilt yet
    ADD COLUMN rebuild_at timestamptz,   -- when the planner will queue what is missing; NULL: nothing waits
    ADD COLUMN deferring boolean NOT NULL DEFAULT false;  -- whether deletions of this model wait

-- Training speed is measured: seconds from claim to publication over the planner's units of work.
ALTER TABLE stage_job
    ADD COLUMN work float CHECK (work >= 0),
    ADD COLUMN started_at timestamptz,
    ADD COLUMN platform text;  -- fingerprint of the platform that it was trained on

-- `rebuild_first`: a target that stays `received` until its replacement is trained, or until this moment.
ALTER TABLE request_target ADD COLUMN deferred_until timestamptz;
-- Records that are out of every manifest, but that this model's stages from before may serve on with until then.
-- Changed under the model's lock only.
CREATE TABLE deferral (
    model_id bigint NOT NULL REFERENCES model,
    record_id uuid NOT NULL,
    PRIMARY KEY (model_id, record_id)
);
GRANT SELECT, INSERT, DELETE ON deferral TO expunge_app;
"""


def upgrade() -> None:
    op.execute(SCHEMA)
