"""The proxy in front of a server that speaks OpenAI's API: what passes, what it says, what the fence lets through."""

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import Database
from proxy_kit import Upstream, make_toy, proxy, stop, upstream
from serving_kit import Client, Toy, wait_until
from serving_talk import Heard, complete
from test_canary import start

pytestmark = pytest.mark.integration


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Toy:
    return make_toy(database, tmp_path)


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Upstream]:
    with upstream(tmp_path / "adapters") as found:
        yield found


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_it_answers_as_a_model_server_does(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind, "--unload-frees") as (client, process):
        assert behind.names() == {"toy@1"}
        answer = complete(client, max_tokens=2)
        assert answer.status_code == 200
        body = answer.json()
        assert (body["model"], body["version"], body["choices"][0]["text"]) == ("toy", 1, "1.5;1.5;")
        assert answer.headers["x-expunge-version"] == "1"
        assert answer.headers["x-expunge-assembly"]
        assert answer.headers["cache-control"] == "no-store"
        chat = {"model": "toy", "messages": [{"role": "user", "content": "say it"}]}
        assert client.post("/v1/chat/completions", json=chat).json()["model"] == "toy"
        heard = Heard(client, max_tokens=3).join()
        assert (heard.words, heard.done, heard.whole, heard.version) == (["1.5"] * 3, True, True, 1)
        (lease,) = toy.leases()
        assert (lease["name"], lease["covers"], lease["ended_at"]) == ("proxy", 1, None)
        assert client.get("/v1/models").json()["data"][0]["id"] == "toy"
        assert 'expunge_predictions_total{model="toy",result="answered"} 3.0' in client.get("/metrics").text
        assert stop(process) == 0
    assert behind.names() == set()
    assert list(behind.directory.iterdir()) == []
    assert toy.leases()[0]["freed_at"] is not None


def test_it_refuses_what_it_cannot_answer(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind) as (client, _):
        body = {"model": "toy", "prompt": "x"}
        newer = client.post("/v1/completions", json=body, headers={"x-expunge-min-version": "2"})
        assert problem(newer) == (503, "version-too-low")
        wrong = client.post("/v1/completions", json=body, headers={"x-expunge-min-version": "two"})
        assert problem(wrong) == (400, "invalid-header")
        assert problem(complete(client, model="base")) == (404, "no-such-model")  # never around the fence
        assert problem(complete(client, model="toy@1")) == (404, "no-such-model")
        assert problem(client.post("/v1/completions", json={"prompt": "x"})) == (400, "invalid-body")
        assert problem(client.post("/v1/completions", content=b"{")) == (400, "malformed-json")
        assert problem(client.post("/v1/completions", content=b"x" * (4 * 2**20 + 1))) == (413, "body-too-large")
        for field in ({"adapter_id": "toy@1"}, {"lora": [1]}, {"parameters": {"adapter_id": "toy@1"}}):
            assert problem(complete(client, **field)) == (400, "invalid-body")
        assert client.predict().status_code == 501
        assert client.post("/v2/models/toy/infer", json={}).status_code == 501
        assert client.post("/v1/load_lora_adapter", json={}).status_code == 404
        assert httpx.post(f"{client.base_url}/v1/completions", json=body, trust_env=False).status_code == 401
        assert behind.seen()["asked"] == []


def test_a_deactivation_moves_it_to_a_new_adapter_and_unloads_the_old_one(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind, "--unload-frees") as (client, _):
        floor = toy.publish("a", None, taint=1)
        wait_until(lambda: toy.leases()[0]["covers"] == floor)
        answer = complete(client, max_tokens=1)  # waits for the adapter, if need be
        assert (answer.status_code, answer.headers["x-expunge-version"]) == (200, "2")
        assert answer.json()["choices"][0]["text"] == "1;"
        wait_until(lambda: toy.leases()[0]["freed"] == floor)
        assert behind.names() == {"toy@2"}
        assert [path.name for path in behind.directory.iterdir()] == ["toy@2"]
        assert [event["covers"] for event in toy.events("replica.acknowledged")] == [floor]
        toy.publish("a", None, cause="train")  # a rebuild: no floor
        wait_until(lambda: behind.names() == {"toy@3"})


def test_a_slow_load_makes_calls_wait_and_acknowledges_at_once(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind, "--patience", "20", lease_ttl_ms=2000) as (client, _):
        behind.fault(load_seconds=5.0, list_seconds=0.8)  # slower than heartbeats, which must not break it off
        floor = toy.publish("a", None, taint=1)
        wait_until(lambda: toy.leases()[0]["covers"] == floor)
        assert "toy@2" not in behind.names()
        answer = complete(client, max_tokens=1)
        assert (answer.status_code, answer.headers["x-expunge-version"]) == (200, "2")


def test_what_is_asked_of_a_tainted_adapter_is_dropped_and_asked_again(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind) as (client, _):
        behind.fault(seconds=10.0)
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(complete(client, max_tokens=1)))
        thread.start()
        wait_until(lambda: behind.seen()["asked"] == ["toy@1"])
        behind.fault()
        floor = toy.publish("a", None, taint=1)
        thread.join()
        assert answers[0].headers["x-expunge-version"] == str(floor)
        assert answers[0].json()["choices"][0]["text"] == "1;"
        assert behind.seen()["asked"] == ["toy@1", "toy@2"]


def test_a_stream_is_cut_when_the_floor_rises(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind, "--unload-frees") as (client, _):
        behind.fault(pace=0.05)
        heard = Heard(client, max_tokens=400)
        quiet = Heard(client, max_tokens=1)
        wait_until(lambda: len(heard.words) >= 3)
        quiet.join()
        floor = toy.publish("a", None, taint=1)
        heard.join()
        assert (heard.done, heard.whole, heard.error["code"]) == (False, False, "cut")
        assert set(heard.words) == {"1.5"}
        assert heard.version == 1
        wait_until(lambda: toy.leases()[0]["freed"] == floor)
        wait_until(lambda: behind.seen()["under_way"] == 0)  # the upstream was told, too
        again = Heard(client, max_tokens=2).join()
        assert (again.words, again.version, again.done) == (["1", "1"], floor, True)


def test_a_silent_stream_is_cut_without_waiting_for_its_next_word(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind) as (client, _):
        behind.fault(pace=0.01)
        heard = Heard(client, max_tokens=10_000)
        wait_until(lambda: len(heard.words) >= 3)
        behind.fault(pace=30)
        toy.publish("a", None, taint=1)
        heard.join()
        assert (heard.done, heard.error["code"]) == (False, "cut")


def test_a_stream_goes_on_through_a_rebuild(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind) as (client, _):
        behind.fault(pace=0.03)
        heard = Heard(client, max_tokens=400)
        wait_until(lambda: len(heard.words) >= 3)
        toy.publish("a", None, cause="train")
        wait_until(lambda: complete(client, max_tokens=1).headers["x-expunge-version"] == "2")
        assert behind.names() == {"toy@1", "toy@2"}
        behind.fault()
        assert (heard.join().words, heard.done, heard.whole) == (["1.5"] * 400, True, True)
        wait_until(lambda: behind.names() == {"toy@2"})


def test_a_canary_answers_beside_the_stable_version(toy: Toy, behind: Upstream) -> None:
    def version(wish: str) -> str:
        body = {"model": "toy", "prompt": "x", "max_tokens": 1}
        answer = client.post("/v1/completions", json=body, headers={"x-expunge-canary": wish})
        assert answer.status_code == 200
        said = {"1": "1.5;", "2": "1;", "3": "1;"}[answer.headers["x-expunge-version"]]
        assert answer.json()["choices"][0]["text"] == said
        return answer.headers["x-expunge-version"]

    with proxy(toy, behind, "--unload-frees") as (client, _):
        start(toy, "a", None)
        wait_until(lambda: version("true") == "2")
        assert (version("false"), behind.names()) == ("1", {"toy@1", "toy@2"})
        floor = toy.publish("a", None, taint=1)
        wait_until(lambda: toy.leases()[0]["freed"] == floor)
        assert {version("true"), version("false")} == {str(floor)}
        assert behind.names() == {f"toy@{floor}"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_behind_that_fails_on_the_canary_ends_it(toy: Toy, behind: Upstream, stream: bool) -> None:
    body = {"model": "toy", "prompt": "x", "max_tokens": 1, "stream": stream}
    with proxy(toy, behind) as (client, _):
        start(toy, "a", None)
        wait_until(lambda: "toy@2" in behind.names())
        behind.fault(status=500)

        def ended() -> bool:
            answer = client.post("/v1/completions", json=body, headers={"x-expunge-canary": "true"})
            assert answer.status_code == 502
            return bool(toy.events("canary.aborted"))

        wait_until(ended)
        assert toy.events("canary.aborted") == [{"version": 2, "actor": None, "reason_code": "engine_failed"}]


def test_without_a_live_shard_it_says_so_and_asks_nobody(toy: Toy, behind: Upstream) -> None:
    with proxy(toy, behind) as (client, _):
        toy.publish(None, None, taint=1)
        wait_until(lambda: problem_or(client) == (503, "no-live-shard"))
        assert behind.names() == set()


def problem_or(client: Client) -> tuple[int, str]:
    answer = complete(client, max_tokens=1)
    return problem(answer) if answer.status_code != 200 else (200, "")
