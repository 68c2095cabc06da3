"""Fencing proxies in front of other servers."""

from typing import LiteralString

from alembic import op

revision = "0016"
down_revision = "0015"

SCHEMA: LiteralString = """
SELECT 1;
"""


def upgrade() -> None:
    op.execute(SCHEMA)
