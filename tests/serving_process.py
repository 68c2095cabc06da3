"""Model servers as processes of their own, the real barrier, and a way to Postgres that can be held up.

`python tests/serving_process.py PORT NAME KIND` is a model server with a toy engine of one of `KINDS`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from serving_kit import Client, Tensor, Toy, ToyEngine, free_port, wait_until

from service.serving.__main__ import run
from service.serving.weights import Weights
from service.settings import Settings
from service.store.database import make_pool
from service.store.leases import Target
from shards.digest import sha256_hex
from workers.barrier import Barrier
from workers.loops import PASSING

TTL = 2.0
MARGIN = 0.1
HEAVY = 64 * 2**20
"""Bytes of a heavy stage: malloc gives such pieces back to the kernel at once."""


class Slow(ToyEngine):
    pace = 1.2


class Slower(ToyEngine):
    pace = 4.0


class Busy(ToyEngine):
    pace = 0.01


class HeavyTensor(Tensor):
    def __init__(self, weight: float) -> None:
        super().__init__(weight)
        self.ballast = np.full(HEAVY, 1, np.uint8)


class Heavy(ToyEngine):
    """A stage takes `HEAVY` bytes of memory."""

    def load(self, digest: str, data: bytes) -> None:
        assert sha256_hex(data) == digest
        with self._lock:
            self._tensors[digest] = HeavyTensor(json.loads(data)["weight"])


def deafen() -> None:
    """A program with a fault: it renews its lease and never swaps once it serves."""
    real = Weights.apply

    def apply(self: Weights, target: Target) -> bool:
        return self._replica.pointer is not None or real(self, target)

    Weights.apply = apply  # type: ignore[method-assign]


KINDS: Mapping[str, type[ToyEngine]] = {
    "toy": ToyEngine, "slow": Slow, "slower": Slower, "busy": Busy, "heavy": Heavy, "deaf": ToyEngine,
}  # fmt: skip


class Server(subprocess.Popen[bytes]):
    """A model server that a test may stop, wake and kill."""

    def pause(self) -> None:
        self.send_signal(signal.SIGSTOP)
        wait_until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def wake(self) -> None:
        self.send_signal(signal.SIGCONT)

    def resident(self) -> int:
        """Bytes of memory that are really there."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def replica(
    toy: Toy, kind: str = "toy", *, ttl: float = TTL, database_url: str = "", ready: bool = True
) -> Iterator[tuple[Client, Server]]:
    """A process with a toy engine; `kind` "real" is the program itself."""
    port = free_port()
    command = [__file__, str(port), "child", kind]
    if kind == "real":
        command = ["-m", "service.serving", "--port", str(port), "--name", "child"]
    environment = {
        **os.environ,
        **toy.environment(lease_ttl_ms=int(ttl * 1000)),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    if database_url:
        environment["EXPUNGE_DATABASE_URL"] = database_url
    process = Server([sys.executable, *command], env=environment)
    try:
        with Client(port, toy) as client:
            wait_until(
                (lambda: client.ready() and client.version() > 0) if ready else lambda: _alive(client), seconds=60
            )
            yield client, process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _alive(client: Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def barrier(toy: Toy, *, ttl: float = TTL) -> Iterator[None]:
    """The real barrier, that has known this Postgres for long: acknowledgements count at once."""
    stop = threading.Event()
    pool = make_pool(toy.app_url, size=1)
    pool.open()
    watching = Barrier(pool, margin=MARGIN, ttl=ttl)
    watching.look()
    watching._clocks.since = float("-inf")

    def watch() -> None:
        while not stop.wait(0.005):
            with suppress(*PASSING):  # as the program does
                watching.look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        pool.close()


def cleared(toy: Toy) -> int:
    """The highest floor whose requests a client reads as `deactivated`."""
    with toy.connect() as connection:
        row = connection.execute("select cleared from model where model_id = %s", (toy.model_id,)).fetchone()
    assert row is not None
    return row[0]


def deactivated(toy: Toy, *members: str | None, taint: int | None = None, seconds: float = 10.0) -> tuple[int, float]:
    """Deactivate and wait until the barrier has said so: the floor, and the seconds that it took."""
    started = time.monotonic()
    floor = toy.publish(*members, taint=taint)
    wait_until(lambda: cleared(toy) >= floor, seconds=seconds)
    return floor, time.monotonic() - started


def cut_connections(toy: Toy) -> int:
    """End all sessions of the programs' role on the server's side."""
    with toy.connect() as connection:
        query = (
            "select count(pg_terminate_backend(pid)) from pg_stat_activity"
            " where datname = current_database() and usename = 'expunge_app'"
        )
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


@dataclass
class Pipe:
    """A way to Postgres: `open` lets bytes pass, `delay` holds back what Postgres says by so many seconds."""

    url: str
    open: threading.Event = field(default_factory=threading.Event)
    delay: float = 0.0

    @classmethod
    @contextmanager
    def to(cls, database_url: str) -> Iterator["Pipe"]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            parts = {"host": "127.0.0.1", "port": port, "sslmode": "disable", "gssencmode": "disable"}
            pipe = cls(make_conninfo(database_url, **parts))
            pipe.open.set()
            threading.Thread(target=pipe._accept, args=(listener, database_url), daemon=True).start()
            try:
                yield pipe
            finally:
                pipe.open.set()
                with suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket, database_url: str) -> None:
        with suppress(OSError):
            while True:
                near = listener.accept()[0]
                threading.Thread(target=self._carry, args=(near, _connected(database_url)), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            questions = threading.Thread(target=self._pump, args=(near, far, 0), daemon=True)
            questions.start()
            self._pump(far, near, 1)
            questions.join()

    def _pump(self, source: socket.socket, sink: socket.socket, share: int) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                due = time.monotonic() + share * self.delay
                self.open.wait()
                time.sleep(max(0.0, due - time.monotonic()))
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _connected(database_url: str) -> socket.socket:
    parts = conninfo_to_dict(database_url)
    host, port = str(parts["host"]), int(parts.get("port") or 5432)
    if not host.startswith("/"):
        return socket.create_connection((host, port))
    found = socket.socket(socket.AF_UNIX)
    found.connect(f"{host}/.s.PGSQL.{port}")
    return found


def put_out(toy: Toy, *names: str, state: str = "doomed") -> None:
    """Take stages out of service (or, `live`, back) without a tombstone: what a deactivation then publishes."""
    keys = [toy.stages[name][0] for name in names]
    with psycopg.connect(toy.owner_url) as connection:
        connection.execute("update artifact set state = %s::artifact_state where stage_key = any(%s)", (state, keys))


if __name__ == "__main__":
    if sys.argv[3] == "deaf":
        deafen()
    sys.exit(run(Settings(), KINDS[sys.argv[3]], host="127.0.0.1", port=int(sys.argv[1]), name=sys.argv[2]))
