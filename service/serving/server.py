"""The HTTP server of a program that answers: uvicorn on our wire, which is left by balancers before it stops."""

import gc
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from service.serving.wire import WireProtocol

GRACE = 20
"""Seconds that requests under way have when the server has stopped listening."""
SWITCH_INTERVAL = 0.001
"""Seconds after which a busy thread lets another one run: heartbeats and floors must not wait for computations."""


class Server(uvicorn.Server):
    """At the first signal it says that it is not ready and answers on for a while; then it stops as uvicorn does.

    A balancer goes on sending requests until its health check has seen the change, and a listening socket that
    closed before would fail them.
    """

    def __init__(self, app: Any, *, host: str, port: int, drain: float, leave: Callable[[], None]) -> None:
        """`leave` turns readiness off, `drain` seconds before the socket closes."""
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                loop="uvloop",
                http=WireProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self._drain = drain
        self._leave = leave
        self._stop_at = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Leave first; a second signal stops at once."""
        if self._stop_at < float("inf") or not self._drain:
            super().handle_exit(sig, frame)
            return
        self._leave()
        self._stop_at = time.monotonic() + self._drain

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        return time.monotonic() >= self._stop_at or await super().on_tick(counter)


def serve(server: Server) -> None:
    """Run from the main thread until SIGTERM or SIGINT."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises what it caught again when it is done; a stop that was asked for is no failure.
        signal.signal(number, lambda _number, _frame: None)
    gc.freeze()  # imported modules live for ever; walking them would stop every answer
    server.run()
