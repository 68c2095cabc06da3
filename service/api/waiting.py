"""Answers that are held until a request has come far enough, so that no caller has to ask all the time."""

import asyncio
from collections.abc import Generator
from contextlib import aclosing, contextmanager, suppress
from enum import StrEnum
from uuid import UUID

from service.domain.errors import UnavailableError
from service.domain.requests import State
from service.logs import get_logger
from service.store.notices import request_notices

LONGEST = 4.0
"""Seconds that an answer is held at most: less than what the API has when it is asked to stop (5 s)."""
RETRY_SECONDS = 1.0


class Until(StrEnum):
    """What a caller may wait for."""

    DEACTIVATED = "deactivated"
    COMPLETED = "completed"


_BEFORE_DEACTIVATED = frozenset({State.RECEIVED, State.AWAITING_IDENTITY, State.AWAITING_APPROVAL, State.DEACTIVATING})
BEFORE = {
    Until.DEACTIVATED: _BEFORE_DEACTIVATED,
    Until.COMPLETED: _BEFORE_DEACTIVATED | {State.DEACTIVATED, State.ERASING},
}
"""The states from which it may still come by itself."""

log = get_logger(__name__)


class Held:
    """One held answer: what it waits for, and whether that may have come."""

    def __init__(self, before: frozenset[State], seconds: float) -> None:
        """`before`: the states in which to go on waiting, for so many seconds."""
        self.before = before
        self._come = asyncio.Event()
        self._until = asyncio.get_running_loop().time() + seconds

    def wake(self) -> None:
        """Have the request read again."""
        self._come.set()

    async def changed(self) -> bool:
        """Wait until the request should be read again; False when it was held long enough."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._until):
                await self._come.wait()
        come = self._come.is_set()
        self._come.clear()
        return come


class Waiting:
    """Who waits for which request. Postgres tells when to read it again; what is lost costs the caller another call."""

    def __init__(self, listen_url: str) -> None:
        """Connects to nothing yet."""
        self._url = listen_url
        self._held: dict[str, list[Held]] = {}
        """By request."""

    @contextmanager
    def hold(self, request_id: UUID, before: frozenset[State], seconds: float) -> Generator[Held]:
        """A place among those who are told. Take it before reading the state, so that no change is missed."""
        held = Held(before, seconds)
        place = self._held.setdefault(str(request_id), [])
        place.append(held)
        try:
            yield held
        finally:
            place.remove(held)
            if not place:
                del self._held[str(request_id)]

    async def listen(self) -> None:
        """Pass on what Postgres tells, until cancelled."""
        while True:
            try:
                async with aclosing(request_notices(self._url)) as notices:
                    async for notice in notices:
                        if notice is None:  # of what was told meanwhile nothing is known
                            for request_id in self._held:
                                self._wake(request_id)
                        else:
                            self._wake(*notice)
            except UnavailableError as error:
                log.warning("waiting_unheard", error=str(error))
                await asyncio.sleep(RETRY_SECONDS)

    def _wake(self, request_id: str, state: str | None = None) -> None:
        for held in self._held.get(request_id, ()):
            if state not in held.before:
                held.wake()
