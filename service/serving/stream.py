"""An answer in parts: a final check before every part that is written, and what becomes of one that does not pass."""

import asyncio
from contextlib import suppress

from service.serving import completions
from service.serving.answers import ProblemError, provenance
from service.serving.incoming import Call, DisconnectedError
from service.serving.predict import Served
from service.serving.replica import Pointer

CUT = "the version that began this answer is out of service, or this server's lease has run out: ask again"
CLOSING = 1.0
"""Seconds that a cut connection has to close."""


class Stream:
    """A response in parts, each of which passes a final check of its own (rule 7)."""

    def __init__(self, served: Served, call: Call) -> None:
        """Nothing is sent before the first part."""
        self.begun = False
        """Whether anything was sent: from then on the answer cannot start again."""
        self._served = served
        self._call = call

    async def part(self, pointer: Pointer, data: bytes, *, last: bool) -> bool:
        """Check, and write in the same event-loop step; False where the check did not pass.

        The part counts against `covers` until the kernel has it, or the rising floor has taken it back (False, too).

        Raises:
            DisconnectedError: the connection is gone.
        """
        replica, wire = self._served.replica, self._call.wire
        if not data:  # a step that tells nothing yet
            return replica.may_answer(pointer.version)
        await wire.drained()  # of an earlier answer on the connection
        if not self.begun and replica.may_answer(pointer.version):
            self.begun = True
            head = [(b"content-type", completions.EVENTS), (b"cache-control", b"no-store"), *provenance(pointer)]
            await self._call.send({"type": "http.response.start", "status": 200, "headers": head})
            await wire.drained()
        if wire.gone:
            raise DisconnectedError
        # From here to the write nothing is awaited.
        if not replica.check_part(pointer.version):
            return False
        try:
            await self._call.send({"type": "http.response.body", "body": data, "more_body": not last})
            if wire.paused:
                if replica.fence.local_floor > pointer.version:
                    wire.abort()
                await self._served.outbox.drained(pointer.version, wire)
        finally:
            replica.sent(pointer.version)
        return not wire.aborted

    async def break_off(self, problem: ProblemError) -> None:
        """Say why, which holds nothing of the answer, and close the connection without the protocol's end."""
        data = completions.event(completions.error_body(problem))
        wire = self._call.wire
        await self._call.send({"type": "http.response.body", "body": data, "more_body": True})
        await wire.drained()
        wire.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSING):
                await self._call.receive()
