import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from service.cli.demo.assets import DemoError
from service.cli.demo.calls import Calls
from service.cli.demo.sample import CLASSES, Review
from service.cli.demo.traffic import Traffic


class Server:
    """A model server and API that answers as told: a text is recommended when it holds "good"."""

    def __init__(self) -> None:
        self.version, self.status, self.lines = 1, 200, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self._body()
                version = outer.version
                if self.path.endswith("/records"):
                    outer.lines += len([json.loads(line) for line in body.splitlines()])
                    answer = {"accepted": outer.lines, "subjects": 1}
                elif outer.status == 200:
                    texts = json.loads(body)["inputs"]
                    answer = {"outputs": [{"label": CLASSES["good" in text]} for text in texts]}
                else:
                    answer = {"detail": "not now"}
                data = json.dumps(answer).encode()
                self.send_response(outer.status)
                self.send_header("X-Expunge-Version", str(version))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _body(self) -> bytes:
                if length := self.headers["Content-Length"]:
                    return self.rfile.read(int(length))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def traffic(server: Server) -> Iterator[Traffic]:
    running = Traffic([server.url, server.url], "m", "key", ["a", "b"], pause=0.001)
    yield running
    running.stop()


def test_traffic_counts_and_sees_versions(server: Server, traffic: Traffic) -> None:
    traffic.start()
    traffic.wait_for(10)
    server.version = 2
    traffic.wait_for(10)
    seen = traffic.stop()
    assert seen.total >= 20
    assert (seen.failed, seen.stale, seen.versions) == (0, 0, (1, 2))


def test_an_answer_from_below_the_floor_is_stale_only_if_sent_afterwards(server: Server, traffic: Traffic) -> None:
    traffic.servers = [server.url]  # one sender: whatever follows its next answer was sent from now on
    traffic.start()
    traffic.wait_for(5)
    assert traffic.seen().stale == 0
    traffic.floor = 2
    traffic.wait_for(5)
    assert traffic.seen().stale > 0
    server.version = 2
    traffic.wait_for(4)
    stale = traffic.seen().stale
    traffic.wait_for(5)
    assert traffic.seen().stale == stale


def test_failures_are_counted_by_kind(server: Server, traffic: Traffic) -> None:
    traffic.start()
    traffic.wait_for(2)
    server.status = 503
    traffic.wait_for(4)
    server.close()
    time.sleep(0.05)
    seen = traffic.stop()
    assert seen.failures["HTTP 503"] >= 2
    assert seen.failed == sum(seen.failures.values())


def reviews(count: int) -> list[Review]:
    return [Review(f"r{n}", "x", "good" if n % 4 else "poor", CLASSES[n % 2]) for n in range(count)]


def test_accuracy_is_the_share_of_right_labels(server: Server) -> None:
    calls, done = Calls(server.url, "key"), []
    found, versions = calls.accuracy([server.url, server.url], "m", reviews(100), done.append)
    assert found == 0.75
    assert versions == {1}
    assert sum(done) == 100
    calls.close()


def test_an_upload_is_streamed_with_progress(server: Server) -> None:
    calls, done = Calls(server.url, "key"), []
    assert calls.upload("d", reviews(120), done.append)["accepted"] == 120
    assert done == [50, 50, 20]
    calls.close()


def test_a_refusal_says_the_problem(server: Server) -> None:
    calls = Calls(server.url, "key")
    server.status = 503
    with pytest.raises(DemoError, match=r"POST /v1/models/m/predict was answered with 503: not now"):
        calls.accuracy([server.url], "m", reviews(1), lambda _more: None)
    calls.close()
