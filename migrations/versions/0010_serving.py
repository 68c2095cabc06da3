"""How many shards must be live for a model to answer: below that, it says so instead."""

from typing import LiteralString

from alembic import op

revision = "0010"
down_revision = "0009"

SCHEMA: LiteralString = """
ALTER TABLE model ADD COLUMN min_shards int NOT NULL DEFAULT 1 CHECK (min_shards >= 1);
"""


def upgrade() -> None:
    op.execute(SCHEMA)
