"""The crown test through Postgres and files: what the service serves is what a training from nothing gives.

For each engine, from an installation's own rows and payload files; a record of two subjects goes with either.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import tiny
from conftest import Database
from test_workers_path import build, served, settle
from tiny import tiny_backbone, tiny_record
from world import World, make_world

from service.store import cells, ingest, payloads
from service.store.database import transaction
from shards.assembly import Assembly
from shards.engine.registry import open_trainer
from shards.manifest import Record
from shards.recipe import Backbone, Ridge, Scale
from workers import steps

pytestmark = [pytest.mark.integration, pytest.mark.golden]
PEOPLE = {f"person {number}": [f"p{number} {row}" for row in range(1 + number % 2)] for number in range(14)}
RIDGE = Ridge(layers=2, bits=6, clip=4.0)
NUMBER: dict[str, Any] = {"task": "regression", "classes": (), "scale": Scale(offset=40.0, spread=20.0)}
ENGINES: dict[str, dict[str, Any]] = {
    "s3t beyond rotations": {"slices": 2, "orders": 2, "shards": 1},
    "s3t merged": {"aggregation": "merged"},
    "s3t regression": NUMBER,
    "sisa": {"engine": "sisa", "orders": 1},
    "ridge": {"engine": "ridge", "orders": 1, "ridge": RIDGE},
    "ridge regression": {"engine": "ridge", "orders": 1, "ridge": RIDGE} | NUMBER,
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2, width=16, inner=32)


def numbered(name: str) -> Record:
    made = tiny_record(name)
    return dataclasses.replace(made, label=str(len(made.text)))


@pytest.fixture(params=ENGINES)
def world(
    request: pytest.FixtureRequest,
    database: Database,
    tmp_path: Path,
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    changes = ENGINES[request.param]
    if changes.get("task") == "regression":
        monkeypatch.setattr("world.tiny_record", numbered)
    made = make_world(database, tmp_path, backbone, **changes)
    lines = [made.line(1, "ann", "of both", ("bob",)), made.line(2, "bob", "of bob")]
    ingest.ingest(made.pool, made.context.artifacts, made.secrets.partition, made.dataset, lines)
    made.add(PEOPLE)
    build(made)
    yield made
    made.pool.close()


def records(world: World) -> dict[tuple[int, int], list[Record]]:
    """What the payload files hold, where the newest manifests still name it."""
    found: dict[tuple[int, int], list[Record]] = {}
    with transaction(world.pool) as connection:
        for cell in cells.list_cells(connection, world.dataset.dataset_id):
            data = world.context.artifacts.get(cell.object_name) if cell.object_name else None
            stored = payloads.decode(data) if data is not None else []
            active = cells.list_active(connection, cell.cell_id, cell.generation)
            found[cell.shard, cell.slice] = [each.record for each in stored if each.record.record_id in active]
    return found


def from_nothing(world: World) -> Assembly:
    """The assembly of a model that was trained on these records alone."""
    again = tiny.World(open_trainer(world.recipe), records(world))
    again.rebuild()
    return again.assembly()


def ids(found: dict[tuple[int, int], list[Record]]) -> set[UUID]:
    return {record.record_id for each in found.values() for record in each}


def test_every_engine_serves_what_the_records_left_give(world: World) -> None:
    whole = ids(records(world))
    _, before, full = served(world)
    assert from_nothing(world).digest == before
    gone: set[UUID] = set()
    digests = {before}
    for subject in ("bob", "person 3"):
        request_id = world.ask(subject)
        assert steps.plan_targets(world.context, world.model_id) == 1
        named = "SELECT record_id FROM deletion_request_record WHERE request_id = %s"
        own = {record_id for (record_id,) in world.rows(named, request_id)}
        assert len(own) == 2
        gone |= own
        _, deactivated, depths = served(world)
        assert deactivated not in digests
        assert sum(depths) < sum(full)
        settle(world)
        state = world.row("SELECT state, outcome FROM deletion_request WHERE request_id = %s", request_id)
        assert state == ("completed", "erased")
        build(world)
        _, rebuilt, depths = served(world)
        assert depths == full
        assert ids(records(world)) == whole - gone
        assert from_nothing(world).digest == rebuilt
        assert world.row("SELECT canonical FROM model_version ORDER BY version DESC LIMIT 1") == (True,)
        digests.add(rebuilt)
    assert len(digests) == 3
    assert steps.plan_targets(world.context, world.model_id) == 0
    request_id = world.ask("ann")  # whose only record went with bob
    steps.plan_targets(world.context, world.model_id)
    assert world.row("SELECT outcome FROM deletion_request WHERE request_id = %s", request_id) == ("no_match",)
