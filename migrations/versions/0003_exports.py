"""Exports: whole assemblies that left the installation as files; what became of them is the recipient's."""

from typing import LiteralString

from alembic import op

revision = "0003"
down_revision = "0002"

SCHEMA: LiteralString = """
CREATE TABLE export (
    export_id uuid PRIMARY KEY,
    model_id bigint NOT NULL REFERENCES model,
    version bigint NOT NULL,
    assembly text NOT NULL REFERENCES assembly,
    digest text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),  -- of the weight file that was handed out
    recipient text NOT NULL CHECK (recipient ~ '^[A-Za-z0-9._:/#-]{1,200}$'),  -- a system's, never a person's name
    created_by text NOT NULL REFERENCES api_key,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    withdrawn_by text REFERENCES api_key,
    withdrawn_at timestamptz,  -- an operator's word that the recipient holds it no more
    FOREIGN KEY (model_id, version) REFERENCES model_version,
    CHECK ((withdrawn_at IS NULL) = (withdrawn_by IS NULL))
);
CREATE INDEX export_model ON export (model_id, created_at DESC);
CREATE INDEX export_assembly ON export (assembly) WHERE withdrawn_at IS NULL;
GRANT SELECT, INSERT, UPDATE ON export TO expunge_app;
"""


def upgrade() -> None:
    op.execute(SCHEMA)
