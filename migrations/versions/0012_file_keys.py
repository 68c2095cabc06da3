"""One key per file."""

from typing import LiteralString

from alembic import op

revision = "0012"
down_revision = "0011"

SCHEMA: LiteralString = """
SELECT 1;
"""


def upgrade() -> None:
    op.execute(SCHEMA)
