"""The ledger's tables: events wait, become leaves, and are under tree heads. Nothing here changes a row but the head's.

The tree is service.evidence.merkle's; order and rules are protocol.md section 5's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.evidence.leaves import Sealed, seal
from service.evidence.merkle import TILE_WIDTH, CompactRange, Tree, leaf_hash
from service.store.database import Connection

BATCH = 2000
"""Events of one transaction (rule 14)."""

LOCK_HEAD: LiteralString = "SELECT size, peaks FROM ledger_head FOR UPDATE"
GET_HEAD: LiteralString = "SELECT size, peaks FROM ledger_head"
LIST_WAITING: LiteralString = """
SELECT id, event_id, kind, request_id::text, model_id, body, created_at
FROM event_pending
WHERE id = ANY(ARRAY(SELECT q.id FROM ledger_queue q ORDER BY q.id LIMIT %(limit)s::int))
ORDER BY id
"""
COPY_LEAVES: LiteralString = "COPY ledger_leaf (index, event_id, hash, leaf) FROM STDIN (FORMAT BINARY)"
COPY_OPENINGS: LiteralString = "COPY ledger_opening (index, opening, recorded_at) FROM STDIN (FORMAT BINARY)"
INSERT_NODE: LiteralString = """
INSERT INTO ledger_node (level, position, hash) VALUES (%(level)s::int, %(position)s::bigint, %(hash)s::bytea)
"""
MARK_HEAD: LiteralString = "UPDATE ledger_head SET size = %(size)s::bigint, peaks = %(peaks)s::bytea[]"
DELETE_WAITING: LiteralString = "DELETE FROM ledger_queue WHERE id = ANY(%(ids)s::bigint[])"
LIST_HASHES: LiteralString = """
SELECT hash FROM ledger_leaf WHERE index >= %(first)s::bigint AND index < %(stop)s::bigint ORDER BY index
"""
LIST_NODES: LiteralString = """
SELECT hash FROM ledger_node
WHERE level = %(level)s::int AND position >= %(first)s::bigint AND position < %(stop)s::bigint
ORDER BY position
"""
LIST_ENTRIES: LiteralString = """
SELECT leaf FROM ledger_leaf WHERE index >= %(first)s::bigint AND index < %(stop)s::bigint ORDER BY index
"""
LIST_OPENINGS: LiteralString = """
SELECT opening FROM ledger_opening WHERE index >= %(first)s::bigint AND index < %(stop)s::bigint ORDER BY index
"""
LIST_OF_REQUEST: LiteralString = """
SELECT l.index, l.leaf, o.opening
FROM event_pending e
JOIN ledger_leaf l ON l.event_id = e.event_id
LEFT JOIN ledger_opening o ON o.index = l.index
WHERE e.request_id = %(request_id)s::uuid
ORDER BY l.index
"""
LIST_ENTRIES_OPENED: LiteralString = """
SELECT l.index, l.leaf, o.opening
FROM ledger_leaf l
LEFT JOIN ledger_opening o ON o.index = l.index
WHERE l.index >= %(first)s::bigint
ORDER BY l.index
LIMIT %(limit)s::int
"""
COUNT_WAITING_OF_REQUEST: LiteralString = """
SELECT count(*) FROM event_pending e JOIN ledger_queue q ON q.id = e.id WHERE e.request_id = %(request_id)s::uuid
"""
FIND_TREE_HEAD: LiteralString = "SELECT size, root, note FROM tree_head ORDER BY size DESC LIMIT 1"
GET_TREE_HEAD: LiteralString = "SELECT size, root, note FROM tree_head WHERE size = %(size)s::bigint"
INSERT_TREE_HEAD: LiteralString = """
INSERT INTO tree_head (size, root, note) VALUES (%(size)s::bigint, %(root)s::bytea, %(note)s::text)
ON CONFLICT DO NOTHING
"""
GET_FIGURES: LiteralString = """
SELECT h.size,
       coalesce((SELECT t.size FROM tree_head t ORDER BY t.size DESC LIMIT 1), 0) AS signed,
       (SELECT count(*) FROM ledger_queue) AS waiting,
       coalesce(extract(epoch FROM clock_timestamp() - (
           SELECT min(e.created_at) FROM event_pending e
           WHERE e.id = (SELECT q.id FROM ledger_queue q ORDER BY q.id LIMIT 1))), 0)::float8 AS lag
FROM ledger_head h
"""
ERASE_OPENINGS: LiteralString = "SELECT erase_openings(%(days)s::int, %(most)s::int)"
FIRST_OPENING: LiteralString = """
SELECT min(index) FROM ledger_opening WHERE recorded_at >= clock_timestamp() - make_interval(days => %(days)s::int)
"""


class Waiting(NamedTuple):
    """An event without a leaf; a tuple, since thousands are made a second."""

    id: int
    event_id: UUID
    kind: str
    request_id: str | None
    model_id: int | None
    body: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Head:
    """How far the ledger goes."""

    size: int
    peaks: list[bytes]

    @property
    def range(self) -> CompactRange:
        """What appending needs."""
        return CompactRange(self.size, tuple(bytes(peak) for peak in self.peaks))


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A tree head that was signed."""

    size: int
    root: bytes
    note: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A leaf and what opens it, until that is erased."""

    index: int
    leaf: bytes
    opening: bytes | None


@dataclass(frozen=True, slots=True)
class LedgerFigures:
    """For `/metrics`."""

    size: int
    signed: int
    waiting: int
    lag: float
    """Age of the oldest event without a leaf, in seconds."""


def sequence(connection: Connection, *, limit: int = BATCH) -> int:
    """Make leaves of the events that wait, in the caller's transaction; how many.

    Rows that a snapshot shows are numbered by id. A later event of one cause is in a later transaction: whoever sees it
    sees the earlier, which has the lower id (rule 14).
    """
    head = _head(connection, LOCK_HEAD)
    with connection.cursor(row_factory=lambda _cursor: Waiting._make, binary=True) as cursor:
        waiting = cursor.execute(LIST_WAITING, {"limit": limit}).fetchall()
    if not waiting:
        return 0
    grow(connection, head, _copy(connection, seal(waiting, head.size)))
    connection.execute(DELETE_WAITING, {"ids": [event.id for event in waiting]})
    return len(waiting)


def _copy(connection: Connection, sealed: Iterable[Sealed]) -> list[bytes]:
    """Write openings and leaves; the hashes of the leaves. Postgres stores the first while the last are still made."""
    made: list[Sealed] = []
    hashes: list[bytes] = []
    with connection.cursor() as cursor:
        with cursor.copy(COPY_OPENINGS) as copy:
            copy.set_types(["int8", "bytea", "timestamptz"])
            for each in sealed:
                copy.write_row((each.place, each.opening, each.at))
                made.append(each)
        with cursor.copy(COPY_LEAVES) as copy:
            copy.set_types(["int8", "uuid", "bytea", "bytea"])
            for each in made:
                hashed = leaf_hash(each.leaf)
                copy.write_row((each.place, each.event_id, hashed, each.leaf))
                hashes.append(hashed)
    return hashes


def grow(connection: Connection, head: Head, hashes: Iterable[bytes]) -> None:
    """Extend the tree of the locked head by these leaves."""
    grown, nodes = head.range.extend(hashes)
    for node in nodes:
        connection.execute(INSERT_NODE, {"level": node.level, "position": node.position, "hash": node.hash})
    connection.execute(MARK_HEAD, {"size": grown.size, "peaks": list(grown.peaks)})


def lock_head(connection: Connection) -> Head:
    """How far the ledger goes; nobody else appends before the transaction ends."""
    return _head(connection, LOCK_HEAD)


def get_head(connection: Connection) -> Head:
    """How far the ledger goes."""
    return _head(connection, GET_HEAD)


def _head(connection: Connection, query: LiteralString) -> Head:
    with connection.cursor(row_factory=class_row(Head)) as cursor:
        (head,) = cursor.execute(query).fetchall()
    return head


def tree(connection: Connection, size: int) -> Tree:
    """The tree of the first `size` leaves, read from the tables as proofs need it."""

    def read(level: int, tile: int, width: int) -> list[bytes]:
        first = tile * TILE_WIDTH
        if level == 0:
            return list_hashes(connection, first, first + width)
        return list_nodes(connection, level, first, first + width)

    return Tree(size, read)


def list_hashes(connection: Connection, first: int, stop: int) -> list[bytes]:
    """Hashes of the leaves from `first` up to before `stop`."""
    return _bytes(connection, LIST_HASHES, {"first": first, "stop": stop})


def list_nodes(connection: Connection, level: int, first: int, stop: int) -> list[bytes]:
    """Roots of the full subtrees of 256**level leaves from position `first` up to before `stop`."""
    return _bytes(connection, LIST_NODES, {"level": level, "first": first, "stop": stop})


def list_entries(connection: Connection, first: int, stop: int) -> list[bytes]:
    """The leaves from `first` up to before `stop`."""
    return _bytes(connection, LIST_ENTRIES, {"first": first, "stop": stop})


def list_openings(connection: Connection, first: int, stop: int) -> list[bytes]:
    """What opens those leaves, without the ones that are erased."""
    return _bytes(connection, LIST_OPENINGS, {"first": first, "stop": stop})


def _bytes(connection: Connection, query: LiteralString, values: dict[str, Any]) -> list[bytes]:
    with connection.cursor(row_factory=scalar_row, binary=True) as cursor:
        return cursor.execute(query, values).fetchall()


def list_of_request(connection: Connection, request_id: UUID) -> list[Entry]:
    """The request's leaves in order."""
    with connection.cursor(row_factory=class_row(Entry)) as cursor:
        return cursor.execute(LIST_OF_REQUEST, {"request_id": request_id}).fetchall()


def list_opened(connection: Connection, first: int, *, limit: int) -> list[Entry]:
    """Leaves from an index on."""
    with connection.cursor(row_factory=class_row(Entry)) as cursor:
        return cursor.execute(LIST_ENTRIES_OPENED, {"first": first, "limit": limit}).fetchall()


def count_waiting_of_request(connection: Connection, request_id: UUID) -> int:
    """The request's events that have no leaf yet."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(COUNT_WAITING_OF_REQUEST, {"request_id": request_id}).fetchone() or 0


def find_tree_head(connection: Connection) -> SignedHead | None:
    """The newest tree head."""
    with connection.cursor(row_factory=class_row(SignedHead)) as cursor:
        return cursor.execute(FIND_TREE_HEAD).fetchone()


def insert_tree_head(connection: Connection, size: int, root: bytes, note: str) -> SignedHead:
    """Keep a tree head; the one that is kept for its size, which another signer may have been first to write."""
    connection.execute(INSERT_TREE_HEAD, {"size": size, "root": root, "note": note})
    with connection.cursor(row_factory=class_row(SignedHead)) as cursor:
        (kept,) = cursor.execute(GET_TREE_HEAD, {"size": size}).fetchall()
    return kept


def get_figures(connection: Connection) -> LedgerFigures:
    """Size, signed size, events that wait and for how long."""
    with connection.cursor(row_factory=class_row(LedgerFigures)) as cursor:
        (figures,) = cursor.execute(GET_FIGURES).fetchall()
    return figures


def erase_openings(connection: Connection, *, days: int, most: int = 5000) -> int:
    """Erase openings, and events, that are older than `days`; how many. The leaves stay.

    What the certificate of a request that has not ended needs stays, too, until it has.
    """
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(ERASE_OPENINGS, {"days": days, "most": most}).fetchone() or 0


def first_opening(connection: Connection, *, days: int) -> int | None:
    """The lowest leaf whose opening is not older than `days`."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(FIRST_OPENING, {"days": days}).fetchone()
