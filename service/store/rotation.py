"""Changing the key that signs: one signer at a time, and no tree head beside the change."""

from typing import LiteralString

from psycopg.rows import scalar_row

from service.evidence.events import EventKind
from service.store import events
from service.store.database import Connection

LOCK: LiteralString = "SELECT pg_advisory_xact_lock(7594882)"
SIGNED_SIZE: LiteralString = "SELECT coalesce(max(size), 0) FROM tree_head"
IS_RECORDED: LiteralString = """
SELECT EXISTS (
    SELECT FROM event_pending WHERE kind = 'key.rotated' AND body ->> 'new' = %(new)s::text)
"""


def lock_signing(connection: Connection) -> None:
    """Be the only signer until the transaction ends: read the key after it, so that it is the newest."""
    connection.execute(LOCK)


def signed_size(connection: Connection) -> int:
    """Leaves under the largest tree head."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(SIGNED_SIZE).fetchone() or 0


def record(connection: Connection, *, old: str, new: str, statement: str) -> bool:
    """Record a handover by key ids and the old key's signature; False where it is recorded."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        if cursor.execute(IS_RECORDED, {"new": new}).fetchone():
            return False
    events.append(connection, EventKind.KEY_ROTATED, old=old, new=new, statement=statement)
    return True
