"""Drives the control API in tests: a real server in a thread, a client, and lines to upload."""

import json
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import psycopg
import uvicorn

from service.api.app import create_app
from service.settings import Settings
from service.store.database import Connection, Pool

RECIPE: dict[str, Any] = {
    "backbone": {"source": "/nowhere", "digest": "0" * 64},
    "classes": ["bad", "good"],
    "shards": 2,
    "slices": 2,
    "orders": 2,
}


Run = Callable[..., tuple[int, str, str]]
"""Runs a command; (exit code, stdout, stderr)."""


@dataclass(frozen=True, slots=True)
class Api:
    """A running API."""

    url: str
    settings: Settings
    client: httpx.Client
    """With a key that has every scope."""
    pool: Pool
    with_scopes: Callable[..., httpx.Client]

    @contextmanager
    def database(self) -> Iterator[Connection]:
        with self.pool.connection() as connection:
            yield connection

    def scalar(self, query: str) -> Any:
        with psycopg.connect(self.settings.database_url) as connection:
            row = connection.execute(query).fetchone()  # type: ignore[arg-type]
            assert row is not None
            return row[0]

    def announce(self, path: str, length: int) -> int:
        """POST with a Content-Length and no body; the status."""
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=10)
        try:
            connection.putrequest("POST", path)
            connection.putheader("Content-Length", str(length))
            connection.endheaders()
            return connection.getresponse().status
        finally:
            connection.close()

    def dataset(self, name: str = "reviews", **fields: Any) -> None:
        body = {"name": name, "shards": 2, "slices": 2, "classes": ["bad", "good"], **fields}
        answer = self.client.post("/v1/datasets", json=body)
        assert answer.status_code == 201, answer.text

    def model(self, name: str = "sentiment", dataset: str = "reviews", **fields: Any) -> None:
        recipe = {**RECIPE, "seed": zlib.crc32(name.encode())}  # two models never share a recipe
        answer = self.client.post("/v1/models", json={"name": name, "dataset": dataset, "recipe": recipe, **fields})
        assert answer.status_code == 201, answer.text

    def upload(self, lines: Iterable[dict[str, Any]], name: str = "reviews") -> httpx.Response:
        return self.client.post(f"/v1/datasets/{name}/records", content=ndjson(lines))

    def request(self, value: str = "ann@example.org", **fields: Any) -> httpx.Response:
        body = {"subject": {"type": "email", "value": value}, **fields}
        return self.client.post("/v1/deletion-requests", json=body)


def line(number: int, person: str = "", **fields: Any) -> dict[str, Any]:
    return {
        "record_id": f"r{number}",
        "subject": {"type": "email", "value": person or f"p{number}@example.org"},
        "text": f"text {number}",
        "label": "good" if number % 2 else "bad",
        **fields,
    }


def ndjson(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def write_keys(directory: Path) -> Path:
    directory.mkdir(mode=0o700)
    for name in ("pepper", "partition"):
        path = directory / name
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return directory


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """Run the API in a thread; its URL."""
    config = uvicorn.Config(create_app(settings), port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
