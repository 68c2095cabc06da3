"""Answers that are made while they are sent, and let go of all they hold as soon as nobody reads on."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from anyio import CancelScope, fail_after
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from service.logs import get_logger

STALL_SECONDS = 30.0
"""How long a reader may take nothing; less than the database waits for the next piece."""

log = get_logger(__name__)


class Source(Protocol):
    """Pieces of an answer, made one by one in a thread."""

    def __iter__(self) -> Iterator[bytes]:
        """The pieces, once."""
        ...

    def close(self) -> None:
        """Called once after the last piece that anybody wants, whatever happened."""
        ...


class Streamed(StreamingResponse):
    """Sends a source's pieces. A reader who hangs up or stalls, and a source that fails, end the connection."""

    def __init__(self, source: Source, *, media_type: str, headers: Mapping[str, str]) -> None:
        """Takes the source over, close included."""
        super().__init__(iter(source), headers=headers, media_type=media_type)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send; without its end the answer is seen to be cut, so a failure needs no word in it."""

        async def bounded(message: Message) -> None:
            with fail_after(STALL_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, bounded)
        except Exception as error:  # noqa: BLE001 - the status is sent: what is left is to end it, and to say why
            log.warning("stream_cut", error=type(error).__qualname__)
        finally:
            with CancelScope(shield=True):
                await run_in_threadpool(self._source.close)
