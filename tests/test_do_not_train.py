"""The do-not-train list: who was erased is refused at ingestion, until they are let back on the record."""

import json
from typing import Any
from uuid import UUID

import psycopg
import pytest
from api_client import Api, Run
from world_copies import Copy
from world_requests import deactivate, withdraw

from service.domain.errors import ConflictError, InvalidInputError, NotFoundError
from service.domain.requests import Kind
from service.store import do_not_train, lifts
from service.store.api_keys import Scope
from service.store.database import transaction

pytest_plugins = ("world_fixtures", "api_fixtures")
pytestmark = pytest.mark.integration


def lift(world: Copy, subject: str, dataset_id: UUID | None = None) -> list[do_not_train.Entry]:
    with transaction(world.pool) as connection:
        alias = world.line(0, subject, "x").owner
        return do_not_train.lift(connection, alias, dataset_id, actor=world.actor, reason_code="new_consent")


def taken(world: Copy, subject: str, name: str) -> tuple[int, int]:
    found = world.add({subject: [name]})
    return found.accepted, found.skipped


def erased(world: Copy, subject: str) -> UUID:
    request_id = deactivate(world, subject, Kind.ERASE)
    world.finish(request_id)
    assert world.shown(request_id) == ("completed", "erased")
    return request_id


def test_who_was_erased_comes_back_by_new_consent_and_under_new_ids(world: Copy) -> None:
    request_id = erased(world, "s1")
    assert taken(world, "s1", "later") == (0, 1)
    assert world.events("ingestion.refused") == [{"lines": 1, "reason": "do_not_train"}]
    (entry,) = lift(world, "s1")
    assert (entry.request_id, entry.dataset, entry.until) == (request_id, "people", None)
    assert entry.lifted_at is not None
    assert world.events("do_not_train.lifted") == [
        {"entries": [str(entry.entry_id)], "actor": world.actor, "reason_code": "new_consent"}
    ]
    with pytest.raises(InvalidInputError, match="never comes back"):
        world.add({"s1": ["s1r0"]})
    assert taken(world, "s1", "later") == (1, 0)
    with pytest.raises(NotFoundError):
        lift(world, "s1")


def test_an_entry_of_another_dataset_stays(world: Copy) -> None:
    erased(world, "s1")
    with pytest.raises(NotFoundError):
        lift(world, "s1", UUID(int=1))
    assert taken(world, "s1", "later") == (0, 1)
    lift(world, "s1", world.dataset.dataset_id)
    assert taken(world, "s1", "later") == (1, 0)


def test_nobody_is_let_back_while_a_request_stands(world: Copy) -> None:
    deactivate(world, "s1", Kind.ERASE)
    with pytest.raises(ConflictError, match="erasure of the subject is deactivated: wait"):
        lift(world, "s1")
    restricted = deactivate(world, "s2", Kind.RESTRICT)
    with pytest.raises(ConflictError, match="lift that request"):
        lift(world, "s2")
    assert world.events("do_not_train.lifted") == []
    withdraw(world, restricted, lifts.lift)
    assert taken(world, "s2", "later") == (1, 0)


def test_entries_end_by_age_and_nobody_else_does(world: Copy) -> None:
    erased(world, "s1")
    erased(world, "s3")
    world.as_owner("UPDATE do_not_train SET since = since - interval '40 days' WHERE request_id IN"
                   " (SELECT request_id FROM deletion_request ORDER BY created_at LIMIT 1)")  # fmt: skip
    with transaction(world.pool) as connection:
        assert do_not_train.end_by_age(connection, days=None) == 0
        assert do_not_train.end_by_age(connection, days=30) == 1
    assert taken(world, "s1", "later") == (1, 0)
    assert taken(world, "s3", "later") == (0, 1)
    (left,) = world.rows("SELECT until - since FROM do_not_train")
    assert left[0].days == 30
    assert world.events("do_not_train.ended") == [{"entries": 1}]


def test_certificates_end_by_age_and_none_that_is_young(world: Copy) -> None:
    erased(world, "s1")
    with transaction(world.pool) as connection:
        assert do_not_train.erase_certificates(connection, days=30) == 0
    world.as_owner("UPDATE certificate SET issued_at = issued_at - interval '40 days'")
    with transaction(world.pool) as connection:
        assert do_not_train.erase_certificates(connection, days=30) == 1
    assert world.events("certificate.erased_by_age") == [{"certificates": 1, "days": 30}]
    with pytest.raises(psycopg.errors.RestrictViolation), transaction(world.pool) as connection:
        do_not_train.erase_certificates(connection, days=29)


def test_over_http_and_by_the_command_line(api: Api, run: Run) -> None:
    api.client.post("/v1/datasets", json={"name": "d", "shards": 2, "slices": 2, "classes": ["bad", "good"]})
    line = {"record_id": "r", "subject": {"type": "user", "value": "ann"}, "text": "t", "label": "bad"}
    api.client.post("/v1/datasets/d/records", content=json.dumps(line))
    with api.database() as connection:
        connection.execute(
            "INSERT INTO deletion_request (request_id, kind, state, subject_id, subject_commitment, received_at,"
            " due_at, created_by, outcome) SELECT gen_random_uuid(), 'erase', 'completed', subject_id,"
            " decode(repeat('00', 32), 'hex'), now(), now() + interval '1 day', (SELECT prefix FROM api_key LIMIT 1),"
            " 'erased' FROM subject"
        )
        connection.execute(
            "INSERT INTO do_not_train (subject_id, dataset_id, request_id)"
            " SELECT subject_id, dataset_id, request_id FROM deletion_request, dataset"
        )
    code, out, _ = run("do-not-train", "list", "--json")
    (entry,) = json.loads(out)["entries"]
    assert (code, entry["dataset"], entry["lifted_at"]) == (0, "d", None)
    assert "ann" not in out
    body: dict[str, Any] = {"subject": {"type": "user", "value": "ann"}, "reason_code": "new_consent"}
    assert api.with_scopes(Scope.DELETION_WRITE).post("/v1/do-not-train/lift", json=body).status_code == 403
    assert api.client.post("/v1/do-not-train/lift", json={**body, "dataset": "other"}).status_code == 404
    code, out, _ = run("do-not-train", "lift", "--subject", "user:ann", "--reason", "new_consent", "--json")
    assert (code, json.loads(out)["entries"][0]["entry_id"]) == (0, entry["entry_id"])
    assert api.client.post("/v1/do-not-train/lift", json=body).status_code == 404
    assert run("do-not-train", "list")[1].strip().startswith("ENTRY")
    assert api.scalar("SELECT count(*) FROM event_pending WHERE kind = 'do_not_train.lifted'") == 1
