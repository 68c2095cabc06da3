"""`python -m service.serving --host --port --name`: one model server."""

import argparse
import sys
from functools import partial

from service.logs import configure_logs
from service.serving.app import App
from service.serving.fleet import Fleet, FleetSettings
from service.serving.keys import Keys
from service.serving.lease import LeaseSettings
from service.serving.metrics import ServingMetrics
from service.serving.server import Server, serve
from service.serving.shell import Shell
from service.serving.weights import Weights
from service.settings import Settings, settings
from service.store.artifacts import open_artifacts
from shards.engine.determinism import prepare
from shards.engine.interface import ReaderFactory
from shards.engine.registry import open_reader

FENCED = 3
"""Exit code of a process whose lease was ended: start a new one."""


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
    program = Program(config, factory, host=host, port=port, name=name)
    serve(program.server)
    return FENCED if program.fenced else 0


class Program:
    """The composition of one model server."""

    def __init__(self, config: Settings, factory: ReaderFactory, *, host: str, port: int, name: str) -> None:
        """Nothing runs before `server.run()`."""
        self.fenced = False
        metrics = ServingMetrics()
        get = open_artifacts(config.artifact_url, config.file_keys_url).get
        self.fleet = Fleet(
            FleetSettings(LeaseSettings(config.database_url, name, config.lease_ttl_ms), config.listen_url),
            lambda replica: Weights(replica, get, factory, metrics),
            metrics,
            self._end,
        )
        answers = App(self.fleet, metrics, input_limit=config.record_limit_bytes)
        app = Shell(self.fleet, Keys(config.database_url), metrics, answers)
        self.server = Server(app, host=host, port=port, drain=config.drain_ms / 1000, leave=self._leave)

    def _leave(self) -> None:
        self.fleet.leaving = True

    def _end(self) -> None:
        self.fenced = True
        self.server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
