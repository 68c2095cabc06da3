"""Datasets say what their labels and inputs are: regressions, completions and images beside classified texts."""

from typing import LiteralString

from alembic import op

revision = "0008"
down_revision = "0007"

# Programs are stopped while migrations run, and there are few datasets.
SCHEMA: LiteralString = """
-- squawk-ignore-file ban-drop-constraint, constraint-missing-not-valid
ALTER TABLE dataset
    ADD COLUMN task text NOT NULL DEFAULT 'classification'
        CHECK (task IN ('classification', 'regression', 'completion')),
    ADD COLUMN input text NOT NULL DEFAULT 'text' CHECK (input IN ('text', 'image', 'vector')),
    ADD COLUMN width int CHECK (width >= 1),
    ADD CONSTRAINT dataset_width CHECK ((input = 'vector') = (width IS NOT NULL)),
    DROP CONSTRAINT dataset_classes_check,
    ADD CONSTRAINT dataset_classes_check CHECK ((task = 'classification') = (cardinality(classes) >= 2));
"""


def upgrade() -> None:
    op.execute(SCHEMA)
