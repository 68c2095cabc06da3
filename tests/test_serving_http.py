"""The model server's HTTP surface: refusals, limits, probes, metrics, and slow readers."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import Database
from serving_kit import Client, Plain, Toy, ToyEngine, serving, wait_until

from service.serving import lease, server
from service.serving.__main__ import Program
from service.serving.fence import Fence
from service.store import api_keys
from shards.assembly import Assembly
from shards.errors import InputError
from shards.logits import Logits
from shards.recipe import Backbone, Recipe

pytestmark = pytest.mark.integration


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Toy:
    found = Toy(database.owner_url, database.app_url, tmp_path / "artifacts")
    found.create()
    found.add_toy_stage("a", 1.0, shard=0)
    found.add_toy_stage("b", -3.0, shard=1)
    found.publish("a", "b", cause="train")
    return found


@pytest.fixture
def client(toy: Toy) -> Iterator[Client]:
    with serving(toy, settings=toy.settings(record_limit_bytes=100)) as (found, _):
        yield found


def test_what_cannot_be_predicted_is_refused(client: Client) -> None:
    def status(body: bytes) -> tuple[int, str]:
        answer = client.post("/v1/models/toy/predict", content=body)
        assert answer.headers["content-type"] == "application/problem+json"
        return answer.status_code, answer.json()["type"].rpartition(":")[2]

    assert status(b"") == (400, "malformed-json")
    assert status(b"{") == (400, "malformed-json")
    assert status(b"\xff") == (400, "malformed-json")
    assert status(b"[" * 100_000) == (400, "malformed-json")
    assert status(b"[]") == (422, "invalid-body")
    assert status(b'{"inputs": "a"}') == (422, "invalid-body")
    assert status(b'{"inputs": ["a"], "more": 1}') == (422, "invalid-body")
    assert status(b'{"inputs": []}') == (422, "invalid-batch")
    assert status(json.dumps({"inputs": ["a"] * 257}).encode()) == (422, "invalid-batch")
    assert status(b'{"inputs": [1]}') == (422, "invalid-input")
    assert status(b'{"inputs": ["\\ud800"]}') == (422, "invalid-input")
    assert status(json.dumps({"inputs": ["a" * 101]}).encode()) == (413, "input-too-large")
    assert status(b" " * (4 * 2**20 + 1)) == (413, "body-too-large")
    assert (
        client.post("/v1/models/toy/predict", content=b'{"inputs": ["a\\u0000b", "\\ud83d\\ude00", ""]}').status_code
        == 200
    )
    assert client.predict(*["a"] * 256).status_code == 200


def test_a_body_without_a_length_is_cut_off_at_the_limit(client: Client) -> None:
    answer = client.post("/v1/models/toy/predict", content=(b" " * 2**20 for _ in range(5)))
    assert answer.status_code == 413


def test_callers_need_a_key_with_the_scope(client: Client, toy: Toy) -> None:
    with toy.connect() as connection:
        reader = api_keys.create(connection, "reader", [api_keys.Scope.AUDIT_READ])
    url, body = "/v1/models/toy/predict", {"inputs": ["a"]}
    for wrong in ("", "Basic abc", "Bearer x", "Bearer " + toy.token[:-1] + "!", "Bearer \u00e9"):
        answer = client.post(url, json=body, headers={"authorization": wrong.encode("latin-1")})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.post(url, json=body, headers={"authorization": f"Bearer {reader}"}).status_code == 403
    assert client.post(url, json=body).status_code == 200


def test_other_addresses_and_methods(client: Client) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/v1/models/toy/predict").status_code == 405
    assert client.post("/readyz").headers["allow"] == "GET"
    assert client.get("/").status_code == 404
    assert client.post("/v1/models/other/predict", json={"inputs": ["a"]}).status_code == 404


def test_metrics_tell_of_versions_and_results_and_hold_no_input(client: Client) -> None:
    client.predict("very private words")
    client.predict(x_expunge_min_version="9")
    text = client.get("/metrics").text
    assert 'expunge_serving_version{model="toy"} 1.0' in text
    assert 'expunge_serving_floor{model="toy"} 0.0' in text
    assert 'expunge_swaps_total{model="toy",result="swapped"} 1.0' in text
    assert 'expunge_predictions_total{model="toy",result="answered"} 1.0' in text
    assert 'expunge_predictions_total{model="toy",result="version-too-low"} 1.0' in text
    assert 'expunge_prediction_duration_seconds_count{model="toy"} 1.0' in text
    assert 'expunge_predictions_in_flight{model="toy"} 0.0' in text
    assert "private" not in text


WIDE = Recipe(
    backbone=Backbone(source="toy", digest="0" * 64),
    classes=("no", "yes", *(f"class {n}" for n in range(2000))),
    shards=2,
    slices=2,
)


class Wide(ToyEngine):
    """Answers that no socket's buffers hold."""

    def build(self, assembly: Assembly) -> Any:
        inner = super().build(assembly)

        class Predictor(Plain):
            def logits(self, texts: Sequence[str]) -> Logits:
                return np.repeat(inner.logits(texts)[:, :1], len(WIDE.classes), axis=1)

        return Predictor()


def wide(database: Database, directory: Path) -> Toy:
    toy = Toy(database.owner_url, database.app_url, directory / "artifacts", recipe=WIDE)
    toy.create()
    toy.add_toy_stage("a", 1.0, shard=0)
    toy.publish("a", None, cause="train")
    return toy


def test_a_client_that_does_not_read_cannot_hold_up_a_deactivation(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that the kernel has not taken count against `covers`; the floor's rise takes them back."""
    monkeypatch.setattr(lease, "IDLE_POLL", 60.0)
    toy = wide(database, tmp_path)
    with serving(toy, factory=Wide, settings=toy.settings(lease_ttl_ms=80_000)) as (client, program):
        with slow_reader(client, toy) as reader:
            wait_until(lambda: fence(program).sending == ((1, 1),))
            started = time.monotonic()
            toy.publish("a", None)
            wait_until(lambda: toy.leases()[0]["covers"] == 2)
            assert time.monotonic() - started < 5  # not a heartbeat, which comes every twenty seconds
            assert fence(program).sending == ()
            received = drain(reader)
        assert b"200 OK" in received
        assert b'"shards"' not in received  # the end of the body was taken back
        assert 'result="cut"' in client.get("/metrics").text
        assert client.version() == 2


def test_what_is_on_its_way_when_a_stop_runs_out_of_time_is_taken_back(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of a stopped server is ended, so no barrier waits for bytes that are still in the process."""
    monkeypatch.setattr(server, "GRACE", 1)
    toy = wide(database, tmp_path)
    with serving(toy, factory=Wide) as (client, program), slow_reader(client, toy) as reader:
        wait_until(lambda: fence(program).sending == ((1, 1),))
        program.server.should_exit = True
        wait_until(lambda: fence(program).sending == ())
        assert toy.leases()[0]["ended_at"] is None
        received = drain(reader)
    assert b"200 OK" in received
    assert b'"shards"' not in received


def fence(program: Program) -> Fence:
    found = program.fleet.find("toy")
    assert found is not None
    return found.replica.fence


def slow_reader(client: Client, toy: Toy) -> socket.socket:
    body = json.dumps({"inputs": ["a"] * 200}).encode()
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", client.base_url.port))
    fields = f"host: x\r\nauthorization: Bearer {toy.token}\r\ncontent-length: {len(body)}\r\n\r\n"
    head = "POST /v1/models/toy/predict HTTP/1.1\r\n" + fields
    reader.sendall(head.encode() + body)
    return reader


def drain(reader: socket.socket) -> bytes:
    received = b""
    try:
        while part := reader.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def test_an_outage_of_postgres_ends_in_503_and_recovers(toy: Toy) -> None:
    """As long as nothing can be granted nothing is answered; the lease bounds how long it goes on before that."""
    with serving(toy, settings=toy.settings(lease_ttl_ms=3000)) as (client, _):
        with toy.connect() as blocker:  # every heartbeat now waits for this lock
            blocker.execute("lock table model in access exclusive mode")
            time.sleep(0.3)
            assert client.predict().status_code == 200
            wait_until(lambda: client.predict().status_code == 503, seconds=15)
            answer = client.predict()
            assert "no valid lease" in answer.json()["detail"]
            assert not client.ready()
        wait_until(lambda: client.predict().status_code == 200, seconds=20)


def test_an_input_that_cannot_be_read_takes_nobody_else_along(toy: Toy) -> None:
    """Whoever waits behind a slow pass is answered with others in one pass; one of them sends what no engine reads."""

    class Picky(ToyEngine):
        pace = 0.2

        def build(self, assembly: Assembly) -> Any:
            inner = super().build(assembly)

            class Predictor(Plain):
                def logits(self, texts: Sequence[str]) -> Logits:
                    if "damaged" in texts:
                        raise InputError("input: an image could not be read")
                    return inner.logits(texts)

            return Predictor()

    statuses: dict[str, int] = {}

    def ask(text: str) -> None:
        statuses[text] = client.predict(text).status_code

    with serving(toy, factory=Picky) as (client, _):
        threads = [threading.Thread(target=ask, args=(text,)) for text in ("first", "a", "damaged", "b")]
        for thread in threads:
            thread.start()
            time.sleep(0.03)
        for thread in threads:
            thread.join()
    assert statuses == {"first": 200, "a": 200, "damaged": 422, "b": 200}


def test_a_stop_lets_requests_end(toy: Toy) -> None:
    class Slow(ToyEngine):
        pace = 0.4

    answers: list[httpx.Response] = []
    with serving(toy, factory=Slow) as (client, program):
        thread = threading.Thread(target=lambda: answers.append(client.predict()))
        thread.start()
        wait_until(lambda: fence(program).computing)
        program.server.should_exit = True
        thread.join()
    assert answers[0].status_code == 200
    assert toy.leases()[0]["ended_at"] is not None
