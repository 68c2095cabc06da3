"""Restrictions that are lifted: where a record was missing meanwhile, and versions that bring it back."""

from typing import LiteralString

from alembic import op

revision = "0006"
down_revision = "0005"

# Programs are stopped while migrations run, and the tables named here are short where there is anything to migrate.
SCHEMA: LiteralString = """
-- squawk-ignore-file require-concurrent-index-creation, require-concurrent-index-deletion
-- squawk-ignore-file ban-drop-constraint, constraint-missing-not-valid
-- Generations that a record was left out of by a restriction that has been lifted. The record is in manifest g of its
-- cell iff added <= g, no absence has removed <= g < returned, and its tombstone's removed is null or later than g.
-- A lifted tombstone keeps `removed` until the cell's next manifest holds the record again; then it becomes an absence.
CREATE TABLE absence (
    record_id uuid NOT NULL REFERENCES tombstone,
    removed bigint NOT NULL,
    returned bigint NOT NULL CHECK (returned > removed),
    PRIMARY KEY (record_id, removed)
);
GRANT SELECT, INSERT ON absence TO expunge_app;

-- Records on their way out of their cell's newest manifest, or back into it.
CREATE INDEX tombstone_unsettled ON tombstone (dataset_id, cell_id) WHERE (removed IS NULL) = (lifted_at IS NULL);
DROP INDEX tombstone_sealed;

ALTER TYPE version_cause ADD VALUE 'lift' AFTER 'deactivate';

-- A restriction that matched nothing in one model is lifted there, too.
ALTER TABLE request_target
    DROP CONSTRAINT request_target_check,
    ADD CONSTRAINT request_target_version CHECK (
        state IN ('received', 'awaiting_identity', 'awaiting_approval', 'rejected', 'revoked', 'expired', 'duplicate',
                  'failed', 'lifted')
        OR version IS NOT NULL OR outcome IS NOT DISTINCT FROM 'no_match');

-- Placing a hold twice is one hold, so that a caller may try again.
CREATE UNIQUE INDEX hold_once ON hold (subject_id, reason_code) WHERE released_at IS NULL;
CREATE INDEX hold_page ON hold (created_at DESC, hold_id DESC);
"""


def upgrade() -> None:
    op.execute(SCHEMA)
