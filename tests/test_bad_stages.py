"""Stages that cannot be trained: the job fails and says why, and nothing is published."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Database
from tiny import tiny_backbone, tiny_record
from world import World, make_world

from shards.engine.s3t import S3T
from shards.errors import ModuleError
from shards.recipe import Backbone
from workers import steps
from workers.training import train_queued

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2, width=16, inner=32)


@pytest.fixture
def installation(database: Database, tmp_path: Path, backbone: Backbone) -> Iterator[Callable[..., World]]:
    """Makes a world of one shard, whose first stages are of several steps."""
    made: list[World] = []

    def make(**changes: Any) -> World:
        world = make_world(database, tmp_path, backbone, shards=1, **changes)
        world.add({f"person {number}": [f"r{number}"] for number in range(24)})
        made.append(world)
        return world

    yield make
    for world in made:
        world.pool.close()


def attempt_twice(world: World) -> None:
    steps.rebuild_model(world.context, world.model_id)
    assert train_queued(world.context) == 0
    world.rest()
    assert train_queued(world.context) == 0
    steps.publish_model(world.context, world.model_id)


def check_nothing_published(world: World, error: str) -> None:
    """The first stages failed twice with the error, those on them with their parent; only payloads are there."""
    jobs = world.rows("SELECT parent IS NULL, state, error FROM stage_job JOIN stage USING (stage_key)")
    firsts = [(state, told) for first, state, told in jobs if first]
    assert len(firsts) == 2
    assert all(state == "failed" and told.startswith(error) for state, told in firsts)
    assert {(state, told) for first, state, told in jobs if not first} == {("failed", "ParentFailed")}
    assert world.rows("SELECT 1 FROM artifact WHERE kind = 'stage'") == []
    assert not [name for name in world.context.artifacts.names(older_than=-60) if name.startswith("stages/")]
    assert world.row("SELECT version, floor FROM model") == (0, 0)
    assert world.rows("SELECT version FROM model_version") == []
    bodies = [body for (body,) in world.rows("SELECT body FROM event_pending WHERE kind = 'stage.failed'")]
    assert len(bodies) == 2
    assert all(body["error"].startswith(error) and body["attempts"] == 2 for body in bodies)


def test_a_loss_that_is_no_number(installation: Callable[..., World]) -> None:
    world = installation(epochs=3, learning_rate=1e38, head_learning_rate=1e38)
    attempt_twice(world)
    check_nothing_published(world, "DivergedError: the loss is no longer a number at step 2 (learning_rate 1e+38")


def test_a_model_that_does_not_fit_into_memory(
    installation: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    world = installation()
    monkeypatch.setattr("torch.nn.functional.cross_entropy", exhausted)
    attempt_twice(world)
    check_nothing_published(world, "MemoryShortageError: memory ran out")
    assert "batch_size" in world.row("SELECT max(error) FROM stage_job WHERE attempts > 0")[0]


def test_more_slices_than_the_backbone_has_layers_for(installation: Callable[..., World]) -> None:
    world = installation(layers_per_slice=2)
    attempt_twice(world)
    check_nothing_published(world, "BackboneError: 2 slices of 2 layers need more than the backbone's 2 layers: lower")


def test_a_label_that_is_refused_is_not_told(
    installation: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label is data: an error about it names the classes alone."""
    monkeypatch.setattr("world.tiny_record", lambda name: tiny_record(name, label="zebra of a person"))
    world = installation()
    attempt_twice(world)
    check_nothing_published(world, "RecipeError: classes: a record's label is not among them; correct")
    assert "zebra" not in str(world.rows("SELECT error FROM stage_job"))
    assert "zebra" not in str(world.rows("SELECT body FROM event_pending"))


def test_what_others_code_says_of_records_is_not_told(
    installation: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any) -> bytes:
        raise ModuleError("a module's own words: zebra of a person") from ValueError()

    monkeypatch.setattr(S3T, "train", train)
    world = installation()
    attempt_twice(world)
    check_nothing_published(world, "ModuleError")
    assert world.rows("SELECT DISTINCT error FROM stage_job WHERE attempts > 0") == [("ModuleError",)]
    assert "zebra" not in str(world.rows("SELECT body FROM event_pending"))
