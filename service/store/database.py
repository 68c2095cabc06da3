"""Connections and transactions: only `transaction` commits."""

import random
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import errors
from psycopg.rows import RowFactory, TupleRow
from psycopg_pool import ConnectionPool, PoolTimeout

from service.domain.errors import UnavailableError

Connection = psycopg.Connection[TupleRow]
Pool = ConnectionPool[Connection]
T = TypeVar("T")

# jit: compiling a plan takes longer than any query here. synchronous_commit: what was told must stand (protocol.md,
# rules 3 and 12), whatever the database's own default; a heartbeat alone turns it off. plan_cache_mode: planning takes
# longer than most of these queries, so a connection plans each once. enable_seqscan: a plan outlives the hour in which
# a table was small, and each query has its index (tests/test_store_schema.py).
GUARDS = (
    "-c lock_timeout=2000 -c idle_in_transaction_session_timeout=5000 -c synchronous_commit=on "
    "-c timezone=UTC -c jit=off -c plan_cache_mode=force_generic_plan -c enable_seqscan=off"
)
KEEPALIVE: dict[str, Any] = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
    "tcp_user_timeout": 5000,
}
RETRYABLE = (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable)
ATTEMPTS = 3
NOW: LiteralString = "SELECT clock_timestamp()"
SHUT = {
    "57Q01": "the installation is in quarantine, since its stores are not of one moment: nothing is taken in or served"
    " before the operator has run `expunge restore` (docs/restore.md)",
    "57Q02": "Postgres was started or put back and is being compared with the ledger: try again in a moment; if it"
    " lasts, see that `workers.loops` runs (docs/restore.md)",
}
"""What the triggers of revision 0012 raise: by SQLSTATE."""


class QuarantineError(UnavailableError):
    """The database may do nothing: it was not compared with the ledger's files, or is older than they are."""


def connect(url: str, *, autocommit: bool = False) -> Connection:
    """One connection with the project's guards; for listeners, leases and workers.

    Raises:
        UnavailableError: Postgres does not answer within 5 s.
    """
    try:
        return psycopg.connect(url, autocommit=autocommit, options=GUARDS, connect_timeout=5, **KEEPALIVE)
    except psycopg.OperationalError as error:
        raise UnavailableError("Postgres does not answer; check EXPUNGE_DATABASE_URL and that it runs") from error


def make_pool(url: str, *, size: int, checked: bool = True, options: str = "") -> Pool:
    """A closed pool of `size` connections; open it after any fork. A caller waits 2 s for one, then gets 503.

    `checked` connections are tried before each use, so that a restart of Postgres costs callers nothing; where a
    failed step is simply rung again, the round trip is saved. `options` are libpq's, beside the project's guards.
    """
    arguments: dict[str, Any] = {"options": f"{GUARDS} {options}", "connect_timeout": 5, **KEEPALIVE}
    return ConnectionPool(
        url,
        min_size=1,
        max_size=size,
        open=False,
        timeout=2.0,
        kwargs=arguments,
        check=ConnectionPool.check_connection if checked else None,
    )


@contextmanager
def transaction(pool: Pool) -> Generator[Connection]:
    """One transaction: commits at the end of the block, rolls back on any exception.

    Raises:
        UnavailableError: no connection within the pool's timeout, or the connection broke. A broken COMMIT may have
            taken effect: never run the block again blindly (protocol.md section 4).
        QuarantineError: nothing may be changed before the operator has restored.
    """
    try:
        with pool.connection() as connection:
            yield connection
    except (PoolTimeout, psycopg.OperationalError) as error:
        if isinstance(error, RETRYABLE):
            raise
        if error.sqlstate in SHUT:
            raise QuarantineError(SHUT[error.sqlstate]) from error
        raise UnavailableError(
            "Postgres does not answer; nothing was changed, or the change stands: read it again"
        ) from error


def ask(
    connection: Connection, query: LiteralString, values: Mapping[str, Any], row: RowFactory[T]
) -> Callable[[], list[T]]:
    """Send a query; what is returned gives its rows, once.

    In a pipeline all that is asked before the first answer is taken shares one round trip.
    """
    cursor = connection.cursor(row_factory=row)
    cursor.execute(query, values)
    return cursor.fetchall


def get_time(connection: Connection) -> datetime:
    """The database's clock now: the one that every recorded time is of."""
    (now,) = connection.execute(NOW).fetchall()[0]
    return now


def retrying(step: Callable[[], T]) -> T:
    """Run a whole transaction again, with jitter, after a deadlock, serialization failure or lock timeout."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return step()
        except RETRYABLE:
            if attempt == ATTEMPTS:
                raise
            time.sleep(random.uniform(0.005, 0.05) * attempt)  # noqa: S311 - jitter, not a secret
    raise AssertionError
