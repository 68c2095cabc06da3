"""One answer from the upstream, behind the fence: asked for under the pointer's name, checked before it is written.

Where the floor rises meanwhile the call to the upstream is dropped at once. An answer that is not begun is asked for
again under the new name; a stream that is begun is cut (protocol.md, section 1).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import TypeVar

import httpx

from service.proxy.adapters import adapter_name
from service.proxy.forms import Form, Texts, events, refused, render, render_event
from service.serving.answers import Answer, ProblemError, unavailable
from service.serving.completions import DONE
from service.serving.incoming import Call, DisconnectedError
from service.serving.metrics import ServingMetrics
from service.serving.predict import ATTEMPTS, Served, begin, check_live, check_version, note_failure, respond
from service.serving.replica import Pointer, Replica
from service.serving.stream import CUT, Stream

T = TypeVar("T")

CONNECT = 5.0
"""Seconds."""
IDLE = 2.0
"""Seconds that an idle connection is kept: less than servers keep theirs, or one would close as it is used."""
AT_ONCE = 256
"""Calls under way to an upstream."""
ANSWER_LIMIT = 32 * 2**20
"""Bytes of a whole answer."""
POLL = 0.02
"""Seconds between looks for a version that is being loaded."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where answers come from."""

    url: str
    key: str
    """A bearer token; empty: none is sent."""
    seconds: float
    """How long it may say nothing."""
    patience: float
    """How long a call waits, in seconds, for a version that is being loaded after a deactivation."""
    answers_as: str = ""
    """The model that its answers name where that is not the one asked for; empty: it is."""

    def client(self) -> httpx.AsyncClient:
        """Connections to it; nothing is ever sent twice."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = httpx.Timeout(self.seconds, connect=CONNECT, pool=CONNECT)
        limits = httpx.Limits(max_connections=AT_ONCE, keepalive_expiry=IDLE)
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=timeout, limits=limits, trust_env=False)


@dataclass(frozen=True, slots=True)
class Relay:
    """Answers calls from an upstream. Loop thread only."""

    upstream: Upstream
    client: httpx.AsyncClient
    metrics: ServingMetrics

    async def whole(self, served: Served, form: Form, call: Call) -> str:
        """Answer in one piece; the result for metrics.

        Raises:
            ProblemError: nothing was sent.
        """

        async def work(pointer: Pointer) -> Answer | None:
            _check(served.replica, pointer, form, call)
            try:
                with served.outbox.watched(pointer.version) as risen:
                    answer = await unless(risen, self._asked(form, pointer))
            except ProblemError:
                if not is_below(served.replica, pointer):
                    raise
                answer = None
            if answer is None or is_below(served.replica, pointer):
                await self.settled(served.replica)
                return None
            return answer

        await self.settled(served.replica)
        return await respond(served, work, call, self.metrics)

    async def stream(self, served: Served, form: Texts, call: Call) -> str:
        """Answer event by event; the result for metrics.

        Raises:
            ProblemError: nothing was sent.
            DisconnectedError: the client went away.
        """
        started = time.monotonic()
        out = Stream(served, call)
        for _ in range(ATTEMPTS):
            await self.settled(served.replica)
            problem = await self._told(served, form, call, out)
            if problem is None:
                self.metrics.duration.labels(form.model).observe(time.monotonic() - started)
                return "answered"
            if out.begun:
                await out.break_off(problem)
                return problem.slug
            self.metrics.recomputed.labels(form.model).inc()
        raise unavailable("not-serving", "the floor rose again with every attempt; try again")

    async def settled(self, replica: Replica) -> None:
        """Wait while no version is loaded, which an upstream takes a while for after the floor rose."""
        until = time.monotonic() + self.upstream.patience
        # The pointer moves on another thread.
        while replica.pointer is None and replica.leased and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(POLL)

    async def _told(self, served: Served, form: Texts, call: Call, out: Stream) -> ProblemError | None:
        """Stream from the newest version; why it stopped before its end, if it did."""
        replica = served.replica
        pointer = begin(replica, call.wish)
        try:
            _check(replica, pointer, form, call)
            with served.outbox.watched(pointer.version) as risen:
                async with aclosing(self._parts(form, pointer)) as parts:
                    while (part := await unless(risen, anext(parts))) is not None:
                        if call.wire.gone:
                            raise DisconnectedError
                        last = part.endswith(DONE)
                        if not await out.part(pointer, part, last=last):
                            break
                        if last:
                            self.metrics.count(form.model, pointer.version, "answered")
                            return None
            return unavailable("cut", CUT)
        except ProblemError as problem:
            if not is_below(replica, pointer):
                note_failure(replica, pointer, problem, self.metrics)
            if out.begun:
                return ProblemError(problem.status, problem.slug, problem.detail)
            if is_below(replica, pointer):
                return unavailable("cut", CUT)
            raise
        finally:
            replica.abandon(pointer.version)

    async def _asked(self, form: Form, pointer: Pointer) -> Answer:
        name = adapter_name(form.model, pointer.version)
        try:
            async with self._sent(form, name) as response:
                content = await _content(response)
        except httpx.HTTPError as error:
            raise broken(error) from None
        if response.status_code != 200:
            raise refused(response.status_code, content, form, name)
        return render(form, content, self.upstream.answers_as or name, pointer)

    async def _parts(self, form: Texts, pointer: Pointer) -> AsyncGenerator[bytes]:
        """The upstream's events as ours; the last one is the protocol's end, or a problem is raised."""
        name = adapter_name(form.model, pointer.version)
        try:
            async with self._sent(form, name) as response:
                if response.status_code != 200:
                    raise refused(response.status_code, await _content(response), form, name)
                async with aclosing(events(response.aiter_bytes())) as told:
                    async for data in told:
                        if data == b"[DONE]":
                            yield DONE
                            return
                        yield render_event(form, data, self.upstream.answers_as or name, pointer)
        except httpx.HTTPError as error:
            raise broken(error) from None
        raise ProblemError(502, "upstream-hung-up", "the server behind the proxy ended its answer before its end")

    def _sent(self, form: Form, name: str) -> AbstractAsyncContextManager[httpx.Response]:
        headers = {"content-type": "application/json"} if form.method == "POST" else {}
        return self.client.stream(form.method, form.address(name), content=form.content(name), headers=headers)


async def unless(risen: asyncio.Event, work: Coroutine[None, None, T]) -> T | None:
    """What `work` returns; None, and `work` is dropped, where the floor has risen first."""
    asking, rising = asyncio.ensure_future(work), asyncio.ensure_future(risen.wait())
    try:
        await asyncio.wait({asking, rising}, return_when=asyncio.FIRST_COMPLETED)
        return None if risen.is_set() else asking.result()
    finally:
        for task in (asking, rising):
            task.cancel()
        await asyncio.gather(asking, rising, return_exceptions=True)


def is_below(replica: Replica, pointer: Pointer) -> bool:
    """Whether the floor has risen above the version since work on it began."""
    return pointer.version < replica.fence.local_floor


def broken(error: httpx.HTTPError) -> ProblemError:
    """A failed call as a problem."""
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout():
            return ProblemError(502, "upstream-unreachable", "the server behind the proxy cannot be reached; is it up?")
        case httpx.PoolTimeout():
            return unavailable("overloaded", f"{AT_ONCE} calls to the server behind the proxy are under way; try again")
        case httpx.TimeoutException():
            detail = "the server behind the proxy said nothing for too long; ask for less, or raise --timeout"
            return ProblemError(504, "upstream-timeout", detail)
        case _:
            return ProblemError(
                502, "upstream-hung-up", "the server behind the proxy broke off before its answer's end"
            )


def _check(replica: Replica, pointer: Pointer, form: Form, call: Call) -> None:
    check_version(pointer, call.least)
    form.check(pointer)
    check_live(replica, pointer)


async def _content(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > ANSWER_LIMIT:
            detail = f"the server behind the proxy answers with more than {ANSWER_LIMIT} bytes; ask for less"
            raise ProblemError(502, "upstream-failed", detail)
    return bytes(content)
