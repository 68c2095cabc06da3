"""Model servers that are paused, killed, cut off and flooded around `deactivated`; the barrier is the real one.

Of each answer to a request that was sent after `deactivated`: its version is not below the floor.
"""

import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from conftest import Database
from serving_kit import Client, Toy, wait_until
from serving_process import (
    MARGIN,
    TTL,
    Pipe,
    barrier,
    cleared,
    cut_connections,
    deactivated,
    replica,
)

pytestmark = pytest.mark.integration
FENCED = 3


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Iterator[Toy]:
    found = Toy(database.owner_url, database.app_url, tmp_path / "artifacts")
    found.create()
    found.add_toy_stage("a", 1.0, shard=0)
    found.add_toy_stage("b", -3.0, shard=1)
    found.publish("a", "b", cause="train")
    with barrier(found):
        yield found


class Asked:
    """One request on a thread of its own; `answer` is None where the connection broke."""

    def __init__(self, client: Client, *texts: str) -> None:
        self.answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._ask, args=(client.base_url.port, client.toy, texts))
        self._thread.start()

    def _ask(self, port: int, toy: Toy, texts: tuple[str, ...]) -> None:
        with Client(port, toy) as client, suppress(httpx.TransportError):
            self.answer = client.predict(*texts)

    def join(self) -> httpx.Response | None:
        self._thread.join()
        return self.answer


def assert_not_stale(answer: httpx.Response | None, floor: int) -> None:
    if answer is not None:
        assert answer.status_code == 503 or answer.json()["version"] >= floor, answer.text


def test_a_paused_process_that_wakes_late_answers_nothing_stale_and_exits(toy: Toy) -> None:
    with replica(toy, "slow") as (client, process):
        asked = Asked(client)
        time.sleep(0.15)  # it computes on version 1
        paused = time.monotonic()
        process.pause()
        floor, took = deactivated(toy, "a", None, taint=1)
        assert time.monotonic() - paused > TTL / 2  # counted from its last heartbeat, or from the floor
        assert took < TTL + MARGIN + 5
        assert toy.leases()[0]["ended_at"] is not None
        later = Asked(client)
        process.wake()
        assert_not_stale(asked.join(), floor)
        assert_not_stale(later.join(), floor)
        assert process.wait(15) == FENCED
    assert toy.leases()[0]["freed_at"] is not None
    assert [event["floor"] for event in toy.events("replica.fenced")] == [floor]
    assert toy.events("replica.acknowledged") == []


def test_a_process_that_wakes_within_its_lease_acknowledges_and_recomputes(toy: Toy) -> None:
    with replica(toy, "slow", ttl=20) as (client, process):
        asked = Asked(client)
        time.sleep(0.15)
        process.pause()
        floor = toy.publish("a", None, taint=1)
        time.sleep(0.3)
        assert cleared(toy) < floor
        process.wake()
        wait_until(lambda: cleared(toy) >= floor)  # by its acknowledgement: in half of the lease
        answer = asked.join()
        assert answer is not None
        assert (answer.status_code, answer.json()["version"]) == (200, floor)
        assert toy.leases()[0]["ended_at"] is None
    assert len(toy.events("replica.acknowledged")) == 1


def test_a_killed_process_delays_deactivated_by_one_lease_and_takes_nobody_along(toy: Toy) -> None:
    with replica(toy) as (other, _), replica(toy) as (_, process):
        process.kill()
        process.wait()
        floor, took = deactivated(toy, "a", None, taint=1)
        assert took < TTL + MARGIN + 5
        answer = other.predict()
        assert (answer.status_code, answer.json()["version"]) == (200, floor)
        ended = [row for row in toy.leases() if row["ended_at"] is not None]
        assert [row["freed_at"] for row in ended] == [None]  # it never reported
        fenced = len(toy.events("replica.fenced"))
        deactivated(toy, "a", "b")
        assert len(toy.events("replica.fenced")) == fenced  # the next one waits for the living only


def test_a_process_killed_between_its_swap_and_its_acknowledgement(toy: Toy) -> None:
    with replica(toy) as (_, process):
        with toy.connect() as blocker:  # no heartbeat passes, a target can be read
            blocker.execute("lock table lease in access exclusive mode")
            floor = toy.publish("a", None, taint=1)
            time.sleep(0.2)
            process.kill()
            process.wait()
        wait_until(lambda: cleared(toy) >= floor, seconds=TTL + MARGIN + 5)
    assert [event["floor"] for event in toy.events("replica.fenced")] == [floor]


def test_a_process_that_is_asked_to_stop_ends_its_row_and_exits_with_0(toy: Toy) -> None:
    with replica(toy, ttl=20) as (_, process):
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert deactivated(toy, "a", None, taint=1)[1] < 10  # nobody waits for its lease
        assert toy.events("replica.fenced") == []
    assert toy.leases()[0]["freed_at"] is not None


def test_connections_that_are_cut_fail_no_request_and_delay_nothing(toy: Toy) -> None:
    results: Counter[int] = Counter()
    stop = threading.Event()
    with replica(toy, ttl=4) as (client, _):

        def hammer() -> None:
            with Client(client.base_url.port, toy) as mine:
                while not stop.is_set():
                    least = cleared(toy)
                    answer = mine.predict()
                    results[answer.status_code] += 1
                    assert_not_stale(answer, least)

        thread = threading.Thread(target=hammer)
        thread.start()
        for number in range(6):
            assert cut_connections(toy) > 0
            floor, _ = deactivated(toy, "a", None if number % 2 == 0 else "b")
            assert client.version() == floor
        stop.set()
        thread.join()
        assert toy.leases()[0]["ended_at"] is None  # it acknowledged all of them
    assert set(results) == {200}


def test_a_process_whose_way_to_postgres_is_held_up_is_fenced_and_exits(toy: Toy) -> None:
    """No connection breaks: nothing is said any more, in either direction."""
    with (
        Pipe.to(toy.app_url) as pipe,
        replica(toy, database_url=pipe.url) as (client, process),
    ):
        pipe.open.clear()
        floor, took = deactivated(toy, "a", None, taint=1)
        assert took < TTL + MARGIN + 5
        for _ in range(20):
            assert client.predict().status_code == 503
        assert not client.ready()
        pipe.open.set()
        assert process.wait(20) == FENCED
    assert [event["floor"] for event in toy.events("replica.fenced")] == [floor]


def test_a_heartbeat_whose_reply_is_late_grants_nothing(toy: Toy) -> None:
    """Rule 4: a lease counts from before it was asked for; else a late reply would outlast `deactivated`."""
    with (
        Pipe.to(toy.app_url) as pipe,
        replica(toy, ttl=0.8, database_url=pipe.url) as (client, process),
    ):
        before = toy.leases()[0]["beats"]
        pipe.delay = 0.3  # each of the four replies to a heartbeat, which together outlast its lease
        wait_until(lambda: client.predict().status_code == 503)
        with suppress(httpx.TransportError):  # it goes, since the barrier hears too little of it
            while process.poll() is None:
                assert client.predict().status_code == 503
        assert process.wait(30) == FENCED
    assert toy.leases()[0]["beats"] > before  # granted, and of no use


def test_a_full_queue_does_not_delay_an_acknowledgement(toy: Toy) -> None:
    """What waits on the old version is computed again, or refused as `overloaded`; nothing is drained first."""
    batch = ["x"] * 256
    with replica(toy, "busy", ttl=40) as (client, _):
        crowd = [Asked(client, *batch) for _ in range(40)]
        wait_until(lambda: 'result="overloaded"' in client.get("/metrics").text, seconds=20)
        floor, took = deactivated(toy, "a", None, taint=1)
        assert took < 4  # not a heartbeat, which comes every ten seconds
        assert None in [each.answer for each in crowd]  # nor was the queue drained, which is some seconds long
        late = Asked(client)
        answers = [each.join() for each in crowd]
        assert_not_stale(late.join(), floor)
        codes = Counter(answer.status_code for answer in answers if answer is not None)
        assert set(codes) == {200, 503}
        refused = [answer.json()["type"] for answer in answers if answer is not None and answer.status_code == 503]
        assert set(refused) == {"urn:expunge:problem:overloaded"}
        again = client.predict()
        assert (again.status_code, again.json()["version"]) == (200, floor)


def test_a_replica_that_renews_and_never_swaps_blocks_nothing_and_answers_nothing_stale(toy: Toy) -> None:
    with replica(toy, "deaf") as (client, process):
        floor, took = deactivated(toy, "a", None, taint=1)
        assert took < TTL + MARGIN + 5  # it renews all the time, and is refused
        with suppress(httpx.TransportError):  # it goes
            while process.poll() is None:
                assert_not_stale(client.predict(), floor)
        assert process.wait(15) == FENCED
    assert [event["floor"] for event in toy.events("replica.fenced")] == [floor]


def test_a_fenced_process_stops_listening_before_its_weights_are_free(toy: Toy) -> None:
    """Rule 11: a balancer must not send requests to a process that only waits for its memory."""
    with replica(toy, "slower") as (client, process):
        crowd = [Asked(client, *["x"] * 32) for _ in range(4)]  # a pass outlasts the lease, and holds the weights
        time.sleep(0.3)
        process.pause()
        floor, _ = deactivated(toy, "a", None, taint=1)
        process.wake()
        wait_until(lambda: not listens(client))
        assert process.poll() is None
        assert toy.leases()[0]["freed_at"] is None
        for asked in crowd:
            assert_not_stale(asked.join(), floor)
        assert process.wait(20) == FENCED
    assert toy.leases()[0]["freed_at"] is not None


def listens(client: Client) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=5):
        return True
    return False
