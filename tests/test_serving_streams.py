"""Completions at the fence: streams are cut when the floor rises, and no token of a tainted version comes after it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import httpx
import pytest
from conftest import Database
from hypothesis import given
from hypothesis import strategies as st
from serving_kit import Client, Toy, ToyEngine, serving, wait_until
from serving_talk import TALK, Heard, Talker, TalkerPredictor, complete
from test_serving_http import drain, fence

from service.serving import generate, lease
from service.serving.__main__ import Program
from service.serving.fence import Fence
from service.serving.replica import Pointer
from shards.assembly import Assembly
from shards.engine.completion import Sampling, Step

pytestmark = pytest.mark.integration
TAINTED, CLEAN = -1.0, 1.0
"""Mean weights of both shards together, and of the first alone."""


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Toy:
    found = Toy(database.owner_url, database.app_url, tmp_path / "artifacts", recipe=TALK)
    found.create()
    found.add_toy_stage("a", 1.0, shard=0)
    found.add_toy_stage("b", -3.0, shard=1)
    return found


def pointer(program: Program) -> Pointer:
    found = program.fleet.find("toy")
    assert found is not None
    assert found.replica.pointer is not None
    return found.replica.pointer


def test_a_stream_is_cut_when_the_floor_rises(toy: Toy) -> None:
    class Engine(Talker):
        pass

    toy.publish("a", "b", cause="train")
    with serving(toy, factory=Engine) as (client, program):
        stream = Heard(client, max_tokens=10_000)
        wait_until(lambda: len(stream.words) > 5)
        toy.publish("a", None, taint=1)
        wait_until(lambda: toy.leases()[0]["covers"] == 2)  # it does not wait for the stream
        spoken = Engine.spoken[TAINTED]
        stream.join()
        assert Engine.spoken[TAINTED] <= spoken + 1  # but for the step under way nothing is computed from it
        assert (stream.version, set(stream.words)) == (1, {"-1"})
        assert len(stream.words) <= spoken  # and that step's word is not sent
        assert (stream.done, stream.whole) == (False, False)
        assert stream.error["code"] == "cut"
        wait_until(lambda: toy.leases()[0]["freed"] == 2)  # nor does the stream hold its weights
        assert fence(program).computing == fence(program).sending == ()
        assert set(Heard(client, max_tokens=3).join().words) == {"1"}
        assert 'expunge_predictions_total{model="toy",result="cut"} 1.0' in client.get("/metrics").text


def test_no_stale_token_through_twenty_deactivations_under_load(toy: Toy) -> None:
    """Odd versions serve both shards, even ones the first alone; each stream is of one version, to the last byte."""

    class Engine(Talker):
        pace = 0.001

    toy.publish("a", "b", cause="train")
    streams: list[Heard] = []
    stop = threading.Event()

    def listen(client: Client) -> None:
        while not stop.is_set():
            streams.append(Heard(client, max_tokens=60).join())

    late: list[int] = []
    with serving(toy, factory=Engine) as (client, _):
        threads = [threading.Thread(target=listen, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(20):
            weight = CLEAN if number % 2 else TAINTED
            version = toy.publish("a", None if number % 2 == 0 else "b")
            wait_until(lambda version=version: toy.leases()[0]["covers"] >= version)
            before = Engine.spoken[weight]
            time.sleep(0.03)
            late.append(Engine.spoken[weight] - before)
        wait_until(lambda: any(stream.done for stream in list(streams)))
        stop.set()
        for thread in threads:
            thread.join()
    assert set(late) <= {0, 1}  # after the acknowledgement nothing is computed from it but the step under way
    for stream in streams:
        assert stream.status == 200
        assert set(stream.words) <= {"-1" if stream.version % 2 else "1"}
        assert stream.done == stream.whole == (not stream.error)
        assert len(stream.words) == 60 or not stream.done
    assert any(stream.error for stream in streams)
    assert any(stream.done for stream in streams)


def test_a_rebuild_lets_a_stream_end_on_what_it_began_with(toy: Toy) -> None:
    class Engine(Talker):
        pass

    toy.publish("a", None, cause="train")
    with serving(toy, factory=Engine) as (client, program):
        speaker = pointer(program).predictor
        stream = Heard(client, max_tokens=400)
        wait_until(lambda: len(stream.words) > 2)
        toy.publish("a", "b", cause="rebuild")
        wait_until(lambda: complete(client, max_tokens=1).json()["version"] == 2)
        assert toy.leases()[0]["covers"] == 1  # version 1 may still speak
        speaker.pace = 0.0  # type: ignore[attr-defined]  # and need not take its seconds
        del speaker
        stream.join()
        assert (stream.done, set(stream.words), len(stream.words)) == (True, {"1"}, 400)
        wait_until(lambda: toy.leases()[0]["covers"] == 2)


def test_what_is_not_streamed_starts_again_on_the_new_version(toy: Toy) -> None:
    class Engine(Talker):
        pass

    toy.publish("a", "b", cause="train")
    with serving(toy, factory=Engine) as (client, _):
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(complete(client, max_tokens=400)))
        thread.start()
        wait_until(lambda: Engine.spoken[TAINTED] > 5)
        Engine.pace = 0.0  # of the new version's
        toy.publish("a", None, taint=1)
        wait_until(lambda: toy.leases()[0]["covers"] == 2)
        thread.join()
        assert Engine.spoken[TAINTED] < 400  # nobody waited for its end
        body = answers[0].json()
        assert (body["version"], body["choices"][0]["text"]) == (2, "1;" * 400)
        assert body["usage"]["completion_tokens"] == 400
        assert "expunge_predictions_recomputed_total" in client.get("/metrics").text


def test_a_stream_ends_with_the_lease(toy: Toy) -> None:
    class Engine(Talker):
        pass

    toy.publish("a", "b", cause="train")
    with serving(toy, factory=Engine, settings=toy.settings(lease_ttl_ms=3000)) as (client, _):
        stream = Heard(client, max_tokens=10_000)
        wait_until(lambda: len(stream.words) > 5)
        with toy.connect() as blocker:  # every heartbeat now waits for this lock
            blocker.execute("lock table model in access exclusive mode")
            started = time.monotonic()
            stream.join()
            assert time.monotonic() - started < 3 + 5
        assert (stream.done, stream.error["code"]) == (False, "cut")
        wait_until(lambda: complete(client, max_tokens=1).status_code == 200, seconds=20)


def test_a_client_that_does_not_read_its_stream_cannot_hold_up_a_deactivation(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "IDLE_POLL", 60.0)

    class Engine(Talker):
        filling = "x" * 200_000

    toy.publish("a", "b", cause="train")
    with serving(toy, factory=Engine, settings=toy.settings(lease_ttl_ms=80_000)) as (client, program):
        body = json.dumps({"model": "toy", "prompt": "a", "stream": True, "max_tokens": 10_000}).encode()
        fields = f"host: x\r\nauthorization: Bearer {toy.token}\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", client.base_url.port))
            reader.sendall(b"POST /v1/completions HTTP/1.1\r\n" + fields.encode() + body)
            wait_until(lambda: fence(program).sending == ((1, 1),))
            started = time.monotonic()
            toy.publish("a", None)
            wait_until(lambda: toy.leases()[0]["covers"] == 2)
            assert time.monotonic() - started < 5  # not a heartbeat, which comes every twenty seconds
            assert b"[DONE]" not in drain(reader)
        assert fence(program).sending == ()
        wait_until(lambda: 'result="cut"' in client.get("/metrics").text)


def test_a_client_that_goes_away_ends_its_stream(toy: Toy) -> None:
    class Engine(Talker):
        pass

    toy.publish("a", "b", cause="train")
    with serving(toy, factory=Engine) as (client, program):
        stream = Heard(client, max_tokens=10_000)
        wait_until(lambda: len(stream.words) > 2)
        stream.hang_up()
        wait_until(lambda: fence(program).computing == ())
        spoken = Engine.spoken[TAINTED]
        time.sleep(0.1)
        assert Engine.spoken[TAINTED] == spoken
        assert 'result="disconnected"' in client.get("/metrics").text


def test_predictions_go_between_the_tokens_of_long_answers(toy: Toy, database: Database, tmp_path: Path) -> None:
    class Engine(Talker):
        pace = 0.05

    other = Toy(database.owner_url, database.app_url, tmp_path / "artifacts", name="other")
    other.create()
    other.add_toy_stage("c", 1.0, shard=0)
    other.publish("c", None, cause="train")
    toy.publish("a", "b", cause="train")
    with serving(toy, factory=lambda r: Engine(r) if r.task == "completion" else ToyEngine(r)) as (client, _):
        wait_until(lambda: len(client.get("/readyz").json()["models"]) == 2 and client.ready())
        streams = [Heard(client, max_tokens=10_000) for _ in range(12)]
        wait_until(lambda: all(len(stream.words) > 2 for stream in streams), seconds=30)
        for _ in range(5):
            started = time.monotonic()
            assert client.post("/v1/models/other/predict", json={"inputs": ["a"]}).status_code == 200
            assert time.monotonic() - started < 0.5  # not the 12 tokens' 0.6 s that wait in front of it
        assert not any(stream.done for stream in streams)
        for stream in streams:
            stream.hang_up()


def test_nothing_of_a_model_runs_on_the_event_loop(toy: Toy) -> None:
    """What an engine does before its first step may take a while, too: it may try the model out."""
    threads: list[str] = []

    class Predictor(TalkerPredictor):
        def complete(self, prompt: str, sampling: Sampling) -> Iterator[Step]:
            threads.append(threading.current_thread().name)
            return super().complete(prompt, sampling)

    class Engine(Talker):
        def build(self, assembly: Assembly) -> TalkerPredictor:
            predictor = Predictor(super().build(assembly).tensors, self.pace)
            predictor.engine = type(self)
            return predictor

    toy.publish("a", "b", cause="train")
    with serving(toy, factory=Engine) as (client, _):
        assert complete(client, max_tokens=1).status_code == 200
        assert Heard(client, max_tokens=1).join().done
    assert threads == ["compute", "compute"]


def test_more_answers_than_there_is_room_for_are_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "AT_ONCE", 1)

    class Engine(Talker):
        pass

    toy.publish("a", "b", cause="train")
    with serving(toy, factory=Engine) as (client, _):
        stream = Heard(client, max_tokens=300)
        wait_until(lambda: len(stream.words) > 2)
        answer = complete(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert stream.join().done
        assert complete(client, max_tokens=1).status_code == 200


def test_a_stop_lets_a_stream_end(toy: Toy) -> None:
    class Engine(Talker):
        pass

    toy.publish("a", "b", cause="train")
    with serving(toy, factory=Engine) as (client, program):
        stream = Heard(client, max_tokens=50)
        wait_until(lambda: len(stream.words) > 2)
        program.server.should_exit = True
        assert (stream.join().done, len(stream.words)) == (True, 50)
    assert toy.leases()[0]["ended_at"] is not None


STEPS = st.lists(
    st.one_of(
        st.sampled_from(["begin", "part", "whole", "sent", "abandon"]).map(lambda name: (name, 0, 0)),
        st.tuples(st.just("advance"), st.integers(0, 5), st.integers(0, 5)),
    ),
    max_size=30,
)


@given(STEPS, st.randoms(use_true_random=False))
def test_what_covers_promises_of_streams_is_kept(steps: list[tuple[str, int, int]], pick: Random) -> None:
    """No part from below what a heartbeat promised passes a check later, or is still on its way (P3)."""
    fence, promised = Fence().grant(0.0, 1.0).advance(1, 0), 0
    for name, version, floor in steps:
        working, sending = [v for v, _ in fence.computing], [v for v, _ in fence.sending]
        match name:
            case "begin" if fence.pointer:
                fence = fence.begin()
            case "part" | "whole" if working:
                chosen = pick.choice(working)
                if fence.may_answer(chosen, 0.5):
                    assert chosen >= promised
                    fence = fence.send_part(chosen) if name == "part" else fence.send(chosen)
            case "sent" if sending:
                fence = fence.sent(pick.choice(sending))
            case "abandon" if working:
                fence = fence.abandon(pick.choice(working))
            case "advance":
                fence = fence.advance(version, floor)
            case _:
                pass
        promised = max(promised, fence.covers)
        assert all(version >= promised for version, _ in fence.sending)


def test_the_parts_of_a_stream_count_until_the_kernel_has_them() -> None:
    begun = Fence().grant(0.0, 1.0).advance(1, 1).begin()
    rebuilt = begun.advance(2, 1)
    assert (rebuilt.covers, rebuilt.send_part(1).sent(1).covers) == (1, 1)  # version 1 may still speak
    raised = rebuilt.advance(2, 2)
    assert raised.covers == 2  # it may not: its next check fails
    assert not raised.may_answer(1, 0.5)
    assert begun.send_part(1).advance(2, 2).covers == 1  # a part that passed before is still on its way
    assert begun.send_part(1).advance(2, 2).sent(1).covers == 2
    assert begun.send_part(1).sent(1).abandon(1) == Fence().grant(0.0, 1.0).advance(1, 1)
