"""The composition of one proxy."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.proxy.adapters import Adapters, Place
from service.proxy.app import App
from service.proxy.control import Control, Hook, OpenAI, Repository
from service.proxy.relay import Upstream
from service.serving.fleet import Fleet, FleetSettings
from service.serving.keys import Keys
from service.serving.lease import LeaseSettings
from service.serving.metrics import ServingMetrics
from service.serving.server import Server, serve
from service.serving.shell import Shell
from service.settings import Settings
from service.store.artifacts import open_artifacts

FENCED = 3
"""Exit code of a process whose lease was ended: start a new one."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `expunge proxy` was told."""

    upstream: Upstream
    speaks: str
    """`openai` or `oip`."""
    models: Collection[str]
    """Names of the models that it serves."""
    directory: Path
    hook: Sequence[str] = ()
    frees: bool = False
    host: str = "127.0.0.1"
    port: int = 8801
    name: str = "proxy"

    def control(self) -> Control:
        """How adapters get in and out."""
        if self.hook:
            return Hook(self.hook)
        headers = {"authorization": f"Bearer {self.upstream.key}"} if self.upstream.key else {}
        client = httpx.Client(base_url=self.upstream.url, headers=headers, trust_env=False)
        return OpenAI(client) if self.speaks == "openai" else Repository(client)


class Program:
    """One proxy: a fleet whose weights are elsewhere."""

    def __init__(self, config: Settings, options: Options) -> None:
        """Nothing runs before `server.run()`."""
        self.fenced = False
        metrics = ServingMetrics()
        get = open_artifacts(config.artifact_url, config.file_keys_url).get
        place = Place(options.control(), options.directory, options.frees)
        self.fleet = Fleet(
            FleetSettings(LeaseSettings(config.database_url, options.name, config.lease_ttl_ms), config.listen_url),
            lambda replica: Adapters(replica, get, place, metrics),
            metrics,
            self._end,
            lambda model: model.name in options.models,
        )
        answers = App(self.fleet, options.upstream, options.speaks, metrics)
        app = Shell(self.fleet, Keys(config.database_url), metrics, answers)
        drain = config.drain_ms / 1000
        self.server = Server(app, host=options.host, port=options.port, drain=drain, leave=self._leave)

    def _leave(self) -> None:
        self.fleet.leaving = True

    def _end(self) -> None:
        self.fenced = True
        self.server.should_exit = True


def run(config: Settings, options: Options) -> int:
    """Serve until SIGTERM, SIGINT or a fence; the exit code."""
    program = Program(config, options)
    serve(program.server)
    return FENCED if program.fenced else 0
