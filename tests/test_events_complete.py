"""Nothing changes without an event in the same transaction: every transition, every route, every table."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from api_client import Api, line, ndjson
from conftest import Database
from psycopg import sql

from service.domain.requests import TRANSITIONS, Kind, State
from service.evidence.events import FIELDS, EventKind
from service.store import mirror, requests, restores
from service.store.subjects import Alias

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration

STEPS = sorted((old.value, new.value) for old, news in TRANSITIONS.items() for new in news)
COMMITMENT = "decode(repeat('00', 32), 'hex')"


@pytest.fixture
def owner(database: Database) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database.owner_url) as connection:
        connection.execute(
            "INSERT INTO api_key (prefix, name, secret_hash, scopes) VALUES ('abcdefgh', 'x', sha256('x'), '{}')"
        )
        connection.execute(
            "INSERT INTO dataset (dataset_id, name, shards, slices, classes, deletable, subject_row_cap)"
            " VALUES (gen_random_uuid(), 'd', 1, 1, '{a,b}', true, 1)"
        )
        connection.execute(
            "INSERT INTO model (name, dataset_id, recipe, recipe_digest) SELECT 'm', dataset_id, '{}', 'r' FROM dataset"
        )
        connection.commit()
        yield connection


def recorded(connection: psycopg.Connection) -> list[tuple[str, dict[str, Any]]]:
    """Events of the transaction that is open."""
    query = "SELECT kind, body FROM event_pending WHERE xmin = pg_current_xact_id()::xid ORDER BY id"
    return connection.execute(query).fetchall()


@pytest.mark.parametrize(("old", "new"), STEPS)
def test_every_transition_is_an_event_of_its_transaction(
    owner: psycopg.Connection, database: Database, old: str, new: str
) -> None:
    request_id = uuid4()
    owner.execute(
        "INSERT INTO deletion_request (request_id, kind, state, subject_commitment, received_at, due_at, created_by)"
        f" VALUES (%s, 'erase', 'received', {COMMITMENT}, now(), now() + interval '1 day', 'abcdefgh')",
        (request_id,),
    )
    outcome = {State.COMPLETED.value: "erased"}
    owner.execute(
        "INSERT INTO request_target (request_id, model_id, state, outcome, version) SELECT %s, model_id, %s, %s, 1"
        " FROM model",
        (request_id, old, outcome.get(old)),
    )
    owner.commit()
    with psycopg.connect(database.app_url) as app:
        app.execute(
            "UPDATE request_target SET state = %s, outcome = %s WHERE request_id = %s",
            (new, outcome.get(new), request_id),
        )
        ((kind, body),) = recorded(app)
        assert kind == "rows.changed"
        (changed,) = body["changes"]
        assert (changed["table"], changed["change"]) == ("request_target", "update")
        assert (changed["rows"][0]["request_id"], changed["rows"][0]["state"]) == (str(request_id), new)
        app.rollback()
        assert app.execute(
            "SELECT count(*) FROM event_pending WHERE body -> 'changes' @> '[{\"change\": \"update\"}]'"
        ).fetchone() == (0,)


def test_a_request_is_recorded_with_its_targets_and_subject_before_its_records(owner: psycopg.Connection) -> None:
    """In one event, since intake is the busiest write; in an order in which each row finds what it refers to."""
    alias = Alias("user", b"a" * 32)
    subject_id = uuid4()
    owner.execute("INSERT INTO subject (subject_id) VALUES (%s)", (subject_id,))
    owner.execute("INSERT INTO subject_alias VALUES ('user', %s, %s)", (alias.digest, subject_id))
    owner.commit()
    now, record_id = datetime.now(UTC), uuid4()
    new = requests.NewRequest(
        request_id=uuid4(), kind=Kind.ERASE, actor="abcdefgh", subject_commitment=b"c" * 32, received_at=now,
        due_at=now + timedelta(days=1), alias=alias, record_ids=[record_id],
    )  # fmt: skip
    assert isinstance(requests.receive(owner, new), list)
    changes = [body["changes"] for kind, body in recorded(owner) if kind == "rows.changed"]
    tables = [[each["table"] for each in event] for event in changes]
    assert tables == [["subject", "subject_alias", "deletion_request", "request_target"], ["deletion_request_record"]]
    assert [each["rows"][0].get("subject_id") for each in changes[0]][:3] == [str(subject_id)] * 3
    assert changes[1][0]["rows"][0]["record_id"] == str(record_id)
    before = dump(owner)
    owner.rollback()
    owner.execute(restores.APPLYING)
    for event in changes:
        restores.apply(owner, "rows.changed", {"changes": event})
    after = dump(owner)
    for name in ("deletion_request", "request_target", "deletion_request_record", "subject", "subject_alias"):
        assert after[name] == before[name], name


def test_every_table_is_rebuilt_by_the_ledger_or_says_why_not(owner: psycopg.Connection) -> None:
    tables = {name for (name,) in owner.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}
    assert tables == mirror.TABLES.keys() | mirror.NOT_MIRRORED.keys()
    assert not mirror.TABLES.keys() & mirror.NOT_MIRRORED.keys()
    triggers = "SELECT DISTINCT tgrelid::regclass::text FROM pg_trigger WHERE tgname LIKE 'mirror\\_%'"
    watched = {name.strip('"') for (name,) in owner.execute(triggers)}
    assert watched == mirror.TABLES.keys() - {"subject", "subject_alias"}  # those of requests and holds


def test_the_keys_by_which_rows_are_found_again_are_the_tables_own(owner: psycopg.Connection) -> None:
    for name, table in mirror.TABLES.items():
        found = owner.execute(
            "SELECT array_agg(a.attname::text ORDER BY a.attname) FROM pg_index i JOIN pg_attribute a"
            " ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey) WHERE i.indrelid = %s::regclass"
            " AND i.indisprimary",
            (f'public."{name}"',),
        ).fetchone()
        assert found is not None
        assert tuple(found[0]) == tuple(sorted(table.key)), name


def test_every_column_is_recorded_or_says_why_not(owner: psycopg.Connection) -> None:
    for name in mirror.TABLES.keys() - {"subject", "subject_alias", "record", "subject_prior"}:
        source = owner.execute("SELECT prosrc FROM pg_proc WHERE proname = %s", (f"mirror_{name}",)).fetchone()
        assert source is not None
        columns = set(re.findall(r"\w+", source[0].split("(SELECT ", 1)[1].split(" FROM", 1)[0]))
        every = owner.execute(
            "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
            (f'public."{name}"',),
        ).fetchall()
        assert {column for (column,) in every} - columns == NOT_RECORDED.get(name, set()), name


NOT_RECORDED = {
    "api_key": {"name", "secret_hash"},  # a secret; an operator's words
    "deletion_request": {"reference"},  # a caller's words
    "request_target": {"attempts", "attempted_at"},  # of trying, not of state
    "export": {"recipient"},  # a caller's words
    "model": {"rebuild_wanted", "building", "rebuild_forced", "rebuild_due", "rebuild_at"},  # planned again
    "artifact": {"sweeps"},
    "gate": {"attempts", "attempted_at"},
    "replay": {"token", "attempts", "due_at", "host"},
}


def test_every_kind_is_applied_or_changes_nothing(owner: psycopg.Connection) -> None:
    """Rows are rebuilt from `rows.changed`; all others tell of rows that have such an event of their own."""
    assert FIELDS.keys() == set(EventKind)
    owner.execute(restores.APPLYING)
    before = dump(owner)
    for kind in set(EventKind) - {EventKind.ROWS_CHANGED}:
        restores.apply(owner, kind.value, dict.fromkeys(FIELDS[kind]))
    assert dump(owner) == before
    with pytest.raises(ValueError, match=r"something\.new, which this version does not know"):
        restores.apply(owner, "something.new", {})
    for table, change in (("lease", "insert"), ("model", "truncate")):
        changes = [{"table": table, "change": change, "rows": []}]
        with pytest.raises(ValueError, match="cannot apply"):
            restores.apply(owner, "rows.changed", {"changes": changes})


def dump(connection: psycopg.Connection) -> dict[str, list[str]]:
    """Every row of every table."""
    tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1").fetchall()
    query = sql.SQL("SELECT to_jsonb(t)::text FROM public.{} t ORDER BY 1")
    return {
        name: [row for (row,) in connection.execute(query.format(sql.Identifier(name)))]
        for (name,) in tables
        if name != "vetting"
    }


READS = {("post", "/v1/deletion-requests:preview")}
"""Change nothing."""
ELSEWHERE = {
    ("post", "/v1/models/{name}/gate:override"),
    ("post", "/v1/models/{name}/canary:promote"),
    ("post", "/v1/models/{name}/canary:abort"),
    ("post", "/v1/models/{name}/versions:unpin"),
    ("post", "/v1/models/{name}/versions/{version}:serve"),
    ("post", "/v1/models/{name}/replays/{replay_id}/release"),
    ("post", "/v1/models/{name}/exports"),
    ("post", "/v1/exports/{export_id}/withdraw"),
    ("post", "/v1/models/{name}/challenges"),
}
"""Need a trained model; here they must change nothing while shut. Their events: tests of gates, replays and exports."""


def test_no_route_changes_anything_that_is_not_an_event(api: Api, database: Database) -> None:
    """While no event can be written, every call says so and leaves every row as it was; afterwards each is one."""
    with psycopg.connect(database.owner_url, autocommit=True) as shut:
        shut.execute("SET expunge.mode = 'restoring'")
        walk(api, shut)


def walk(api: Api, shut: psycopg.Connection) -> None:
    def call(method: str, route: str, *at: object, **values: Any) -> int:
        places = iter(at)
        path = re.sub(r"\{\w+\}", lambda _: str(next(places)), route)
        shut.execute("UPDATE vetting SET quarantine = 'for a test'")
        before = dump(shut)
        answer = api.client.request(method, path, **values)
        assert (answer.status_code, "expunge restore" in answer.text) == (503, True), (path, answer.text)
        assert dump(shut) == before, path
        shut.execute("UPDATE vetting SET quarantine = NULL")
        events = shut.execute("SELECT max(id) FROM event_pending").fetchone()
        assert events is not None
        answer = api.client.request(method, path, **values)
        made = shut.execute("SELECT kind, body FROM event_pending WHERE id > %s", (events[0] or 0,)).fetchall()
        assert made, path
        for kind, body in made:
            assert body.keys() == FIELDS[EventKind(kind)], kind
        done.add((method, route))
        return answer.status_code

    done: set[tuple[str, str]] = set()
    subject = {"type": "email", "value": "p1@example.org"}
    dataset = {"name": "reviews", "shards": 2, "slices": 2, "classes": ["bad", "good"]}
    assert call("post", "/v1/datasets", json=dataset) == 201
    assert (
        call("post", "/v1/datasets/{name}/records", "reviews", content=ndjson(line(number) for number in range(4)))
        == 201
    )
    recipe = {"backbone": {"source": "/x", "digest": "0" * 64}, "shards": 2, "slices": 2, "classes": ["bad", "good"]}
    declared = {"name": "m", "dataset": "reviews", "recipe": recipe}
    assert call("post", "/v1/models", json=declared) == 201
    assert call("patch", "/v1/models/{name}", "m", json={"min_shards": 2}) == 200
    assert call("post", "/v1/models/{name}/rebuild", "m") == 202
    assert call("post", "/v1/deletion-requests", json={"subject": subject}) == 202
    request_id = api.scalar("SELECT request_id FROM deletion_request")
    assert call("post", "/v1/holds", json={"subject": subject, "reason_code": "litigation"}) == 201
    hold_id = api.scalar("SELECT hold_id FROM hold")
    assert call("post", "/v1/holds/{hold_id}/release", hold_id) == 200
    assert call("post", "/v1/holds/{hold_id}/release", hold_id) == 409  # refused, and on the record
    at, reason = "/v1/deletion-requests/{request_id}", {"reason_code": "mistake"}
    assert call("post", f"{at}/lift", request_id, json=reason) == 409
    assert call("post", f"{at}/retry", request_id) == 409
    shut.execute("UPDATE request_target SET state = 'failed', error = 'X'")
    assert call("post", f"{at}/retry", request_id) == 202
    assert call("post", f"{at}/revoke", request_id, json=reason) == 202
    assert call("post", f"{at}/revoke", request_id, json=reason) == 409
    shut.execute(
        "INSERT INTO do_not_train (subject_id, dataset_id, request_id)"
        " SELECT d.subject_id, s.dataset_id, d.request_id FROM deletion_request d, dataset s"
    )
    assert call("post", "/v1/do-not-train/lift", json={"subject": subject, **reason}) == 200
    refused = shut.execute("SELECT body FROM event_pending WHERE kind = 'attempt.refused' ORDER BY id").fetchall()
    assert [body["attempt"] for (body,) in refused] == ["release_hold", "lift", "retry", "revoke"]
    routes = {
        (method, path)
        for path, verbs in api.client.get("/openapi.json").json()["paths"].items()
        for method in verbs
        if method != "get"
    }
    assert routes - READS - ELSEWHERE == done


def test_routes_that_need_a_model_change_tables_that_are_recorded() -> None:
    """What the calls of ELSEWHERE write, as far as it is not an event itself."""
    assert {"model", "model_version", "assembly", "gate", "export", "replay", "artifact"} <= mirror.TABLES.keys()


def test_every_event_that_the_code_records_is_declared(repository: Path) -> None:
    """SQL that writes events by itself names kinds and fields that exist."""
    text = "".join(
        path.read_text() for folder in ("service", "workers") for path in (repository / folder).rglob("*.py")
    )
    used = set(re.findall(r"EventKind\.([A-Z_]+)", text))
    assert {kind.name for kind in EventKind} - used <= {"RESTORE_LEAF_LOST", "REQUEST_RECEIVED"}
    assert all(EventKind(kind) for kind in re.findall(r"SELECT '([a-z_]+\.[a-z_]+)'", text))
