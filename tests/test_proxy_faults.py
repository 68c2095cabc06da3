"""The proxy paused, killed and cut off; the server behind it down, slow, dishonest or broken off in the middle."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest
from conftest import Database
from proxy_kit import TTL_MS, Upstream, log_of, make_toy, proxy, stop, upstream
from psycopg import conninfo, sql
from serving_kit import Client, Toy, wait_until
from serving_talk import Heard, complete

from service.store import barrier

pytestmark = pytest.mark.integration
TTL = TTL_MS / 1000


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Toy:
    return make_toy(database, tmp_path)


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Upstream]:
    with upstream(tmp_path / "adapters") as found:
        yield found


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def declare(toy: Toy, floor: int, *, ttl: float = TTL) -> float:
    """The barrier in short (rule 9); how long it took."""
    began = time.monotonic()
    while True:
        with psycopg.connect(toy.app_url) as connection:
            over = time.monotonic() > began + ttl + 0.1
            late = {row.process_id: row.beats for row in barrier.look(connection)[2]} if over else {}
            if barrier.declare(connection, toy.model_id, floor, expired=late) is not None:
                return time.monotonic() - began
        time.sleep(0.01)


@contextmanager
def without_postgres(toy: Toy) -> Iterator[None]:
    name = sql.Identifier(conninfo.conninfo_to_dict(toy.owner_url)["dbname"])
    with psycopg.connect(toy.owner_url, dbname="postgres", autocommit=True) as connection:
        connection.execute(sql.SQL("alter database {} allow_connections false").format(name))
        try:
            query = "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s"
            connection.execute(query, (conninfo.conninfo_to_dict(toy.owner_url)["dbname"],))
            yield
        finally:
            connection.execute(sql.SQL("alter database {} allow_connections true").format(name))


def test_a_paused_proxy_is_fenced_and_says_nothing_more(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind, "--unload-frees", lease_ttl_ms=TTL_MS) as (client, process):
        behind.fault(pace=0.02)
        heard = Heard(client, max_tokens=2000)
        wait_until(lambda: len(heard.words) >= 3)
        process.send_signal(signal.SIGSTOP)
        floor = toy.publish("a", None, taint=1)
        assert TTL < declare(toy, floor) < TTL + 5
        time.sleep(0.2)
        known = len(heard.words)
        process.send_signal(signal.SIGCONT)
        heard.join()
        # P2: at most the one part that had passed its check before the pause is written (which no server can promise).
        assert len(heard.words) <= known + 1
        assert not heard.done
        assert process.wait(20) == 3
    assert behind.names() == set()
    assert toy.leases()[0]["freed_at"] is not None
    assert [event["floor"] for event in toy.events("replica.fenced")] == [floor]


def test_a_killed_proxy_leaves_memory_unconfirmed_and_its_successor_cleans_up(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind, "--unload-frees", lease_ttl_ms=TTL_MS) as (_, process):
        process.kill()
        process.wait()
    floor = toy.publish("a", None, taint=1)
    assert TTL < declare(toy, floor) < TTL + 5
    assert behind.names() == {"toy@1"}
    with proxy(toy, behind, "--unload-frees") as (client, _):
        assert complete(client, max_tokens=1).headers["x-expunge-version"] == str(floor)
        wait_until(lambda: behind.names() == {f"toy@{floor}"})
        assert [path.name for path in behind.directory.iterdir()] == [f"toy@{floor}"]
    assert toy.leases()[0]["freed_at"] is None  # nobody can speak for the dead one
    assert "toy@1" not in behind.seen()["asked"]


@pytest.mark.parametrize("options", [(), ("--unload-frees",)])
def test_freed_is_only_said_where_the_upstream_said_so(toy: Toy, behind: Upstream, options: tuple[str, ...]) -> None:
    """Without the operator's word a list tells nothing of memory; with it, an adapter that stays listed is not free."""
    with proxy(toy, behind, *options, lease_ttl_ms=8000) as (client, process):
        behind.fault(keeps=bool(options))
        floor = toy.publish("a", None, taint=1)
        declare(toy, floor, ttl=8.0)
        assert toy.leases()[0]["ended_at"] is None  # by its acknowledgement
        wait_until(lambda: f"toy@{floor}" in behind.names())
        assert complete(client, max_tokens=1).headers["x-expunge-version"] == str(floor)
        time.sleep(1.5)  # it would have said so
        assert ("toy@1" in behind.names()) == bool(options)
        assert toy.leases()[0]["freed"] == 0
        if options:
            behind.fault()
            wait_until(lambda: toy.leases()[0]["freed"] == floor, seconds=15)
        else:
            assert stop(process) == 0
            assert toy.leases()[0]["freed_at"] is None


def test_an_upstream_that_dies_is_said_to_and_given_its_adapter_again(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind) as (client, _):
        behind.kill()
        assert problem(complete(client)) == (502, "upstream-unreachable")
        assert problem(complete(client, stream=True)) == (502, "upstream-unreachable")
        wait_until(lambda: client.get("/readyz").status_code == 503, seconds=15)
        assert "upstream" in client.get("/readyz").json()["models"][0]["problem"]
        behind.start()
        wait_until(client.ready, seconds=20)
        assert behind.names() == {"toy@1"}
        assert complete(client, max_tokens=1).status_code == 200


def test_a_proxy_that_starts_before_its_upstream_waits_for_it(toy: Toy, behind: Upstream) -> None:
    behind.kill()
    with proxy(toy, behind, ready=False) as (client, _):
        wait_until(lambda: has_problem(client), seconds=60)
        assert toy.leases() == []
        behind.start()
        wait_until(client.ready, seconds=30)
        assert complete(client, max_tokens=1).status_code == 200


def has_problem(client: Client) -> bool:
    try:
        models = client.get("/readyz").json()["models"]
    except httpx.TransportError:
        return False
    return bool(models and models[0]["problem"])


def test_what_an_upstream_does_wrong_is_named_and_never_tried_twice(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind, "--timeout", "1") as (client, _):
        wrong = {
            "upstream-timeout": (504, {"seconds": 1.5}),
            "upstream-failed": (502, {"status": 500}),
            "upstream-lost-model": (502, {"status": 404}),
            "overloaded": (503, {"status": 429}),
            "upstream-refused": (400, {"status": 400}),
            "upstream-other-model": (502, {"as": "toy@7"}),
        }
        for code, (status, faults) in wrong.items():
            behind.fault(**faults)
            for stream in (False, True):
                before = len(behind.seen()["asked"])
                answer = complete(client, max_tokens=1, stream=stream, prompt="her secret", user="ann")
                assert problem(answer) == (status, code)
                assert len(behind.seen()["asked"]) == before + 1
        behind.fault(status=400)
        assert complete(client).json()["error"]["message"] == "toy says no"  # under the caller's name
        time.sleep(1.5)  # what was too slow has come by now
        behind.fault()
        assert complete(client, max_tokens=1).status_code == 200
        assert client.ready()
        told = log_of(behind).read_text() + client.get("/metrics").text
        assert "version" in told
        assert not {"secret", "ann"} & set(told.replace('"', " ").split())


@pytest.mark.parametrize("faults", [{"hang_up_after": 2}, {"no_end": True}])
def test_a_stream_that_breaks_off_behind_is_broken_off_in_front(
    toy: Toy, behind: Upstream, faults: dict[str, object]
) -> None:
    with proxy(toy, behind) as (client, _):
        behind.fault(**faults)
        heard = Heard(client, max_tokens=4).join()
        assert (heard.done, heard.whole, heard.error["code"]) == (False, False, "upstream-hung-up")
        assert set(heard.words) == {"1.5"}


def test_without_postgres_it_answers_for_one_lease_and_comes_back(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind, lease_ttl_ms=TTL_MS) as (client, _):
        behind.fault(pace=0.05)
        heard = Heard(client, max_tokens=1000)
        wait_until(lambda: len(heard.words) >= 3)
        with without_postgres(toy):
            heard.join()
            assert (heard.done, heard.error["code"]) == (False, "cut")
            refused = problem(complete(client, max_tokens=1))
            assert refused in {(503, "not-serving"), (503, "store-unavailable")}  # or the key cannot be looked up
            assert client.get("/readyz").status_code == 503
        behind.fault()
        wait_until(client.ready, seconds=20)
        assert complete(client, max_tokens=1).headers["x-expunge-version"] == "1"
    assert toy.leases()[0]["ended_at"] is None  # no barrier asked meanwhile


def test_a_damaged_artefact_keeps_the_old_version_and_says_so(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind) as (client, _):
        path = toy.object_path("a")
        data = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        toy.publish("a", None, cause="train")
        wait_until(lambda: client.get("/readyz").json()["models"][0]["problem"], seconds=10)
        assert complete(client, max_tokens=1).headers["x-expunge-version"] == "1"
        assert behind.names() == {"toy@1"}

        def state() -> str:
            with toy.connect() as connection:
                query = "select state from artifact where stage_key = %s"
                (found,) = connection.execute(query, (toy.stages["a"][0],)).fetchone() or ("",)
            return found

        wait_until(lambda: state() == "lost")  # the report follows the problem
