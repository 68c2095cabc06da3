"""Whether a model's own training command gave the same bits twice: engine external claims retrain-equal only then."""

from typing import LiteralString

from alembic import op

revision = "0007"
down_revision = "0006"

SCHEMA: LiteralString = """
ALTER TABLE model ADD COLUMN reproducible boolean;  -- NULL: not tried; once false it stays so
"""


def upgrade() -> None:
    op.execute(SCHEMA)
