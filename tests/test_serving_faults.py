"""Model servers as processes of their own that are stopped, killed and fenced; the barrier's SQL is the real one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from conftest import Database
from serving_kit import Client, Toy, free_port, wait_until

from service.store import barrier

pytestmark = pytest.mark.integration
TTL = 0.8


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Toy:
    found = Toy(database.owner_url, database.app_url, tmp_path / "artifacts")
    found.create()
    found.add_toy_stage("a", 1.0, shard=0)
    found.add_toy_stage("b", -3.0, shard=1)
    found.publish("a", "b", cause="train")
    return found


@contextmanager
def replica(toy: Toy) -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    port = free_port()
    kit = Path(__file__).with_name("serving_kit.py")
    environment = {**os.environ, **toy.environment(lease_ttl_ms=int(TTL * 1000)), "PYTHONPATH": str(kit.parents[1])}
    process = subprocess.Popen([sys.executable, str(kit), str(port), "child"], env=environment)
    try:
        with Client(port, toy) as client:
            wait_until(lambda: client.ready() and client.version() > 0, seconds=30)
            yield client, process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def declare(toy: Toy, floor: int, *, margin: float = 0.1) -> None:
    """The barrier in short: wait for every acknowledgement or for TTL + margin (rule 9)."""
    until = time.monotonic() + TTL + margin
    while True:
        with psycopg.connect(toy.app_url) as connection:
            late = (
                {row.process_id: row.beats for row in barrier.look(connection)[2]} if time.monotonic() > until else {}
            )
            if barrier.declare(connection, toy.model_id, floor, expired=late) is not None:
                return
        time.sleep(0.01)


def test_a_paused_process_is_fenced_answers_nothing_stale_and_exits(toy: Toy) -> None:
    with replica(toy) as (client, process):
        process.send_signal(signal.SIGSTOP)
        floor = toy.publish("a", None, taint=1)
        started = time.monotonic()
        declare(toy, floor)
        assert TTL < time.monotonic() - started < TTL + 0.5
        assert toy.leases()[0]["ended_at"] is not None
        process.send_signal(signal.SIGCONT)
        try:
            answer = client.predict()
            assert answer.status_code == 503 or answer.json()["version"] >= floor
        except OSError:
            pass
        except Exception as error:  # noqa: BLE001 - the server may be gone already
            assert type(error).__module__.startswith("httpx")  # noqa: PT017
        assert process.wait(10) == 3
    assert toy.leases()[0]["freed_at"] is not None
    assert [event["floor"] for event in toy.events("replica.fenced")] == [floor]


def test_a_killed_process_delays_the_barrier_by_one_lease_only(toy: Toy) -> None:
    with replica(toy) as (_, process):
        process.kill()
        process.wait()
        floor = toy.publish("a", None, taint=1)
        started = time.monotonic()
        declare(toy, floor)
        assert time.monotonic() - started < TTL + 0.5
    assert toy.leases()[0]["freed_at"] is None  # never reported


def test_a_process_that_is_asked_to_stop_ends_its_row_and_exits_with_0(toy: Toy) -> None:
    with replica(toy) as (_, process):
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        floor = toy.publish("a", None, taint=1)
        started = time.monotonic()
        declare(toy, floor)
        assert time.monotonic() - started < 0.3
    assert toy.leases()[0]["freed_at"] is not None
