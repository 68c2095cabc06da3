"""What the schema itself refuses, and what no table ever holds."""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from conftest import Database
from psycopg import errors, sql
from tiny import tiny_record
from world import World, make_world
from world_copies import Copy, Mould

from service.store import payloads, subjects
from service.store.ingest import Line, ingest
from shards.manifest import Record
from shards.partition import dataset_key, record_id_of
from shards.recipe import Backbone
from workers import steps
from workers.reaper import Reaper
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration

A_STAGE: LiteralString = "(SELECT stage_key FROM stage LIMIT 1)"
REFUSED: dict[LiteralString, LiteralString] = {
    "a floor above the version": "UPDATE model SET floor = version + 1",
    "cleared above the floor": "UPDATE model SET cleared = floor + 1",
    "a tombstone removed as it came": "UPDATE tombstone SET removed = added",
    "erased while the payload is sealed": "UPDATE tombstone SET removed = NULL, erased_at = now()",
    "erased and lifted": "UPDATE tombstone SET removed = added + 1, erased_at = now(), lifted_at = now()",
    "a second tombstone of a record": "INSERT INTO tombstone SELECT * FROM tombstone",
    "a second live artefact": "INSERT INTO artifact (object_name, kind, stage_key, fingerprint, digest, state)"
    " SELECT 'x', kind, stage_key, fingerprint, repeat('0', 64), 'live' FROM artifact WHERE kind = 'stage' LIMIT 1",
    "live without a digest": "UPDATE artifact SET digest = NULL",
    "destroyed without a time": "UPDATE artifact SET state = 'destroyed'",
    "a cell's object with a stage": "UPDATE artifact SET stage_key = " + A_STAGE + " WHERE kind = 'cell'",
    "an object name again": "INSERT INTO artifact (object_name, kind, cell_id)"
    " SELECT object_name, kind, cell_id FROM artifact WHERE kind = 'cell'",
    "completed without an outcome": "UPDATE deletion_request SET state = 'completed'",
    "an outcome too early": "UPDATE deletion_request SET outcome = 'erased'",
    "a target completed without an outcome": "UPDATE request_target SET state = 'completed'",
    "a target's outcome too early": "UPDATE request_target SET outcome = 'erased'",
    "due before it came": "UPDATE deletion_request SET due_at = received_at",
    "a long reference": "UPDATE deletion_request SET reference = repeat('x', 201)",
    "a second open do-not-train entry": "INSERT INTO do_not_train SELECT * FROM do_not_train",
    "an unknown scope": "UPDATE api_key SET scopes = '{root}'",
    "another model with the recipe": "INSERT INTO model (name, dataset_id, recipe, recipe_digest)"
    " SELECT 'other', dataset_id, recipe, recipe_digest FROM model",
    "a version twice": "INSERT INTO model_version SELECT * FROM model_version",
    "version 0": "INSERT INTO model_version SELECT model_id, 0, assembly, cause, canonical FROM model_version LIMIT 1",
    "lineage of a manifest that never was": "UPDATE stage_cell SET generation = 99",
    "a lease without a length": "INSERT INTO lease (process_id, model_id, name, covers, freed, ttl_ms)"
    " SELECT gen_random_uuid(), model_id, 'r', 1, 1, 0 FROM model",
    "an event of no kind": "INSERT INTO event_pending (kind, body) VALUES ('Ann', '{}')",
    "a certificate twice": "INSERT INTO certificate SELECT request_id, model_id, '{}'::jsonb, '', now()"
    " FROM request_target, generate_series(1, 2)",
    "deactivating without a version": "UPDATE request_target SET version = NULL",
}


@pytest.fixture(scope="module")
def planned(trained: Mould, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    """A trained installation with one deletion on its way."""
    with trained.copy(tmp_path_factory.mktemp("planned")) as world:
        world.ask("s1")
        steps.plan_targets(world.context, world.model_id)
        yield world


@pytest.mark.parametrize("what", REFUSED)
def test_the_schema_refuses(planned: Copy, what: LiteralString) -> None:
    allowed = (errors.CheckViolation, errors.UniqueViolation, errors.ForeignKeyViolation)
    with planned.pool.connection() as connection, pytest.raises(allowed):
        connection.execute(REFUSED[what])


TEXT, LABEL = "canaryzq text that nobody else writes", "canaryzq-label"
SUBJECT, OTHER, NAME = "Canaryzq.Ann@example.org", "canaryzq-other", "canaryzq-record-17"


def forms(canary: str) -> list[bytes]:
    """The canary itself, and what anybody could compute from it: bare digests can be guessed (rule 25)."""
    plain = canary.encode()
    written = [plain, plain.lower(), plain.hex().encode(), base64.b64encode(plain)]
    hashed = [hashlib.new(name, each).digest() for name in ("sha256", "md5") for each in (plain, plain.lower())]
    return [*written, *hashed, *(each.hex().encode() for each in hashed)]


def test_no_table_ever_holds_personal_data(database: Database, tmp_path: Path, small_backbone: Backbone) -> None:
    world = make_world(database, tmp_path, small_backbone, classes=("no", LABEL))
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    owner = subjects.alias_of(world.secrets.pepper, "email", SUBJECT)
    other = subjects.alias_of(world.secrets.pepper, "name", OTHER)
    record = Record(record_id_of(key, NAME), tiny_record(NAME).salt, TEXT, LABEL)
    world.add({"s": ["s1", "s2"], "t": ["t1"]})
    ingest(
        world.pool, world.context.artifacts, world.secrets.partition, world.dataset, [Line(1, record, owner, (other,))]
    )
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    look(world, database)
    request_id = world.ask(alias=owner)
    steps.plan_targets(world.context, world.model_id)
    steps.rebuild_model(world.context, world.model_id)
    copy = Copy(**{name: getattr(world, name) for name in World.__dataclass_fields__})
    copy.finish(request_id)
    assert copy.states(request_id) == [("completed", "erased")]
    train_queued(world.context)
    Reaper(world.pool, world.context.artifacts, job_attempts=2).look()
    look(world, database)
    left = [row for name in world.context.artifacts.names(older_than=-60) if name.startswith("cells/")
            for row in payloads.decode(world.context.artifacts.get(name))]  # fmt: skip
    assert left
    assert record.record_id not in {row.record.record_id for row in left}
    assert TEXT not in {row.record.text for row in left}
    world.pool.close()


def look(world: World, database: Database) -> None:
    """Search every row as text; then the server's own files, where rows that are gone leave their bytes."""
    for (table,) in world.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        rows = "\n".join(row for (row,) in database_rows(database, table)).encode()
        for canary in (TEXT, SUBJECT, OTHER, NAME):
            assert not [form for form in forms(canary) if form in rows], (table, canary)
        if table not in {"model", "dataset"}:  # where classes are declared
            rows = "\n".join(map(undeclared, database_rows(database, table, "to_jsonb(t)::text")))
            assert not [form for form in (LABEL, LABEL.encode().hex()) if form in rows], table
    with psycopg.connect(database.owner_url, autocommit=True) as owner:
        owner.execute("CHECKPOINT")
        (directory,) = owner.execute("SELECT current_setting('data_directory')").fetchone() or ("",)
        (number,) = owner.execute("SELECT oid FROM pg_database WHERE datname = current_database()").fetchone() or (0,)
    files = [*Path(directory, "base", str(number)).iterdir(), *Path(directory, "pg_wal").glob("0*")]
    bytes_of = b"".join(path.read_bytes() for path in files if path.is_file())
    assert len(bytes_of) > 1_000_000
    for canary in (TEXT, SUBJECT, OTHER, NAME):
        assert not [form for form in forms(canary) if form in bytes_of], canary


def undeclared(found: tuple[str]) -> str:
    """A row without declared classes, where it is an event that repeats rows of `model` or `dataset`; else as it is."""
    said = json.loads(found[0])
    if "opening" in said:  # of a leaf: what the event says, in bytes
        said["opening"] = json.loads(bytes.fromhex(said["opening"].removeprefix("\\x")))
    event = said.get("opening", said)
    if {"event_id", "body"} <= event.keys() and event.get("kind", "rows.changed") == "rows.changed":
        for change in event["body"].get("changes", []):
            for row in change["rows"]:
                declared = {"model": row.get("recipe"), "dataset": row}.get(change["table"]) or {}
                assert declared.pop("classes", ["no", LABEL]) == ["no", LABEL]
    return json.dumps(said)


def database_rows(database: Database, table: str, shown: LiteralString = "t::text") -> list[tuple[str]]:
    query = sql.SQL("SELECT {} FROM {} t").format(sql.SQL(shown), sql.Identifier(table))
    with psycopg.connect(database.owner_url) as owner:
        return owner.execute(query).fetchall()
