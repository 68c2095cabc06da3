"""What Postgres tells of requests: a hint that a state has changed, never the state itself."""

from collections.abc import AsyncGenerator
from typing import LiteralString

import psycopg

from service.domain.errors import UnavailableError
from service.store.database import GUARDS, KEEPALIVE

LISTEN: LiteralString = "LISTEN expunge_request"


async def request_notices(url: str) -> AsyncGenerator[tuple[str, str] | None]:
    """None as soon as nothing is missed any more, then a request's id and new state at each change.

    `url`: direct to the primary, since LISTEN does not pass poolers. `targets.MARK_REQUESTS` sends them.

    Raises:
        UnavailableError: Postgres does not answer within 5 s, or the connection broke.
    """
    try:
        async with await psycopg.AsyncConnection.connect(
            url, autocommit=True, options=GUARDS, connect_timeout=5, **KEEPALIVE
        ) as connection:
            await connection.execute(LISTEN)
            yield None
            async for notice in connection.notifies():
                request_id, _, state = notice.payload.partition(" ")
                yield request_id, state
    except psycopg.Error as error:
        raise UnavailableError(
            "Postgres does not answer; check EXPUNGE_DATABASE_LISTEN_URL and that it runs"
        ) from error
