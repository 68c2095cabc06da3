"""Uploads: accepted or rejected as a whole, whatever is wrong with them."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from api_client import Api, line, ndjson

from service.store import cells, datasets, payloads
from service.store.artifacts import open_artifacts
from shards.manifest import check_records

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration


def counts(api: Api) -> dict[str, int]:
    tables = ("subject", "subject_alias", "record", "record_subject")
    return {table: api.scalar(f"SELECT count(*) FROM {table}") for table in tables}


NOTHING = {"subject": 0, "subject_alias": 0, "record": 0, "record_subject": 0}


def test_an_upload_lies_in_its_cells_under_their_manifests(api: Api) -> None:
    api.dataset()
    answer = api.upload(line(n) for n in range(40))
    assert answer.status_code == 201
    assert answer.json() == {"accepted": 40, "skipped": 0, "cells": 4, "subjects": 40}
    answer = api.upload(line(n) for n in range(40, 60))
    assert answer.json()["accepted"] == 20
    replaced = answer.json()["cells"]  # the key of this database says which of the four

    artifacts = open_artifacts(api.settings.artifact_url, api.settings.file_keys_url)
    with api.database() as connection:
        dataset = datasets.get_dataset(connection, "reviews")
        grid = {cell.cell_id: cell for cell in cells.list_grid(connection, dataset.dataset_id)}
        found = cells.list_cells(connection, dataset.dataset_id)
    texts: set[str] = set()
    for cell in found:
        assert cell.object_name is not None
        stored = payloads.decode(artifacts.get(cell.object_name))
        check_records((each.record for each in stored), grid[cell.cell_id].root)
        assert cell.object_name.split("/")[1] == grid[cell.cell_id].root
        assert {each.generation for each in stored} <= set(range(1, cell.generation + 1))
        texts |= {each.record.text for each in stored}
    assert texts == {f"text {n}" for n in range(60)}
    assert api.scalar("SELECT count(*) FROM artifact WHERE state = 'live'") == 4
    assert api.scalar("SELECT count(*) FROM artifact WHERE state = 'doomed'") == replaced > 0
    assert api.client.get("/v1/datasets/reviews").json()["rows"] == 60


def test_records_of_one_owner_share_a_cell_and_concern_others(api: Api) -> None:
    api.dataset(shards=16, slices=4)
    lines = [line(n, "  Ann@Example.org ") for n in range(3)]
    lines.append(line(3, "ann@example.org", also_concerns=[{"type": "user_id", "value": "7"}]))
    answer = api.upload(lines)
    assert answer.json() == {"accepted": 4, "skipped": 0, "cells": 1, "subjects": 2}
    assert counts(api) == {"subject": 2, "subject_alias": 2, "record": 4, "record_subject": 5}


@pytest.mark.parametrize(
    ("bad", "number", "says"),
    [
        (b'{"record_id": "x"', 3, "not valid JSON"),
        (b"[1]", 3, "must be a JSON object"),
        (b'"\xff"', 3, "not UTF-8"),
        (b"[" * 100_000, 3, "not valid JSON"),
        ({"text": None}, 3, "text must be a string"),
        ({"text": ""}, 3, "text is empty"),
        ({"text": "a\x00b"}, 3, "NUL"),
        ({"text": "a\ud800b"}, 3, "lone surrogate"),
        ({"subject": {"type": "email", "value": "\udfff"}}, 3, "lone surrogate"),
        ({"text": "x" * 1_100_000}, 3, "longer than 1048576 bytes"),
        ({"label": "ugly"}, 3, "none of the dataset's classes"),
        ({"record_id": "r0"}, 3, "the same as in line 1"),
        ({"record_id": "r" * 257}, 3, "record_id is longer than 256"),
        ({"record_id": 7}, 3, "record_id must be a string"),
        ({"subject": "ann"}, 3, "subject must have the fields"),
        ({"subject": {"type": "E-Mail", "value": "a"}}, 3, "subject.type must match"),
        ({"subject": {"type": "email", "value": "  "}}, 3, "blank"),
        ({"also_concerns": {}}, 3, "also_concerns must list"),
        ({"colour": "red"}, 3, "unknown field"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_kept(api: Api, bad: Any, number: int, says: str) -> None:
    api.dataset()
    wrong = bad if isinstance(bad, bytes) else json.dumps({**line(2, "secret@example.org"), **bad}).encode()
    body = ndjson([line(0), line(1)]) + wrong + b"\n" + ndjson([line(3)])
    answer = api.client.post("/v1/datasets/reviews/records", content=body)
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["line"] == number
    assert says in problem["detail"]
    assert problem["detail"].startswith(f"line {number}: ")
    assert "secret" not in answer.text
    assert counts(api) == NOTHING


def test_each_missing_field_is_named(api: Api) -> None:
    api.dataset()
    for field in ("record_id", "subject", "text", "label"):
        wrong = {name: value for name, value in line(1).items() if name != field}
        problem = api.upload([line(0), wrong]).json()
        assert (problem["line"], problem["field"]) == (2, field)
        assert f"{field} is missing" in problem["detail"]


@pytest.mark.parametrize("body", [b"", b"\n\n", b"  \r\n"])
def test_an_empty_upload_is_refused(api: Api, body: bytes) -> None:
    api.dataset()
    answer = api.client.post("/v1/datasets/reviews/records", content=body)
    assert answer.status_code == 422
    assert "no record" in answer.json()["detail"]


def test_a_large_text_crlf_a_byte_order_mark_and_no_last_newline_are_fine(api: Api) -> None:
    api.dataset()
    large = json.dumps(line(0, text="x" * 1_000_000)).encode()
    body = b"\xef\xbb\xbf" + large + b"\r\n\r\n" + json.dumps(line(1, text="ünï 🦜")).encode()
    answer = api.client.post("/v1/datasets/reviews/records", content=body)
    assert answer.json()["accepted"] == 2


def test_a_line_without_end_is_refused_before_it_is_read_whole(api: Api) -> None:
    api.dataset()
    answer = api.client.post("/v1/datasets/reviews/records", content=(b"x" * 2**16 for _ in range(100)))
    assert answer.status_code == 422
    assert answer.json()["line"] == 1


def test_one_label_alone_is_fine(api: Api) -> None:
    api.dataset()
    assert api.upload(line(n, label="good") for n in range(20)).json()["accepted"] == 20


def test_a_record_id_in_use_is_refused_also_from_another_subject(api: Api) -> None:
    api.dataset()
    assert api.upload([line(0)]).status_code == 201
    before = counts(api)
    problem = api.upload([line(5), line(0, "other@example.org")]).json()
    assert (problem["status"], problem["line"], problem["field"]) == (422, 2, "record_id")
    assert counts(api) == before
    assert api.scalar("SELECT count(*) FROM artifact WHERE state = 'writing'") == 0


def test_a_deleted_record_id_never_comes_back(api: Api) -> None:
    api.dataset()
    api.model()
    api.upload([line(0)])
    assert api.request("p0@example.org").status_code == 202
    with api.database() as connection:
        connection.execute(
            "INSERT INTO tombstone (record_id, dataset_id, cell_id, commitment, added, request_id)"
            " SELECT r.record_id, dataset_id, cell_id, commitment, added, request_id"
            " FROM record r, deletion_request"
        )
    problem = api.upload([line(0, "other@example.org")]).json()
    assert "never comes back" in problem["detail"]


def test_the_row_cap_counts_what_is_there_and_what_comes(api: Api) -> None:
    api.dataset(subject_row_cap=3)
    assert api.upload([line(0, "a"), line(1, "a")]).status_code == 201
    problem = api.upload([line(2, "a"), line(3, "b"), line(4, "a")]).json()
    assert problem["line"] == 3
    assert "more than 3 records" in problem["detail"]
    assert api.upload([line(2, "a")]).status_code == 201


def test_do_not_train_lines_are_skipped_and_only_counted(api: Api) -> None:
    api.dataset()
    api.model()
    api.upload([line(0, "gone@example.org")])
    api.request("gone@example.org")
    with api.database() as connection:
        connection.execute(
            "INSERT INTO do_not_train (subject_id, dataset_id, request_id)"
            " SELECT subject_id, NULL, request_id FROM deletion_request"
        )
    also = [{"type": "email", "value": "gone@example.org"}]
    lines = [line(1, "GONE@example.org"), line(2), line(3, also_concerns=also)]
    answer = api.upload(lines)
    assert answer.status_code == 201
    assert answer.json() == {"accepted": 1, "skipped": 2, "cells": 1, "subjects": 1}
    assert api.scalar("SELECT body FROM event_pending WHERE kind = 'ingestion.refused'") == {
        "lines": 2,
        "reason": "do_not_train",
    }
    assert api.upload([line(4, "gone@example.org")]).json() == {
        "accepted": 0,
        "skipped": 1,
        "cells": 0,
        "subjects": 0,
    }
    with api.database() as connection:
        connection.execute("UPDATE do_not_train SET lifted_at = now()")
    assert api.upload([line(5, "gone@example.org")]).json()["accepted"] == 1


def test_uploads_side_by_side_lose_nothing(api: Api) -> None:
    api.dataset()

    def send(part: int) -> int:
        # Everybody appears in every upload, and half of them are new to all.
        lines = [line(100 * part + n, f"p{n}@example.org") for n in range(20)]
        answer = api.upload(lines)
        assert answer.status_code in {201, 503}, answer.text
        return answer.json().get("accepted", 0)

    with ThreadPoolExecutor(4) as executor:
        accepted = sum(executor.map(send, range(6)))
    assert accepted >= 20
    assert counts(api)["record"] == accepted
    assert counts(api)["subject"] == 20
    assert api.client.get("/v1/datasets/reviews").json()["rows"] == accepted
    assert api.scalar("SELECT count(*) FROM artifact WHERE state = 'writing'") == 0


def test_an_upload_over_the_limit_is_413(api: Api) -> None:
    api.dataset()
    assert api.announce("/v1/datasets/reviews/records", 2**30) == 413


def test_unknown_dataset(api: Api) -> None:
    assert api.upload([line(0)], name="nothing").status_code == 404


def test_no_personal_data_reaches_postgres(api: Api) -> None:
    api.dataset()
    api.upload([line(0, "canary@example.org", text="canary text", record_id="canary-id")])
    with api.database() as connection:
        tables = connection.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        ).fetchall()
        for (table,) in tables:
            rows = connection.execute(f"SELECT t::text FROM {table} t").fetchall()  # type: ignore[arg-type]
            assert not [row for row in rows if "canary" in row[0]]
