"""Model servers behind a real haproxy with the configuration that we ship: they come and go, and no request fails."""

import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg
import pytest
from conftest import Database
from serving_kit import Client, Toy, free_port, wait_until

from service.store import barrier

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[1]
CLIENTS = 4


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Toy:
    found = Toy(database.owner_url, database.app_url, tmp_path / "artifacts")
    found.create()
    found.add_toy_stage("a", 1.0, shard=0)
    found.add_toy_stage("b", -3.0, shard=1)
    found.publish("a", "b", cause="train")
    return found


@pytest.fixture(scope="session")
def haproxy() -> tuple[str, dict[str, str]]:
    """The program; where none can be had the test is skipped, but not in CI."""
    tool = runpy.run_path(str(ROOT / "tools" / "balancer.py"))
    try:
        return tool["find"]()
    except tool["NoBalancerError"] as why:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no haproxy: {why}")


@contextmanager
def replica(toy: Toy, port: int, *, drain_ms: int = 1500) -> Iterator[subprocess.Popen[bytes]]:
    kit = ROOT / "tests" / "serving_kit.py"
    environment = {**os.environ, **toy.environment(drain_ms=drain_ms, lease_ttl_ms=4000), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(kit), str(port), f"server-{port}"], env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def balancer(haproxy: tuple[str, dict[str, str]], directory: Path, ports: list[int]) -> Iterator[int]:
    """haproxy with the shipped configuration, but for its addresses."""
    front = free_port()
    shipped = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
    servers = "".join(f"    server server-{port} 127.0.0.1:{port}\n" for port in ports)
    changed = re.sub(r"( +server server-\d+ .*\n)+", servers, shipped.replace("bind :8790", f"bind 127.0.0.1:{front}"))
    assert changed.count("127.0.0.1:") == len(ports) + 1
    config = directory / "haproxy.cfg"
    config.write_text(changed)
    program, variables = haproxy
    process = subprocess.Popen([program, "-db", "-q", "-f", str(config)], env={**os.environ, **variables})
    try:
        yield front
    finally:
        process.kill()
        process.wait()


@dataclass
class Load:
    """Clients that ask without a pause; what came of it."""

    url: str
    token: str
    deactivated: int = 0
    """Set when a version was declared: what is asked afterwards must not come from below."""
    answers: Counter[int] = field(default_factory=Counter)
    """By version."""
    failures: list[str] = field(default_factory=list)
    stale: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def more(self, count: int = 100) -> None:
        """Wait for so many further answers."""
        known = self.answers.total()
        wait_until(lambda: self.failures or self.answers.total() > known + count, seconds=30)

    def _ask(self) -> None:
        headers = {"authorization": f"Bearer {self.token}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=20, trust_env=False) as client:
            while not self._stop.is_set():
                least = self.deactivated
                try:
                    answer = client.post("/v1/models/toy/predict", json={"inputs": ["a text"]})
                except httpx.HTTPError as error:
                    self.failures.append(type(error).__name__)
                    continue
                if answer.status_code != 200:
                    self.failures.append(f"{answer.status_code} {answer.text}")
                    continue
                version = answer.json()["version"]
                self.answers[version] += 1
                self.stale += version < least


def declare(toy: Toy, floor: int) -> None:
    """The barrier in short (rule 9)."""
    until = time.monotonic() + 4.5
    while True:
        with psycopg.connect(toy.app_url) as connection:
            over = time.monotonic() > until
            late = {row.process_id: row.beats for row in barrier.look(connection)[2]} if over else {}
            if barrier.declare(connection, toy.model_id, floor, expired=late) is not None:
                return
        time.sleep(0.01)


def ready(port: int, toy: Toy) -> Callable[[], bool]:
    def check() -> bool:
        with Client(port, toy) as client:
            return client.ready()

    return check


def test_replicas_come_and_go_under_load_and_no_request_fails(
    toy: Toy, haproxy: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        servers = [stack.enter_context(replica(toy, port)) for port in ports[:2]]
        front = stack.enter_context(balancer(haproxy, tmp_path, ports))
        for port in (*ports[:2], front):
            wait_until(ready(port, toy), seconds=30)
        load = Load(f"http://127.0.0.1:{front}", toy.token)
        with load.running():
            load.more()
            servers.append(stack.enter_context(replica(toy, ports[2])))  # one is added
            wait_until(ready(ports[2], toy), seconds=30)
            wait_until(lambda: asked(ports[2], toy) > 20)
            servers[0].send_signal(signal.SIGTERM)  # one is taken away
            load.more()
            assert servers[0].wait(20) == 0
            floor = toy.publish("a", None, taint=1)  # a deactivation
            declare(toy, floor)
            load.deactivated = floor
            load.more()
            for _ in range(5):  # rebuilds
                version = toy.publish("a", None, cause="train")
            wait_until(lambda: load.failures or load.answers[version] > 20, seconds=20)
            servers[1].kill()  # and one dies
            load.more(300)
    assert load.failures == []
    assert load.stale == 0
    assert load.answers[1] > 0


def asked(port: int, toy: Toy) -> float:
    with Client(port, toy) as client:
        found = re.search(r'expunge_predictions_total\{.*result="answered"\} (\S+)', client.get("/metrics").text)
    return float(found[1]) if found else 0


def test_a_server_that_is_asked_to_stop_says_so_and_answers_on(toy: Toy) -> None:
    port = free_port()
    with replica(toy, port, drain_ms=4000) as process, Client(port, toy) as client:
        wait_until(ready(port, toy), seconds=30)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/readyz").status_code == 503, seconds=2)
        assert "about to stop" in client.get("/readyz").json()["detail"]
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/healthz").status_code == 200
        answers = 0
        while time.monotonic() < began + 2.5:
            answer = client.predict()
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            answers += 1
        assert answers > 10
        assert process.wait(10) == 0
        assert time.monotonic() > began + 4
    assert toy.leases()[0]["freed_at"] is not None


def test_a_second_signal_does_not_wait(toy: Toy) -> None:
    port = free_port()
    with replica(toy, port, drain_ms=60_000) as process, Client(port, toy) as client:
        wait_until(ready(port, toy), seconds=30)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/readyz").status_code == 503)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
