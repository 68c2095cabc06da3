"""The programs of `expunge up`, apart from the stores."""

import http.client
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from service.standalone.supervisor import Program

HOST = "127.0.0.1"
_SERVER_GRACE = 30.0
"""Seconds that a model server has to finish what runs (20 at most), free its memory and end its lease."""
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Exactness needs it of training; model servers would fight over the cores otherwise."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How many programs, and where they listen."""

    port: int = 8700
    """The API's; the model servers take the ones after it."""
    replicas: int = 2
    """Model servers."""
    trainers: int = 2
    """Workers of the `train` queue."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant, with `ValueError`."""
        if not 1 <= self.port <= 65535 - max(self.replicas, 0):
            raise ValueError(f"--port {self.port} leaves no room for {self.replicas} model servers below 65536")
        if self.replicas < 0 or self.trainers < 0:
            raise ValueError("the numbers of model servers and trainers cannot be negative")

    @property
    def api_url(self) -> str:
        """Where the control API answers."""
        return f"http://{HOST}:{self.port}"

    @property
    def servers(self) -> dict[str, int]:
        """The port of each model server, by name."""
        return {f"server-{number}": self.port + number for number in range(1, self.replicas + 1)}

    @property
    def ports(self) -> dict[str, int]:
        """Every port that must be free, by the name of the program that needs it."""
        return {"api": self.port, **self.servers}


def expunge_programs(shape: Shape, env: Mapping[str, str]) -> Sequence[Sequence[Program]]:
    """What is started, group after group; a group's programs start side by side."""
    api = _module("api", env, "service.api", "--host", HOST, "--port", str(shape.port))
    servers = [
        replace(
            _module(
                name,
                {**env, **_ONE_THREAD},
                "service.serving",
                "--host",
                HOST,
                "--port",
                str(port),
                "--name",
                name,
            ),
            ready=_answers(port, "/healthz"),
            grace=_SERVER_GRACE,
        )
        for name, port in shape.servers.items()
    ]
    trainers = [
        replace(_worker(f"train-{number}", "train", {**env, **_ONE_THREAD}), nice=10)
        for number in range(1, shape.trainers + 1)
    ]
    return (
        [replace(api, ready=_answers(shape.port, "/readyz"))],
        [
            _worker("plan", "plan", env),
            _module("loops", env, "workers.loops"),
            *servers,
            _worker("default", "default", env),
            *trainers,
        ],
    )


def _module(name: str, env: Mapping[str, str], module: str, *arguments: str) -> Program:
    return Program(name=name, argv=(sys.executable, "-m", module, *arguments), env=env)


def _worker(name: str, queue: str, env: Mapping[str, str]) -> Program:
    quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    options = ("-Q", queue, "--pool", "solo", "-n", f"{name}@%h", "--loglevel", "WARNING", *quiet)
    return _module(name, env, "celery", "-A", "workers.app", "worker", *options)


def _answers(port: int, path: str) -> Callable[[], bool]:
    """A check that a GET is answered with 200."""

    def check() -> bool:
        connection = http.client.HTTPConnection(HOST, port, timeout=1.0)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return check
