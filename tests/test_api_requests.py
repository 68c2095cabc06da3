"""Deletion requests over HTTP: intake, idempotency, what is shown to whom."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from api_client import RECIPE, Api, line
from psycopg.types.json import Jsonb

from service.evidence.events import FIELDS, EventKind
from service.store.api_keys import Scope
from service.store.secrets import read_secrets
from shards.digest import canonical, keyed

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def ready(api: Api) -> Api:
    """An API with a dataset, a record of Ann and a model."""
    api.dataset()
    api.model()
    assert api.upload([line(0, "ann@example.org"), line(1)]).status_code == 201
    return api


def test_a_request_is_durable_with_its_answer(ready: Api) -> None:
    answer = ready.request(" ANN@example.org", reference="T-17", regime="ccpa")
    assert answer.status_code == 202
    body = answer.json()
    assert answer.headers["Location"] == f"/v1/deletion-requests/{body['request_id']}"
    assert (body["state"], body["kind"], body["outcome"]) == ("received", "erase", None)
    assert [(t["model"], t["state"]) for t in body["targets"]] == [("sentiment", "received")]
    received, due = (datetime.fromisoformat(body[name]) for name in ("received_at", "due_at"))
    assert due - received == timedelta(days=45)
    shown = ready.client.get(answer.headers["Location"]).json()
    assert shown == body
    subject = "SELECT a.subject_id = d.subject_id FROM subject_alias a, deletion_request d, record r WHERE "
    assert ready.scalar(subject + "r.owner_id = a.subject_id ORDER BY 1 DESC LIMIT 1") is True


def test_the_event_has_its_closed_fields_and_the_commitment_can_be_opened(ready: Api) -> None:
    body = ready.request("ann@example.org").json()
    links = body["links"]
    events = ready.client.get(links["events"]).json()["events"]
    assert [event["kind"] for event in events] == ["request.received"]
    found = events[0]["body"]
    assert set(found) == FIELDS[EventKind.REQUEST_RECEIVED]
    assert found["models"] == ["sentiment"]
    pepper = read_secrets(ready.settings.keys_dir).pepper
    request_id = ready.scalar("SELECT request_id FROM deletion_request")
    opened = keyed(pepper, b"request", request_id.bytes, b"email", b"ann@example.org")
    assert found["subject_commitment"] == opened.hex()


def test_an_unknown_subject_is_answered_in_the_same_way(ready: Api) -> None:
    known, unknown = (ready.request(who).json() for who in ("ann@example.org", "nobody@example.org"))
    varying = {"request_id", "received_at", "due_at", "created_at", "links"}
    assert {k: v for k, v in known.items() if k not in varying} == {
        k: v for k, v in unknown.items() if k not in varying
    }


def test_records_are_named_by_the_callers_ids(ready: Api) -> None:
    body = {"record_ids": ["r0", "r1", "r1", "unknown"], "dataset": "reviews"}
    answer = ready.client.post("/v1/deletion-requests", json=body)
    assert answer.status_code == 202
    found = ready.scalar(
        "SELECT count(*) FROM deletion_request_record JOIN record USING (record_id) JOIN request_target"
        " USING (request_id)"
    )
    assert found == 2
    assert ready.scalar("SELECT count(*) FROM deletion_request WHERE subject_id IS NOT NULL") == 0


def test_every_model_on_a_deletable_dataset_is_a_target(ready: Api) -> None:
    ready.model("second")
    ready.dataset("evaluation", deletable=False)
    ready.model("other", "evaluation")
    assert [t["model"] for t in ready.request().json()["targets"]] == ["sentiment", "second"]
    answer = ready.request(models=["sentiment"])
    assert answer.status_code == 422
    assert "second" in answer.json()["detail"]
    named = ready.request(models=["second", "sentiment"]).json()
    assert [t["model"] for t in named["targets"]] == ["sentiment", "second"]
    assert ready.request(models=["other"]).status_code == 422
    assert ready.request(models=["missing"]).status_code == 422


def test_without_a_model_there_is_nothing_to_delete_from(api: Api) -> None:
    api.dataset()
    answer = api.request()
    assert answer.status_code == 409
    assert "no model to delete from" in answer.json()["detail"]
    assert api.scalar("SELECT count(*) FROM deletion_request") == 0


def test_the_same_key_and_body_give_the_same_request(ready: Api) -> None:
    headers = {"Idempotency-Key": "ann@example.org-1"}
    body = {"subject": {"type": "email", "value": "ann@example.org"}, "regime": "gdpr"}
    first = ready.client.post("/v1/deletion-requests", json=body, headers=headers)
    again = ready.client.post("/v1/deletion-requests", json=dict(reversed(body.items())), headers=headers)
    assert first.status_code == again.status_code == 202
    assert first.json()["request_id"] == again.json()["request_id"]
    assert first.headers["Location"] == again.headers["Location"]
    other = ready.client.post("/v1/deletion-requests", json={**body, "regime": "ccpa"}, headers=headers)
    assert other.status_code == 422
    assert other.json()["field"] == "Idempotency-Key"
    assert ready.scalar("SELECT count(*) FROM deletion_request") == 1
    assert ready.scalar("SELECT count(*) FROM event_pending WHERE kind = 'request.received'") == 1


def test_another_callers_key_is_another_key(ready: Api) -> None:
    headers = {"Idempotency-Key": "1"}
    body = {"subject": {"type": "email", "value": "ann@example.org"}}
    other = ready.with_scopes(Scope.DELETION_WRITE)
    answers = [client.post("/v1/deletion-requests", json=body, headers=headers) for client in (ready.client, other)]
    assert len({answer.json()["request_id"] for answer in answers}) == 2


def test_sixteen_clients_with_one_key_make_one_request(ready: Api) -> None:
    body = {"subject": {"type": "email", "value": "ann@example.org"}}

    def send(_: int) -> tuple[int, str]:
        answer = ready.client.post("/v1/deletion-requests", json=body, headers={"Idempotency-Key": "k"})
        return answer.status_code, answer.json()["request_id"]

    with ThreadPoolExecutor(16) as executor:
        answers = set(executor.map(send, range(16)))
    assert len(answers) == 1
    assert next(iter(answers))[0] == 202
    for table in ("deletion_request", "request_target", "idempotency_key"):
        assert ready.scalar(f"SELECT count(*) FROM {table}") == 1


def test_without_a_key_each_call_is_a_request(ready: Api) -> None:
    with ThreadPoolExecutor(8) as executor:
        ids = set(executor.map(lambda _: ready.request().json()["request_id"], range(16)))
    assert len(ids) == 16


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "either subject or record_ids"),
        ({"subject": {"type": "email", "value": "secret"}, "record_ids": ["1"], "dataset": "reviews"}, "either"),
        ({"record_ids": ["secret"]}, "come together"),
        ({"subject": {"type": "email", "value": "secret"}, "dataset": "reviews"}, "come together"),
        ({"record_ids": ["secret"], "dataset": "missing"}, "no dataset of that name"),
        ({"subject": {"type": "email", "value": "   "}}, "blank"),
        ({"subject": {"type": "email", "value": "secret" * 1000}}, "1024"),
        ({"subject": {"type": "E", "value": "secret"}}, "subject.type"),
        ({"subject": {"type": "email", "value": "secret"}, "kind": "secret"}, "kind"),
        ({"subject": {"type": "email", "value": "secret"}, "regime": "secret"}, "regime"),
        ({"subject": {"type": "email", "value": "secret"}, "reference": "a\x00b"}, "reference"),
        ({"subject": {"type": "email", "value": "secret"}, "reference": "r" * 201}, "reference"),
        ({"subject": {"type": "email", "value": "secret"}, "received_at": "2026-01-01T00:00:00"}, "received_at"),
        ({"subject": {"type": "email", "value": "secret"}, "received_at": "2999-01-01T00:00:00Z"}, "future"),
        ({"subject": {"type": "email", "value": "secret"}, "secret@example.org": 1}, "(unknown field)"),
        ({"subject": "secret"}, "subject"),
        ({"subject": {"type": "email", "value": "secret\ud800"}}, "subject.value"),
        ([], "body"),
    ],
)
def test_what_is_wrong_is_said_without_repeating_it(ready: Api, body: Any, says: str) -> None:
    answer = ready.client.post("/v1/deletion-requests", content=json.dumps(body), headers=JSON)
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert says in answer.json()["detail"]
    assert "secret" not in answer.text
    assert ready.scalar("SELECT count(*) FROM deletion_request") == 0


def test_what_may_not_be_known_is_not_shown(ready: Api) -> None:
    body = ready.request("nobody@example.org").json()
    with ready.database() as connection:
        connection.execute("UPDATE request_target SET state = 'completed', outcome = 'no_match', completed_at = now()")
        connection.execute("UPDATE deletion_request SET state = 'completed', outcome = 'no_match'")
    path = body["links"]["self"]
    reader = ready.with_scopes(Scope.DELETION_READ)
    shown = reader.get(path).json()
    assert (shown["state"], shown["outcome"]) == ("completed", None)
    assert "no_match" not in reader.get(path).text
    assert "no_match" not in reader.get("/v1/deletion-requests").text
    assert reader.get(f"{path}/events").status_code == 403
    assert reader.get(f"{path}/certificate").status_code == 403
    for scope in (Scope.AUDIT_READ, Scope.DELETION_APPROVE):
        allowed = ready.with_scopes(Scope.DELETION_READ, scope)
        assert allowed.get(path).json()["outcome"] == "no_match"


def test_pages_follow_each_other_without_gap_or_repeat(ready: Api) -> None:
    made = [ready.request(f"p{n}@example.org").json()["request_id"] for n in range(7)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        query = {"limit": 3, **({"cursor": cursor} if cursor else {})}
        page = ready.client.get("/v1/deletion-requests", params=query).json()
        seen += [request["request_id"] for request in page["requests"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == made[::-1]
    assert ready.client.get("/v1/deletion-requests?state=completed").json()["requests"] == []
    assert ready.client.get("/v1/deletion-requests?state=nonsense").status_code == 422
    for wrong in ("x", "W10=", "e30=", "WyJhIiwgImIiXQ=="):
        assert ready.client.get(f"/v1/deletion-requests?cursor={wrong}").status_code == 422


def test_a_certificate_is_given_as_stored(ready: Api) -> None:
    ready.model("second")
    body = ready.request().json()
    path = body["links"]["certificate"]
    assert ready.client.get(path).status_code == 404
    envelope = {"payload": "e30=", "payloadType": "x", "signatures": []}
    with ready.database() as connection:
        connection.execute(
            "INSERT INTO certificate (request_id, model_id, envelope, digest, issued_at)"
            " SELECT request_id, model_id, %s, %s, now() FROM request_target",
            (Jsonb(envelope), "0" * 64),
        )
    several = ready.client.get(path)
    assert several.status_code == 409
    assert "sentiment, second" in several.json()["detail"]
    assert ready.client.get(path, params={"model": "second"}).content == canonical(envelope)
    more = f"{path}/supplements"
    assert ready.client.get(more).status_code == 409
    assert ready.client.get(more, params={"model": "second"}).json()["supplements"] == []
    with ready.database() as connection:
        connection.execute(
            "INSERT INTO certificate_supplement (request_id, model_id, number, envelope, digest, issued_at)"
            " SELECT request_id, model_id, number, %s, %s, now()"
            " FROM certificate, generate_series(1, 2) number ORDER BY number DESC",
            (Jsonb(envelope), "1" * 64),
        )
    listed = ready.client.get(more, params={"model": "second"}).json()
    assert (listed["certificate"], listed["model"]) == ("0" * 64, "second")
    shown = [(each["number"], each["digest"], each["envelope"]) for each in listed["supplements"]]
    assert shown == [(1, "1" * 64, envelope), (2, "1" * 64, envelope)]
    assert ready.client.get(path, params={"model": "third"}).status_code == 404


@pytest.mark.parametrize(
    ("kind", "columns", "state"),
    [
        ("erase", "version = NULL", "received"),
        ("erase", "version = 2", "deactivating"),
        ("erase", "version = 2, deactivated_at = now()", "erasing"),
        ("erase", "version = 2, deactivated_at = now(), erased_at = now()", "erasing"),
        ("restrict", "version = 2, deactivated_at = now()", "deactivated"),
    ],
)
def test_a_failed_target_goes_back_to_where_it_was(ready: Api, kind: str, columns: str, state: str) -> None:
    body = ready.request(kind=kind).json()
    path = body["links"]["self"]
    assert ready.client.post(f"{path}/retry").status_code == 409
    with ready.database() as connection:
        failed = "UPDATE request_target SET state = 'failed', attempts = 3, error = 'OSError', "
        connection.execute(failed + columns)  # type: ignore[arg-type]
        connection.execute("UPDATE deletion_request SET state = 'failed'")
    assert ready.client.get(path).json()["targets"][0]["error"] == "OSError"
    answer = ready.client.post(f"{path}/retry")
    assert answer.status_code == 202
    assert answer.json()["state"] == state
    target = answer.json()["targets"][0]
    assert (target["state"], target["attempts"], target["error"]) == (state, 0, None)
    events = ready.client.get(f"{path}/events").json()["events"]
    assert events[-1]["kind"] == "target.retried"
    assert events[-1]["body"]["state"] == state


def test_requests_that_are_not_there(ready: Api) -> None:
    for path in (str(uuid4()), f"{uuid4()}/events", f"{uuid4()}/certificate", "nonsense", "%00"):
        assert ready.client.get(f"/v1/deletion-requests/{path}").status_code == 404
    assert ready.client.post(f"/v1/deletion-requests/{uuid4()}/retry").status_code == 404


def test_received_at_in_the_past_sets_the_due_date(ready: Api) -> None:
    long_ago = datetime(2026, 1, 31, 12, tzinfo=UTC)
    body = ready.request(received_at=long_ago.isoformat()).json()
    assert datetime.fromisoformat(body["due_at"]) == datetime(2026, 3, 2, 12, tzinfo=UTC)  # a Monday


def test_a_preview_changes_nothing(ready: Api) -> None:
    before = ready.scalar("SELECT count(*) FROM event_pending")
    body = {"subject": {"type": "email", "value": "ann@example.org"}}
    answer = ready.client.post("/v1/deletion-requests:preview", json=body)
    assert answer.status_code == 200, answer.text
    assert [each["model"] for each in answer.json()["models"]] == ["sentiment"]
    by_record = {"record_ids": ["r0"], "dataset": "reviews"}
    same = ready.client.post("/v1/deletion-requests:preview", json=by_record)
    moving = {"due_at", "last_safe_start", "policies"}  # they count from now
    first, second = (
        [{name: value for name, value in each.items() if name not in moving} for each in found.json()["models"]]
        for found in (answer, same)
    )
    assert first == second
    assert ready.scalar("SELECT count(*) FROM event_pending") == before
    reader = ready.with_scopes(Scope.DELETION_READ)
    assert reader.post("/v1/deletion-requests:preview", json=body).status_code == 403


def test_recipes_in_tests_are_the_models(ready: Api) -> None:
    assert ready.client.get("/v1/models/sentiment").json()["recipe"]["backbone"] == {
        **RECIPE["backbone"],
        "provenance": "public",
    }
