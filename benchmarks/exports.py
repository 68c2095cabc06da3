"""`export`: an export of many requests in each format, over HTTP, from an API of its own: rate and memory."""

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from benchmarks.ledger import postgres, signing_settings
from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.show import Screen
from service.evidence.keys import load_signing_key, public_pem
from service.settings import Settings
from service.store import api_keys
from service.store.artifacts import open_artifacts
from service.store.database import Pool, make_pool, transaction
from workers.sequencer import Sequencer

REQUESTS = 100_000
CERTIFICATES = 2_000
CERTIFICATE_BYTES = 20_000
BATCH = 10_000
FORMATS = ("jsonl", "csv", "parquet", "bundle", "pdf")
START_WITHIN = 30.0
# As the programs leave a completed erasure: its rows, and three of its events.
FILL = """
WITH made AS (
    INSERT INTO deletion_request (request_id, kind, state, outcome, subject_commitment, regime, received_at, due_at,
                                  created_at, created_by)
    SELECT gen_random_uuid(), 'erase', 'completed', 'erased', sha256(n::text::bytea),
           (ARRAY['gdpr', 'ccpa'])[1 + n %% 2], t.at, t.at + interval '30 days', t.at + interval '1 second', k.prefix
    FROM generate_series(%(first)s::int, %(last)s::int) n
    CROSS JOIN LATERAL (SELECT timestamptz '2024-01-01' + make_interval(mins => n * 10) AS at) t
    CROSS JOIN (SELECT prefix FROM api_key LIMIT 1) k
    RETURNING *
), targets AS (
    INSERT INTO request_target (request_id, model_id, state, outcome, version, deactivated_at, erased_at, completed_at)
    SELECT d.request_id, m.model_id, d.state, d.outcome, 2, d.created_at + interval '0.03 seconds',
           d.created_at + interval '7 days', d.created_at + interval '7 days 1 second'
    FROM made d CROSS JOIN model m
)
INSERT INTO event_pending (kind, request_id, model_id, body, created_at)
SELECT e.kind, d.request_id, m.model_id, e.body, d.created_at
FROM made d CROSS JOIN model m CROSS JOIN (VALUES
    ('target.deactivating', '{"version": 2, "records": 3, "stages": 4}'::jsonb),
    ('target.deactivated', '{"version": 2}'), ('target.completed', '{"outcome": "erased"}')) e (kind, body)
"""
CERTIFY = """
INSERT INTO certificate (request_id, model_id, envelope, digest, issued_at)
SELECT request_id, model_id, jsonb_build_object('payload', %(payload)s::text, 'payloadType', 'application/json'),
       repeat('0', 64), completed_at
FROM request_target ORDER BY request_id LIMIT %(count)s::int
"""


class _Export(NamedTuple):
    seconds: float
    size: int
    grown: float
    """MiB that the serving process held at most, over what it held when it was ready."""


def measure(screen: Screen, *, full: bool) -> Measured:
    """One export of each format by an API that was started for it; `full` has no larger size."""
    del full
    with tempfile.TemporaryDirectory(prefix="expunge-bench-") as home, postgres(Path(home)) as url:
        settings = _settings(Path(home), url)
        pool = make_pool(url, size=3, checked=False)
        pool.open()
        try:
            with transaction(pool) as connection:
                token = api_keys.create(connection, "bench", list(api_keys.Scope))
            with _api(settings, Path(home)) as (api, _):
                _declare(api, token)
            with screen.bar(f"writing {REQUESTS:,} requests", REQUESTS) as advance:
                _fill(pool, advance)
            sequencer = Sequencer(pool, open_artifacts(settings.artifact_url, settings.file_keys_url), settings)
            with screen.bar("numbering their events", 1) as advance:
                leaves = 0
                while done := sequencer.sequence():
                    leaves += done
                sequencer.publish()
                advance(1)
        finally:
            pool.close()
        found: dict[str, _Export] = {}
        with screen.bar("exporting", len(FORMATS)) as advance:
            for form in FORMATS:
                with _api(settings, Path(home)) as (api, pid):
                    found[form] = _export(api, token, form, pid)
                advance(1)
    tables = [found[form] for form in ("jsonl", "csv", "parquet")]
    return Measured(
        {
            "rows_per_s": min(REQUESTS / each.seconds for each in tables),
            "peak_mib": max(each.grown for each in found.values()),
            **{f"{form}_rows_per_s": REQUESTS / each.seconds for form, each in found.items()},
            **{f"{form}_mib": each.grown for form, each in found.items()},
        },
        {
            "requests": REQUESTS,
            "events": leaves,
            "certificates": CERTIFICATES,
            "certificate_bytes": CERTIFICATE_BYTES,
            "bytes": {form: each.size for form, each in found.items()},
            "note": "one reader over HTTP who takes what comes; a row is a request; memory is the resident set's "
            "high-water mark of the serving process over what it held when it was ready (without the process beside "
            "it that sets a PDF); the bundle also holds targets, certificates, events with what opens them, and the "
            "whole log; rows_per_s is the slowest of jsonl, csv and parquet, peak_mib the largest of all formats",
        },
    )


def _settings(home: Path, url: str) -> Settings:
    settings = signing_settings(home, url)
    keys = settings.keys_dir
    for name in ("pepper", "partition"):
        (keys / name).touch(mode=0o600)
        (keys / name).write_text(secrets.token_hex(32))
    (keys / "signing.pub").write_bytes(public_pem(load_signing_key(keys / "signing.pem")))
    for name in ("artifacts", "file-keys"):
        (home / name).mkdir(mode=0o700)
    return settings.model_copy(
        update={
            "redis_url": f"unix://{home}/nobody.sock",  # nobody is rung
            "artifact_url": (home / "artifacts").as_uri(),
            "file_keys_url": (home / "file-keys").as_uri(),
        }
    )


@contextmanager
def _api(settings: Settings, home: Path) -> Generator[tuple[str, int]]:
    """An API process that is ready: its URL and process id."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    named = ("database_url", "redis_url", "artifact_url", "file_keys_url", "keys_dir")
    environment = os.environ | {f"EXPUNGE_{name.upper()}": str(getattr(settings, name)) for name in named}
    with (home / "api.log").open("ab") as log:
        command = [sys.executable, "-m", "service.api", "--port", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + START_WITHIN
        while not _ready(url) or process.poll() is not None:
            if process.poll() is not None or time.monotonic() > until:
                raise BenchmarkError(f"the API did not start\n{(home / 'api.log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(timeout=30)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


def _declare(url: str, token: str) -> None:
    grid = {"shards": 2, "slices": 2, "classes": ["bad", "good"]}
    recipe = {**grid, "backbone": {"source": "/nowhere", "digest": "0" * 64}, "orders": 2}
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}) as client:
        for path, body in (
            ("/v1/datasets", {"name": "reviews", **grid}),
            ("/v1/models", {"name": "reviews-model", "dataset": "reviews", "recipe": recipe}),
        ):
            client.post(path, json=body).raise_for_status()


def _fill(pool: Pool, advance: Callable[[float], None]) -> None:
    for first in range(0, REQUESTS, BATCH):
        with transaction(pool) as connection:
            connection.execute(FILL, {"first": first, "last": first + BATCH - 1})
        advance(BATCH)
    with transaction(pool) as connection:
        payload = secrets.token_urlsafe(CERTIFICATE_BYTES * 3 // 4)
        connection.execute(CERTIFY, {"payload": payload, "count": CERTIFICATES})
        connection.execute("ANALYZE")


def _export(url: str, token: str, form: str, pid: int) -> _Export:
    before = _memory(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the high-water mark begins anew
    headers = {"Authorization": f"Bearer {token}"}
    began, size, rows = time.perf_counter(), 0, 0
    with httpx.stream("GET", f"{url}/v1/audit/export?format={form}", headers=headers, timeout=600) as answer:
        answer.raise_for_status()
        for chunk in answer.iter_raw():
            size += len(chunk)
            rows += chunk.count(b"\n")
    seconds = time.perf_counter() - began
    if form in {"jsonl", "csv"} and rows != REQUESTS + (form == "csv"):
        raise BenchmarkError(f"{rows} rows came instead of {REQUESTS}")
    return _Export(seconds, size, _memory(pid, "VmHWM") - before)


def _memory(pid: int, name: str) -> float:
    """MiB of the process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if found is None:
        raise BenchmarkError("the memory of a process is read from /proc, which this system does not have")
    return int(found[1]) / 1024
