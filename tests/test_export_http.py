"""`GET /v1/audit/export`: every format read back by another library, its bounds, and what becomes of broken readers."""

import csv
import hashlib
import io
import json
import time
import tracemalloc
from collections import Counter
from contextlib import closing
from datetime import datetime
from http.client import HTTPConnection
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from api_client import Api
from conftest import Database
from export_kit import fill
from ledger_kit import write_signing_key
from pyarrow import parquet

from service.store.api_keys import Scope
from service.store.snapshots import MOST

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration
EXPORT = "/v1/audit/export"
COUNT = 700
STALL = 40_000
"""More rows than fit between a query and a reader who takes nothing."""


@pytest.fixture
def filled(api: Api, database: Database) -> Api:
    fill(api, database.owner_url, COUNT)
    return api


def export(api: Api, form: str, **params: str) -> httpx.Response:
    answer = api.client.get(EXPORT, params={"format": form, **params})
    assert answer.status_code == 200, answer.text
    return answer


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(each) for each in answer.text.splitlines()]


def events(api: Api, kind: str) -> list[dict[str, Any]]:
    with psycopg.connect(api.settings.database_url) as connection:
        rows = connection.execute("SELECT body FROM event_pending WHERE kind = %s ORDER BY id", [kind])
        return [body for (body,) in rows]


def busy(database: Database) -> int:
    """Connections of the programs that hold a snapshot open."""
    with psycopg.connect(database.owner_url) as connection:
        found = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE usename = 'expunge_app' AND query LIKE '%%\"export\"%%'"
            " AND datname = current_database()"
        ).fetchone()
        assert found is not None
        return found[0]


def wait_until_free(database: Database) -> None:
    until = time.monotonic() + 20
    while busy(database):
        assert time.monotonic() < until, "a connection is still reading"
        time.sleep(0.05)


def test_jsonl_csv_and_parquet_hold_the_same_rows(filled: Api) -> None:
    rows = lines(export(filled, "jsonl"))
    assert len(rows) == COUNT
    cells = list(csv.DictReader(io.StringIO(export(filled, "csv").text, newline="")))
    table = parquet.read_table(io.BytesIO(export(filled, "parquet").content))
    assert [row["request_id"] for row in rows] == [row["request_id"] for row in cells]
    assert table.column_names == list(rows[0]) == list(cells[0])
    for row, cell, stored in zip(rows, cells, table.to_pylist(), strict=True):
        for name, value in row.items():
            assert cell[name] == ("" if value is None else json.dumps(value).strip('"'))
            kept = stored[name]
            assert (kept.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if isinstance(kept, datetime) else kept) == value
    assert rows == sorted(rows, key=lambda row: (row["received_at"], row["request_id"]))


def test_what_a_request_row_says(filled: Api) -> None:
    rows = lines(export(filled, "jsonl"))
    of = Counter((row["state"], row["outcome"]) for row in rows)
    assert of["completed", "erased"] == of["rejected", None] == COUNT // 7
    for row in rows:
        assert UUID(row["request_id"])
        assert row["models"] == 1
        ended = row["state"] in {"completed", "rejected", "revoked"}
        assert (row["ended_at"] is not None) == ended == (row["days"] is not None)
        if row["state"] == "completed":
            assert row["days"] == pytest.approx(6 + 1 / 1440)
            assert row["overdue"] is False
        if ended and row["state"] != "completed":
            assert row["days"] == pytest.approx(2 + 1 / 1440)
            assert row["reason_code"] == ("insuf_verification" if row["state"] == "rejected" else "asked_again")
        if row["state"] in {"deactivated", "failed"}:
            assert row["overdue"] == (row["due_at"] < time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()))
        assert (row["deactivated_at"] is not None) == (
            row["outcome"] in {"erased", "partial"} or row["state"] == "deactivated"
        )


def test_targets_and_one_request(filled: Api) -> None:
    targets = lines(export(filled, "jsonl", what="targets"))
    assert len(targets) == COUNT
    assert {target["model"] for target in targets} == {"sentiment"}
    chosen = targets[5]["request_id"]
    assert [row["request_id"] for row in lines(export(filled, "jsonl", request=chosen))] == [chosen]
    assert lines(export(filled, "jsonl", request=chosen, what="targets")) == [targets[5]]


def test_ranges_are_half_open_and_know_zones(filled: Api) -> None:
    everything = lines(export(filled, "jsonl"))
    first = lines(export(filled, "jsonl", **{"from": "2026-01-02", "to": "2026-01-03"}))
    again = lines(export(filled, "jsonl", **{"from": "2026-01-02T05:30:00+05:30", "to": "2026-01-02T19:00:00-05:00"}))
    assert [row["received_at"] for row in first] == [f"2026-01-02T{hour:02}:00:00.000000Z" for hour in range(24)]
    assert first == again
    rest = lines(export(filled, "jsonl", **{"from": "2026-01-03"}))
    before = lines(export(filled, "jsonl", to="2026-01-02"))
    assert before + first + rest == everything


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"from": "2026-02-01", "to": "2026-01-01"}, "from is after to"),
        ({"from": "2026-02-01T00:00:00"}, "with its zone"),
        ({"from": "2026-02-01T00:00:00 02:00"}, "%2B"),
        ({"to": "soon"}, "must be a day"),
        ({"to": "0001-01-01T00:00:00+14:00"}, "must be a day"),
        ({"from": "2026-02-01", "request": str(UUID(int=1))}, "not both"),
        ({"format": "pdf", "what": "events"}, "leave `what` out"),
        ({"format": "xlsx"}, "format"),
        ({"request": "x"}, "request"),
    ],
)
def test_bad_input_is_422_and_leaves_no_event(api: Api, params: dict[str, str], word: str) -> None:
    answer = api.client.get(EXPORT, params={"format": "csv", **params})
    assert answer.status_code == 422, answer.text
    assert word in answer.text
    assert events(api, "audit.exported") == []


def test_it_needs_the_scope_and_a_request_that_exists(api: Api) -> None:
    assert api.with_scopes(Scope.DELETION_READ).get(EXPORT, params={"format": "csv"}).status_code == 403
    assert api.client.get(EXPORT, params={"format": "csv", "request": str(UUID(int=1))}).status_code == 404


def test_an_empty_range_is_a_valid_file_and_says_so(filled: Api) -> None:
    none = {"from": "2020-01-01", "to": "2020-01-01"}
    assert "X-Expunge-Empty" not in export(filled, "csv").headers
    for form in ("jsonl", "csv", "parquet"):
        answer = export(filled, form, **none)
        assert answer.headers["X-Expunge-Empty"] == "true"
        if form == "jsonl":
            assert answer.content == b""
        elif form == "csv":
            assert len(list(csv.reader(io.StringIO(answer.text, newline="")))) == 1
        else:
            table = parquet.read_table(io.BytesIO(answer.content))
            assert table.num_rows == 0
            assert "request_id" in table.column_names


def test_an_export_is_an_event_with_the_digest_of_its_bytes(filled: Api) -> None:
    answer = export(filled, "csv", **{"from": "2026-01-02", "to": "2026-01-03"})
    (begun,) = events(filled, "audit.exported")
    token = filled.client.headers["Authorization"]
    assert begun == {
        "export_id": answer.headers["X-Expunge-Export"],
        "actor": token.removeprefix("Bearer xp_")[:8],
        "format": "csv",
        "what": "requests",
        "since": "2026-01-02T00:00:00.000000Z",
        "until": "2026-01-03T00:00:00.000000Z",
        "about": None,
    }
    (ended,) = events(filled, "audit.export_ended")
    assert ended == {
        "export_id": begun["export_id"],
        "digest": hashlib.sha256(answer.content).hexdigest(),
        "bytes": len(answer.content),
        "whole": True,
    }


def test_memory_does_not_grow_with_the_range(api: Api, database: Database) -> None:
    write_signing_key(api.settings.keys_dir)
    fill(api, database.owner_url, 24_000)

    def peak(form: str, to: str) -> tuple[int, int]:
        tracemalloc.start()
        try:
            with api.client.stream("GET", EXPORT, params={"format": form, "to": to}) as answer:
                assert answer.status_code == 200
                size = sum(map(len, answer.iter_raw()))
            return tracemalloc.get_traced_memory()[1], size
        finally:
            tracemalloc.stop()

    for form in ("jsonl", "parquet", "bundle"):
        peak(form, "2026-01-02")  # what is loaded and cached at the first call
        few, size = peak(form, "2027-03-01")
        many, whole = peak(form, "2032-01-01")
        assert whole > 2 * size
        assert many < 1.5 * few, (form, few, many, size, whole)


def test_hostile_names_are_text_in_a_spreadsheet(filled: Api, database: Database) -> None:
    """What the tables' own checks would refuse, should one ever be loosened."""
    with psycopg.connect(database.owner_url) as connection:
        connection.execute("ALTER TABLE model DROP CONSTRAINT model_name_check")
        connection.execute("UPDATE model SET name = %s", ['=HYPERLINK("http://x")'])
        connection.execute("UPDATE request_target SET error = %s", ["@SUM(A1)"])
    rows = list(csv.DictReader(io.StringIO(export(filled, "csv", what="targets").text, newline="")))
    assert {row["model"] for row in rows} == {'\'=HYPERLINK("http://x")'}
    assert {row["error"] for row in rows} == {"'@SUM(A1)"}
    assert {row["model"] for row in lines(export(filled, "jsonl", what="targets"))} == {'=HYPERLINK("http://x")'}


def hang(api: Api, form: str = "jsonl") -> HTTPConnection:
    """Ask, read a little, and read no more."""
    connection = HTTPConnection(api.url.removeprefix("http://"), timeout=20)
    connection.request("GET", f"{EXPORT}?format={form}&what=targets", headers=dict(api.client.headers))
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.read(100)
    return connection


def test_a_reader_who_hangs_up_ends_the_query_and_frees_the_connection(api: Api, database: Database) -> None:
    fill(api, database.owner_url, STALL)
    for _ in range(MOST + 1):
        connection = hang(api)
        assert busy(database) == 1
        connection.close()
        wait_until_free(database)
    until = time.monotonic() + 20
    while len(events(api, "audit.export_ended")) <= MOST:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert [ended["whole"] for ended in events(api, "audit.export_ended")] == [False] * (MOST + 1)


def test_exports_that_stand_still_starve_nobody(api: Api, database: Database) -> None:
    fill(api, database.owner_url, STALL)
    stalled = [hang(api) for _ in range(MOST)]
    try:
        refused = api.client.get(EXPORT, params={"format": "csv"})
        assert refused.status_code == 503
        assert refused.headers["Retry-After"]
        assert "try again" in refused.json()["detail"]
        for number in range(20):  # more than the pool has connections
            assert api.request(f"person{number}@example.org").status_code == 202
    finally:
        for connection in stalled:
            connection.close()
    wait_until_free(database)
    assert lines(export(api, "jsonl", to="2026-01-02"))


def test_when_postgres_ends_the_read_the_answer_is_seen_to_be_cut(api: Api, database: Database) -> None:
    fill(api, database.owner_url, STALL)
    with closing(hang(api)) as connection, psycopg.connect(database.owner_url) as owner:
        owner.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%%\"export\"%%'"
            " AND usename = 'expunge_app' AND datname = current_database()"
        )
        owner.commit()
        reader = connection.sock.makefile("rb")  # the connection's own answer was read from before
        seen = reader.read()
    assert not seen.endswith(b"0\r\n\r\n")
    wait_until_free(database)
    (ended,) = events(api, "audit.export_ended")
    assert ended["whole"] is False
    assert lines(export(api, "jsonl", to="2026-01-01T01:00:01Z"))
