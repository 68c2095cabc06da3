"""Events as a certificate shows them: leaf, opening, and Merkle path under the published tree head (rule 17)."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.evidence.rows import EntryRow, LedgerRows
from service.evidence.tree_head import read_head
from service.store import ledger
from service.store.database import Connection

# Rows that are written for a restore alone hold nothing that the other events do not say.
LIST_EVENTS: LiteralString = """
SELECT l.index, l.leaf, o.opening
FROM event_pending e
LEFT JOIN ledger_leaf l ON l.event_id = e.event_id
LEFT JOIN ledger_opening o ON o.index = l.index
WHERE e.id IN (
    SELECT id FROM event_pending
    WHERE request_id = %(request_id)s::uuid AND (model_id IS NULL OR model_id = %(model_id)s::bigint)
      AND (%(kinds)s::text[] IS NULL OR kind = ANY(%(kinds)s::text[]))
      AND kind NOT LIKE 'artifact.%%' AND kind <> 'rows.changed'
    UNION ALL
    SELECT id FROM event_pending
    WHERE kind = 'version.published' AND model_id = %(model_id)s::bigint
      AND (body ->> 'version')::bigint = %(version)s::bigint
    UNION ALL
    SELECT id FROM event_pending WHERE event_id = ANY(%(event_ids)s::uuid[])
    UNION ALL
    SELECT id FROM event_pending
    WHERE kind = 'artifact.destroyed' AND body ->> 'object_name' = ANY(%(destroyed)s::text[])
    UNION ALL
    SELECT id FROM event_pending
    WHERE kind = 'artifact.reappeared' AND body ->> 'object_name' = ANY(%(reappeared)s::text[])
      AND created_at > %(since)s::timestamptz
    UNION ALL
    SELECT id FROM event_pending
    WHERE kind LIKE 'replica.%%' AND kind IN ('replica.ended', 'replica.fenced')  -- LIKE: as the index says it
      AND body ->> 'process_id' = ANY(%(processes)s::text[])
    UNION ALL
    SELECT id FROM event_pending
    WHERE kind = 'export.withdrawn' AND body ->> 'export_id' = ANY(%(exports)s::text[]))
ORDER BY l.index
"""
IS_PUBLISHED: LiteralString = """
SELECT coalesce(bool_and(l.index IS NOT NULL AND l.index < %(size)s::bigint), true)
FROM event_pending e LEFT JOIN ledger_leaf l ON l.event_id = e.event_id
WHERE e.request_id = %(request_id)s::uuid AND (e.model_id IS NULL OR e.model_id = %(model_id)s::bigint)
  AND e.kind <> 'rows.changed'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Which events a statement rests on."""

    request_id: UUID
    model_id: int
    kinds: list[str] | None = None
    """Of the request's own events; None: all of the model and of no model."""
    version: int | None = None
    """Its publication."""
    event_ids: list[UUID] = field(default_factory=list[UUID])
    destroyed: list[str] = field(default_factory=list[str])
    """Objects."""
    reappeared: list[str] = field(default_factory=list[str])
    """Objects; events after `since`."""
    since: datetime | None = None
    processes: list[str] = field(default_factory=list[str])
    """Processes that ended or were fenced."""
    exports: list[str] = field(default_factory=list[str])
    """Exports that were withdrawn."""


@dataclass(frozen=True, slots=True)
class _Row:
    index: int | None
    leaf: bytes | None
    opening: bytes | None


def is_published(connection: Connection, request_id: UUID, model_id: int, checkpoint: str) -> bool:
    """Whether every event of the target is under this tree head."""
    values = {"request_id": request_id, "model_id": model_id, "size": read_head(checkpoint).size}
    with connection.cursor(row_factory=scalar_row) as cursor:
        return bool(cursor.execute(IS_PUBLISHED, values).fetchone())


def find_ledger(
    connection: Connection, about: About, checkpoint: str, *, since: str | None = None
) -> LedgerRows | None:
    """These events under a published tree head; None while one of them is not yet.

    Those whose openings were erased by age are left out. `since`: the checkpoint that a path is wanted from.
    """
    values: dict[str, Any] = {name: getattr(about, name) for name in About.__dataclass_fields__}
    with connection.cursor(row_factory=class_row(_Row)) as cursor:
        rows = cursor.execute(LIST_EVENTS, values).fetchall()
    size = read_head(checkpoint).size
    old = read_head(since).size if since is not None else size
    if old > size or any(row.index is None or row.index >= size for row in rows):
        return None
    tree = ledger.tree(connection, size)
    return LedgerRows(
        checkpoint=checkpoint,
        entries=tuple(_entries(rows, tree.inclusion)),
        consistency=tuple(tree.consistency(old)) if since is not None else (),
    )


def _entries(rows: Collection[_Row], path: Callable[[int], list[bytes]]) -> Iterable[EntryRow]:
    for row in rows:
        if row.index is not None and row.leaf is not None and row.opening is not None:
            yield EntryRow(
                index=row.index, leaf=bytes(row.leaf), opening=bytes(row.opening), path=tuple(path(row.index))
            )
