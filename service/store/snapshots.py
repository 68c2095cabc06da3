"""Long reads: a few connections of their own, so that none of them ever takes one from the pool of the calls."""

from collections.abc import Generator
from contextlib import contextmanager
from threading import BoundedSemaphore
from typing import LiteralString

import psycopg

from service.domain.errors import UnavailableError
from service.store.database import Connection, connect

MOST = 2
"""Snapshots that one process holds at most; the connection budget is protocol.md section 9's."""

# A statement is one FETCH of some rows; between two of them a reader may be slow, but not for ever.
BEGIN: LiteralString = """
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY;
SET LOCAL statement_timeout = '60s';
SET LOCAL idle_in_transaction_session_timeout = '60s'
"""


class Snapshots:
    """Read-only snapshots of the database, `MOST` at a time."""

    def __init__(self, url: str) -> None:
        """Connects at each snapshot anew: they are rare, and closing ends whatever still runs."""
        self._url = url
        self._free = BoundedSemaphore(MOST)

    @contextmanager
    def open(self) -> Generator[Connection]:
        """One snapshot until the end of the block; its connection is closed then, whatever it does.

        Raises:
            UnavailableError: all are taken, or Postgres does not answer or ended the read.
        """
        if not self._free.acquire(blocking=False):
            raise UnavailableError(f"{MOST} exports run here already: try again when one of them has ended")
        try:
            connection = connect(self._url)
            try:
                connection.execute(BEGIN)
                yield connection
            finally:
                connection.close()
        except psycopg.OperationalError as error:
            raise UnavailableError("Postgres ended the read: ask again, for a shorter range if it was slow") from error
        finally:
            self._free.release()
