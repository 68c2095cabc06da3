"""Engine ridge through the workers and a model server: what a preview says is what is then served."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from conftest import Database
from serving_kit import Client, Toy, serving, wait_until
from tiny import tiny_backbone
from world import World, make_world

from service.store import api_keys, capacity, cells, datasets, fits, grid, models, payloads, preview
from service.store.database import transaction
from service.store.preview import Preview
from service.store.secrets import Secrets
from shards.engine.registry import open_reader
from shards.manifest import Record
from shards.partition import dataset_key, record_id_of
from shards.recipe import Ridge
from workers import steps
from workers.barrier import Barrier
from workers.training import train_queued

pytestmark = [pytest.mark.integration, pytest.mark.golden]

SUBJECTS = {f"s{number}": [f"s{number}r{row}" for row in range(1 + number % 3)] for number in range(30)}


@pytest.fixture
def world(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Four cells, trained, served as version 1, and an evaluation set; the same at each run, so that accuracies are."""
    numbers = itertools.count(1)
    for module in ("datasets", "ingest"):
        monkeypatch.setattr(f"service.store.{module}.uuid4", lambda: UUID(int=next(numbers)))
    backbone = tiny_backbone(tmp_path / "backbone", layers=3, width=16)
    made = make_world(
        database, tmp_path, backbone, engine="ridge", orders=1, ridge=Ridge(layers=2, bits=6, penalty=0.5)
    )
    made.secrets = Secrets(bytes(32), bytes(32))
    made.add(SUBJECTS)
    people = made.dataset
    with transaction(made.pool) as connection:
        evaluation = datasets.insert_dataset(
            connection,
            name="evaluation",
            shards=1,
            slices=1,
            classes=list(made.recipe.classes),
            deletable=False,
            subject_row_cap=1000,
        )
        connection.execute("UPDATE model SET evaluation_id = %s", [evaluation.dataset_id])
    made.dataset = evaluation
    made.add({f"e{number}": [f"e{number}"] for number in range(150)})
    made.dataset = people
    build(made)
    yield made
    made.pool.close()


def build(world: World) -> None:
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)


def foreseen(world: World, subject: str) -> Preview:
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    ids = [record_id_of(key, name) for name in SUBJECTS[subject]]
    with transaction(world.pool) as connection:
        model = models.get_model_by_id(connection, world.model_id)
        return preview.preview(connection, model, ids).measured(world.context.artifacts)


def questions(world: World) -> list[Record]:
    with transaction(world.pool) as connection:
        model = models.get_model_by_id(connection, world.model_id)
        assert model.evaluation_id is not None
        (cell,) = cells.list_cells(connection, model.evaluation_id)
    assert cell.object_name is not None
    return [stored.record for stored in payloads.decode(world.context.artifacts.get(cell.object_name))]


def accuracy_served(client: Client, records: list[Record]) -> float:
    given: list[dict[str, Any]] = []
    for at in range(0, len(records), 50):
        given += client.predict(*(record.text for record in records[at : at + 50])).json()["outputs"]
    return float(np.mean([answer["label"] == record.label for answer, record in zip(given, records, strict=True)]))


def grid_of(world: World) -> list[int]:
    """Depths as the API shows them, which must fit its slices."""
    with transaction(world.pool) as connection:
        model = models.get_model_by_id(connection, world.model_id)
        shown = grid.grid(connection, model)
        found = grid.depths(world.recipe, grid.served(connection, model))
        assert capacity.forecast(connection, model).to_json()
    for shard in shown:
        served = [part["slice"] for part in shard["slices"] if part["state"] == "served"]
        assert served == shard["prefix"]
        assert len(served) == shard["depth"] == found[shard["shard"]]
        assert (shard["stage"] is None) == (len(served) != 1)
    return found


def settle(barrier: Barrier, version: int, toy: Toy) -> None:
    wait_until(lambda: toy.leases()[0]["covers"] == version)
    wait_until(lambda: toy.leases()[0]["freed"] == version)  # sums and weights of the hit cell are gone
    wait_until(lambda: not barrier.look())


def test_preview_deactivation_and_rebuild_as_they_are_served(world: World, database: Database, tmp_path: Path) -> None:
    assert world.row("SELECT count(*) FROM artifact WHERE kind = 'evaluation' AND state = 'live'") == (4,)
    with transaction(world.pool) as connection:
        token = api_keys.create(connection, "client", [api_keys.Scope.MODEL_PREDICT])
    toy = Toy(database.owner_url, database.app_url, tmp_path / "artifacts", "tiny", world.recipe, world.model_id)
    toy.token = token
    records = questions(world)
    seen: set[float] = set()
    barrier = Barrier(world.pool, margin=0.05)
    with serving(toy, factory=partial(open_reader, device="cpu")) as (client, _):
        answered = client.predict("w1 w2 w3").json()
        assert (answered["version"], answered["shards"]) == (1, {"live": 4, "of": 4})
        version = 1
        for subject in ("s1", "s2", "s3"):
            found = foreseen(world, subject)
            assert found.accuracy_note is None
            assert found.accuracy_before == accuracy_served(client, records)
            request_id = world.ask(subject)
            steps.plan_targets(world.context, world.model_id)
            version += 1
            settle(barrier, version, toy)
            answered = client.predict("w1 w2 w3").json()
            assert (answered["version"], answered["shards"]) == (version, {"live": 3, "of": 4})
            assert found.accuracy_after == accuracy_served(client, records)
            assert grid_of(world) == found.depth_after
            assert sum(found.depth_after) == 3
            seen |= {found.accuracy_before or 0.0, found.accuracy_after or 0.0}
            steps.erase_target(world.context, request_id, world.model_id)
            world.log()
            steps.certify_target(world.context, request_id, world.model_id)
            build(world)
            version += 1
            wait_until(lambda now=version: client.version() == now)
            assert client.predict("w1").json()["shards"] == {"live": 4, "of": 4}
    assert world.rows("SELECT DISTINCT state, outcome FROM deletion_request") == [("completed", "erased")]
    assert world.rows("SELECT canonical FROM model_version WHERE version %% 2 = 1 AND NOT canonical") == []
    assert len(seen) > 2


def test_accuracy_needs_one_evaluation_and_every_cells_sums(world: World) -> None:
    names = [name for (name,) in world.rows("SELECT object_name FROM artifact WHERE kind = 'evaluation'")]
    whole = foreseen(world, "s1").accuracy_before
    assert whole is not None
    assert len({world.context.artifacts.get(name) for name in names}) == len(names)
    first = fits.decode(world.context.artifacts.get(names[0]))
    assert first.features.dtype == np.int32
    assert fits.encode(first, names[0].split("/")[1]) == world.context.artifacts.get(names[0])
    for name in names[:3]:
        (world.context.artifacts.files.root / name).unlink()
    assert foreseen(world, "s1").accuracy_before == whole
    (stage,) = world.row("SELECT min(object_name) FROM artifact WHERE kind = 'stage'")
    file = world.context.artifacts.files.root / stage
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "sums of one are not at hand" in (foreseen(world, "s1").accuracy_note or "")
    file.unlink()
    assert foreseen(world, "s1").accuracy_before is None
    file.write_bytes(data)
    assert foreseen(world, "s1").accuracy_before == whole
    (world.context.artifacts.files.root / names[3]).unlink()
    assert foreseen(world, "s1").accuracy_before is None
