"""Every value of every table, for looking whether something lies there. Nothing of what is looked for is sent."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import class_row, scalar_row

from service.domain.errors import UnavailableError
from service.store.database import Connection, connect

BATCH = 500

LIST_TABLES: LiteralString = """
SELECT n.nspname AS schema, c.relname AS name
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE (c.relkind IN ('r', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast'))
   OR (n.nspname = 'pg_catalog' AND c.relname IN ('pg_stats', 'pg_stat_activity', 'pg_largeobject', 'pg_description'))
ORDER BY n.nspname, c.relname
"""
BARRED: LiteralString = """
SELECT EXISTS (
    SELECT FROM subject_alias a JOIN do_not_train d USING (subject_id)
    WHERE a.digest = ANY(%(digests)s::bytea[]) AND d.lifted_at IS NULL)
"""
BURIED: LiteralString = """
SELECT EXISTS (
    SELECT FROM tombstone
    WHERE record_id = ANY(%(record_ids)s::uuid[]) AND erased_at IS NOT NULL)
"""
LIST_TYPES: LiteralString = "SELECT DISTINCT type FROM subject_alias ORDER BY type"
LIST_DATASETS: LiteralString = "SELECT dataset_id FROM dataset ORDER BY dataset_id"
LIST_LIVE_NAMES: LiteralString = "SELECT object_name FROM artifact WHERE state = 'live' ORDER BY object_name"
SIZE: LiteralString = "SELECT pg_database_size(current_database())"
CLOCK: LiteralString = "SELECT extract(epoch FROM clock_timestamp())::float"


class TableError(Exception):
    """The database, or one of its tables, cannot be read; the message is the error's class."""


@dataclass(frozen=True, slots=True)
class Table:
    """A relation with rows."""

    schema: str
    name: str


@contextmanager
def reading(url: str) -> Generator[Connection]:
    """A connection to look with.

    Raises:
        TableError: whatever fails while it is open.
    """
    if not url:
        raise TableError("no URL is known")
    try:
        with connect(url, autocommit=True) as connection:
            yield connection
    except (psycopg.Error, UnavailableError) as error:
        raise TableError(type(error).__name__) from None


def list_tables(connection: Connection) -> list[Table]:
    """Every table and materialised view, and what the catalogue keeps of values: statistics, queries, large objects."""
    with connection.cursor(row_factory=class_row(Table)) as cursor:
        return cursor.execute(LIST_TABLES).fetchall()


def read_table(connection: Connection, table: Table) -> Iterator[tuple[str, Any]]:
    """Each value with its column's name, row after row, in constant memory.

    Raises:
        TableError: it cannot be read; the connection can go on.
    """
    query = sql.SQL("SELECT * FROM {}").format(sql.Identifier(table.schema, table.name))
    try:
        with connection.transaction(), connection.cursor(name="doctor") as cursor:
            cursor.itersize = BATCH
            cursor.execute(query)
            for row in cursor:
                for column, value in zip(cursor.description or (), row, strict=True):
                    yield column.name, value
    except psycopg.Error as error:
        raise TableError(type(error).__name__) from None


def list_types(connection: Connection) -> list[str]:
    """Types of the identifiers that are known."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_TYPES).fetchall()


def list_dataset_ids(connection: Connection) -> list[UUID]:
    """Datasets, each of which hashes the callers' record ids under a key of its own."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_DATASETS).fetchall()


def is_kept(connection: Connection, digests: Iterable[bytes], record_ids: Iterable[UUID]) -> bool:
    """Whether keyed hashes stay on purpose: of somebody who may not be trained on, or of an erased record (rule 19)."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        barred = cursor.execute(BARRED, {"digests": list(digests)}).fetchone()
        buried = cursor.execute(BURIED, {"record_ids": list(record_ids)}).fetchone()
    return bool(barred or buried)


def list_live_names(connection: Connection) -> list[str]:
    """Objects that must be there, with their keys."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_LIVE_NAMES).fetchall()


def get_bytes(connection: Connection) -> int:
    """The database's size."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(SIZE).fetchone() or 0


def get_clock(connection: Connection) -> float:
    """The database's clock, in seconds since 1970."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(CLOCK).fetchone() or 0.0
