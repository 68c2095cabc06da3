"""Certificates with proofs, and their supplements."""

from typing import LiteralString

from alembic import op

revision = "0013"
down_revision = "0012"

SCHEMA: LiteralString = """
-- squawk-ignore-file require-concurrent-index-creation
-- Programs are stopped while migrations run.
-- What became of a certificate's open ends: signed statements of their own, numbered, each naming the one before.
CREATE TABLE certificate_supplement (
    request_id uuid NOT NULL,
    model_id bigint NOT NULL,
    number int NOT NULL CHECK (number >= 1),
    envelope jsonb NOT NULL,
    digest text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),
    issued_at timestamptz NOT NULL,
    PRIMARY KEY (request_id, model_id, number),
    FOREIGN KEY (request_id, model_id) REFERENCES certificate ON DELETE CASCADE
);
-- Open ends that a supplement is still due for; a row goes with the supplement that answers it.
CREATE TABLE certificate_open (
    request_id uuid NOT NULL,
    model_id bigint NOT NULL,
    what text NOT NULL CHECK (what IN ('sweep', 'process', 'export', 'rebuild', 'lift')),
    name text NOT NULL,  -- of a sweep its number, of a process or an export its id
    due_at timestamptz NOT NULL,  -- not looked at before
    PRIMARY KEY (request_id, model_id, what, name),
    FOREIGN KEY (request_id, model_id) REFERENCES certificate ON DELETE CASCADE
);
CREATE INDEX certificate_open_due ON certificate_open (due_at);
GRANT SELECT, INSERT ON certificate_supplement TO expunge_app;
GRANT SELECT, INSERT, DELETE ON certificate_open TO expunge_app;

-- How a certificate finds the events that carry no request's id.
CREATE INDEX event_pending_object ON event_pending ((body ->> 'object_name'))
    WHERE kind IN ('artifact.destroyed', 'artifact.reappeared');
CREATE INDEX event_pending_published ON event_pending (model_id, ((body ->> 'version')::bigint))
    WHERE kind = 'version.published';
CREATE INDEX event_pending_withdrawn ON event_pending ((body ->> 'export_id')) WHERE kind = 'export.withdrawn';
"""


def upgrade() -> None:
    op.execute(SCHEMA)
