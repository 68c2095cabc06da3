"""Deletion priors: classes of subjects with slices of their own, and each subject's class, fixed at first sight."""

from typing import LiteralString

from alembic import op

revision = "0002"
down_revision = "0001"

SCHEMA: LiteralString = """
-- A dataset's classes take consecutive slices in their order; how likely they are to be deleted is the recipe's to say.
CREATE TABLE prior_class (
    dataset_id uuid NOT NULL REFERENCES dataset,
    prior int NOT NULL CHECK (prior >= 0),
    name text NOT NULL CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
    slices int NOT NULL CHECK (slices >= 1),
    expires boolean NOT NULL,  -- of subjects with a known date of deletion
    PRIMARY KEY (dataset_id, prior),
    UNIQUE (dataset_id, name)
);
CREATE UNIQUE INDEX prior_class_expires ON prior_class (dataset_id) WHERE expires;

-- The class that a subject got with its first record in the dataset. Never changed: it decides the cell.
CREATE TABLE subject_prior (
    dataset_id uuid NOT NULL,
    subject_id uuid NOT NULL REFERENCES subject,
    prior int NOT NULL,
    PRIMARY KEY (dataset_id, subject_id),
    FOREIGN KEY (dataset_id, prior) REFERENCES prior_class
);

GRANT SELECT, INSERT ON prior_class TO expunge_app;
GRANT SELECT, INSERT, DELETE ON subject_prior TO expunge_app;
"""


def upgrade() -> None:
    op.execute(SCHEMA)
