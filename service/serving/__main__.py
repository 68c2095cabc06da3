"""`python -m service.serving --host --port --name`: one model server."""

import argparse
import gc
import signal
import sys
from functools import partial

import uvicorn

from service.logs import configure_logs
from service.serving.app import App
from service.serving.fleet import Fleet, FleetSettings
from service.serving.keys import Keys
from service.serving.lease import LeaseSettings
from service.serving.metrics import ServingMetrics
from service.serving.wire import WireProtocol
from service.settings import Settings, settings
from service.store.artifacts import open_artifacts
from shards.engine.determinism import prepare
from shards.engine.interface import ReaderFactory
from shards.engine.registry import open_reader

FENCED = 3
"""Exit code of a process whose lease was ended: start a new one."""
GRACE = 20
"""Seconds that requests under way have when the server is asked to stop."""
SWITCH_INTERVAL = 0.001
"""Seconds after which a busy thread lets another one run: heartbeats and floors must not wait for computations."""


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM, SIGINT, or a fence; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.serving", description="Expunge's model server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8701)
    parser.add_argument("--name", default="server", help="shown in leases and logs")
    options = parser.parse_args(arguments)
    configure_logs(options.name)
    prepare()  # what is served and what was previewed are the same bits
    config = settings()
    return run(
        config,
        partial(open_reader, device=config.device),
        host=options.host,
        port=options.port,
        name=options.name,
    )


def run(config: Settings, factory: ReaderFactory, *, host: str, port: int, name: str) -> int:
    """Serve with the engine given, from the main thread; the exit code."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    program = Program(config, factory, host=host, port=port, name=name)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises what it caught again when it is done; a stop that was asked for is no failure.
        signal.signal(number, lambda _number, _frame: None)
    gc.freeze()  # imported modules live for ever; walking them would stop every answer
    program.server.run()
    return FENCED if program.fenced else 0


class Program:
    """The composition of one model server."""

    def __init__(self, config: Settings, factory: ReaderFactory, *, host: str, port: int, name: str) -> None:
        """Nothing runs before `server.run()`."""
        self.fenced = False
        metrics = ServingMetrics()
        self.fleet = Fleet(
            FleetSettings(LeaseSettings(config.database_url, name, config.lease_ttl_ms), config.listen_url),
            open_artifacts(config.artifact_url).get,
            factory,
            metrics,
            self._end,
        )
        app = App(self.fleet, Keys(config.database_url), metrics, input_limit=config.record_limit_bytes)
        self.server = uvicorn.Server(
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

    def _end(self) -> None:
        self.fenced = True
        self.server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
