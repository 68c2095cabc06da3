"""Connections and transactions: only `transaction` commits."""

import random
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import errors
from psycopg.rows import TupleRow
from psycopg_pool import ConnectionPool, PoolTimeout

from service.domain.errors import UnavailableError

Connection = psycopg.Connection[TupleRow]
Pool = ConnectionPool[Connection]
T = TypeVar("T")

# jit: compiling a plan takes longer than any query here.
GUARDS = "-c lock_timeout=2000 -c idle_in_transaction_session_timeout=5000 -c timezone=UTC -c jit=off"
KEEPALIVE: dict[str, Any] = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
    "tcp_user_timeout": 5000,
}
RETRYABLE = (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable)
ATTEMPTS = 3
NOW: LiteralString = "SELECT clock_timestamp()"


def connect(url: str, *, autocommit: bool = False) -> Connection:
    """One connection with the project's guards; for listeners, leases and workers.

    Raises:
        UnavailableError: Postgres does not answer within 5 s.
    """
    try:
        return psycopg.connect(url, autocommit=autocommit, options=GUARDS, connect_timeout=5, **KEEPALIVE)
    except psycopg.OperationalError as error:
        raise UnavailableError("Postgres does not answer; check EXPUNGE_DATABASE_URL and that it runs") from error


def make_pool(url: str, *, size: int, checked: bool = True) -> Pool:
    """A closed pool of `size` connections; open it after any fork. A caller waits 2 s for one, then gets 503.

    `checked` connections are tried before each use, so that a restart of Postgres costs callers nothing; where a
    failed step is simply rung again, the round trip is saved.
    """
    options: dict[str, Any] = {"options": GUARDS, "connect_timeout": 5, **KEEPALIVE}
    return ConnectionPool(
        url,
        min_size=1,
        max_size=size,
        open=False,
        timeout=2.0,
        kwargs=options,
        check=ConnectionPool.check_connection if checked else None,
    )


@contextmanager
def transaction(pool: Pool) -> Generator[Connection]:
    """One transaction: commits at the end of the block, rolls back on any exception.

    Raises:
        UnavailableError: no connection within the pool's timeout, or the connection broke. A broken COMMIT may have
            taken effect: never run the block again blindly (protocol.md section 4).
    """
    try:
        with pool.connection() as connection:
            yield connection
    except (PoolTimeout, psycopg.OperationalError) as error:
        if isinstance(error, RETRYABLE):
            raise
        raise UnavailableError(
            "Postgres does not answer; nothing was changed, or the change stands: read it again"
        ) from error


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
