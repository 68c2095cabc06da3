"""The errors of the published SISA code (facts/exact-unlearning.md 4.20 to 4.26): one test each that would catch it."""

import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import torch
from conftest import Database
from test_engine_sisa import CELLS, module_of, module_recipe, stages_of, train, vectors
from test_workers_path import SUBJECTS, build, settle
from tiny import World, manifest_root, tiny_backbone, tiny_records
from world import World as Installation
from world import make_world

from shards.digest import sha256_hex
from shards.engine import schedule
from shards.engine.artifacts import decode
from shards.engine.determinism import prepare
from shards.engine.interface import check_lineage
from shards.engine.sisa import Sisa
from shards.errors import ManifestMismatchError
from shards.manifest import Record
from shards.recipe import Module, Recipe
from shards.stages import chain
from workers import steps

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    prepare()


def test_a_point_of_the_last_slices_remainder_is_unlearned_too() -> None:
    """4.20: slices of 103 points by tens; the last stage trained on all 103 but was named after 100 of them."""
    made = vectors(103, "p")
    cells = {piece: made[piece * 10 : piece * 10 + 10] for piece in range(9)} | {9: made[90:]}
    engine = Sisa(module_recipe(slices=10, epochs=6, batch_size=32))
    stages, whole = stages_of(engine, cells), train(engine, cells)
    for gone in (made[100], made[101], made[102]):
        less = cells | {9: [record for record in cells[9] if record is not gone]}
        again = stages_of(engine, less)
        assert [stage.key for stage in again[:9]] == [stage.key for stage in stages[:9]]
        assert again[9].key != stages[9].key
        assert decode(train(engine, less)[9]).tensors.keys() == decode(whole[9]).tensors.keys()
        assert weights(train(engine, less)[9]) != weights(whole[9])
        with pytest.raises(ManifestMismatchError):  # what is hashed is what is trained on
            check_lineage(again[9], cells)


def weights(artifact: bytes) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in decode(artifact).tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"learning_rate": 2e-2},
        {"epochs": 3},
        {"batch_size": 5},
        {"weight_decay": 0.1},
        {"precision": "bfloat16"},
        {"classes": ("yes", "no")},
        {"module": Module(path="toy_module:Plain", digest="1" * 64, width=6)},
        {"module": module_of("Normed")},
        {"module": module_of("Plain", inner=9)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_never_find_old_weights(change: dict[str, Any]) -> None:
    """4.21: the cache key was a hash of indices; architecture, seed, rates, epochs and content were not in it."""
    roots = {piece: manifest_root(records) for piece, records in CELLS.items()}
    assert keys(module_recipe(), roots).isdisjoint(keys(module_recipe(**change), roots))


def keys(recipe: Recipe, roots: dict[int, str]) -> set[str]:

    return {stage.key for stage in chain(recipe.digest, 0, (0, 1, 2), roots)}


def test_other_content_under_the_same_id_never_finds_old_weights() -> None:
    """4.21, content: the same indices with other data gave the same key."""
    engine = Sisa(module_recipe())
    first, *others = CELLS[0]
    changed = {**CELLS, 0: [dataclasses.replace(first, text="[1, 2, 3, 4, 5, 6]"), *others]}
    relabelled = {**CELLS, 0: [dataclasses.replace(first, label="no" if first.label == "yes" else "yes"), *others]}
    trained = {tuple(sha256_hex(data) for data in train(engine, cells)) for cells in (CELLS, changed, relabelled)}
    assert len(trained) == 3
    names = {stages_of(engine, cells)[0].key for cells in (CELLS, changed, relabelled)}
    assert len(names) == 3


def test_batches_are_packed_again_after_a_deletion() -> None:
    """4.22: batches were cut at original places, so they shrank or ran empty (loss NaN) and were no fresh run's."""
    ids = [record.record_id for record in tiny_records(12)]
    kept: Sequence[UUID] = ids[4:]  # a whole batch is gone
    sizes = [len(batch) for batch in schedule.batches(list(kept), 4)]
    assert sizes == [4, 4]
    made = vectors(12, "b")
    engine = Sisa(module_recipe(batch_size=4, shards=1))
    world = World(engine, {(0, 0): made, (0, 1): [], (0, 2): CELLS[2]})
    world.rebuild()
    world.delete({record.record_id for record in made[:4]})
    world.rebuild()
    fresh = World(Sisa(engine.recipe), {(0, 0): made[4:], (0, 1): [], (0, 2): CELLS[2]})
    fresh.rebuild()
    assert world.digests == fresh.digests
    world.delete({record.record_id for record in made})  # and of an emptied slice nothing is left at all
    world.rebuild()
    assert all(tensor.isfinite().all() for data in world.artifacts.values() for tensor in decode(data).tensors.values())


def test_no_optimizer_state_crosses_a_stage_boundary() -> None:
    """4.23: Adam's moments lived on in memory from slice to slice but not in checkpoints, and no seed was set."""
    engine = Sisa(module_recipe("Normed"))
    first, second, third = train(engine, CELLS)
    records = [record for piece in CELLS.values() for record in piece]
    torch.manual_seed(1)
    resumed = Sisa(engine.recipe)
    assert resumed.train(stages_of(engine, CELLS)[2], records, [first, second]) == third
    train(resumed, {0: CELLS[1], 1: CELLS[2]}, shard=1)  # a past that the trainer must not remember
    assert resumed.train(stages_of(engine, CELLS)[2], records, [first, second]) == third


class InterruptionError(Exception):
    """A crash in mid-training."""


@pytest.mark.parametrize("at", [1, 4, 7])
def test_recovery_repeats_no_epoch(at: int) -> None:
    """4.24: recovery began with an epoch that was complete, from whichever checkpoint came first by name."""
    engine = Sisa(module_recipe(epochs=4, batch_size=4))
    artifacts = train(engine, CELLS)
    stage, records = stages_of(engine, CELLS)[1], [*CELLS[0], *CELLS[1]]

    def crash(done: int, _total: int) -> None:
        if done == at:
            raise InterruptionError

    crashed = Sisa(engine.recipe)
    with pytest.raises(InterruptionError):
        crashed.train(stage, records, artifacts[:1], crash)
    for recovered in (crashed, Sisa(engine.recipe)):
        assert recovered.train(stage, records, artifacts[:1]) == artifacts[1]


def test_no_stage_loses_its_epochs_to_rounding() -> None:
    """4.25: epochs=20 over 50 slices became 0.784 a slice, rounded: 11 slices got none, 39 in all instead of 40."""
    recipe = module_recipe(epochs=20, slices=50)
    passes = schedule.stage_epochs(recipe)
    assert passes == Fraction(40, 51)
    shown = {depth: sum(len(order) for order in schedule.epochs(depth, ids(depth), passes)) for depth in (1, 25, 50)}
    assert shown == {1: 8, 25: 197, 50: 393}  # ceil(10 * depth * 40/51)
    total = sum(sum(len(order) for order in schedule.epochs(depth, ids(depth), passes)) for depth in range(1, 51))
    assert 0 <= total - 20 * 500 < 50
    done: list[int] = []
    engine = Sisa(module_recipe(epochs=20, slices=50, batch_size=1))
    stage = stages_of(engine, dict.fromkeys(range(50), CELLS[0][:1]))[0]
    engine.train(stage, CELLS[0][:1], [], lambda step, _total: done.append(step))
    assert done == [1]


def ids(depth: int) -> list[UUID]:
    return [record.record_id for record in tiny_records(10 * depth)]


@pytest.fixture
def world(database: Database, tmp_path: Path) -> Iterator[Installation]:
    backbone = tiny_backbone(tmp_path / "backbone", layers=1, width=16)
    made = make_world(database, tmp_path, backbone, engine="sisa", orders=1)
    made.add(SUBJECTS)
    yield made
    made.pool.close()


@pytest.mark.integration
def test_old_checkpoints_are_destroyed(world: Installation) -> None:
    """4.26: checkpoints of deleted data were never purged, and those of single epochs lingered."""
    build(world)
    root = world.context.artifacts.files.root
    before = {path.relative_to(root).as_posix() for path in (root / "stages").rglob("*") if path.is_file()}
    assert len(before) == 4  # one per stage and nothing beside
    world.ask("person2")
    steps.plan_targets(world.context, world.model_id)
    settle(world)
    tainted = {name for (name,) in world.rows("SELECT object_name FROM artifact WHERE state = 'destroyed'")}
    left = {path.relative_to(root).as_posix() for path in (root / "stages").rglob("*") if path.is_file()}
    assert tainted & before
    assert left == before - tainted
    assert build_of(world, left).isdisjoint(tainted)


def build_of(world: Installation, left: set[str]) -> set[str]:
    """Names after the rebuild; what was left is used again, not trained twice."""
    build(world)
    root = world.context.artifacts.files.root
    names = {path.relative_to(root).as_posix() for path in (root / "stages").rglob("*") if path.is_file()}
    assert left < names
    assert len(names) == 4
    return names


def test_records_are_what_the_manifest_says() -> None:
    """4.20, the other way about: a stage refuses records that its name does not cover."""
    engine = Sisa(module_recipe())
    stage = stages_of(engine, CELLS)[0]
    more: list[Record] = [*CELLS[0], *vectors(1, "extra")]
    with pytest.raises(ManifestMismatchError):
        check_lineage(stage, {0: more})
