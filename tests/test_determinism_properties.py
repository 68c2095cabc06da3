"""Exactness as properties of a training: what a record that is taken out may change, and what no process may."""

import multiprocessing
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from exact import FEW, Slices, Trace, stages_of, trace_chain, train_chain
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_sisa import module_recipe, vectors
from tiny import tiny_backbone, tiny_recipe, tiny_records
from training_process import train_into

from shards.engine import ridge
from shards.engine.determinism import prepare
from shards.engine.interface import inputs_of
from shards.engine.registry import open_trainer
from shards.engine.ridge import RidgeTrainer
from shards.engine.s3t import S3T
from shards.recipe import Backbone, Lora, Recipe, Ridge

pytestmark = pytest.mark.golden
KINDS = ("s3t", "sisa", "sisa module", "ridge")
TEXTS: Slices = {0: tiny_records(6, "a"), 1: tiny_records(7, "b"), 2: tiny_records(5, "c")}
ROWS: Slices = {0: vectors(6, "a"), 1: vectors(7, "b"), 2: vectors(5, "c")}
PLACES = st.sampled_from([(piece, index) for piece, records in TEXTS.items() for index in range(len(records))])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    prepare()
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=3, width=16, inner=32)


def recipe_of(kind: str, backbone: Backbone) -> Recipe:
    """Every source of chance is on: orders, initialisation, dropout of adapters and backbone."""
    if kind == "sisa module":
        return module_recipe(epochs=4)
    more: dict[str, Any] = {"slices": 3, "epochs": 4, "orders": 1, "engine": kind, "backbone_dropout": True}
    if kind == "s3t":
        more |= {"orders": 3, "epochs": 2, "lora": Lora(rank=2, alpha=8, dropout=0.2)}
    if kind == "ridge":
        more |= {"ridge": Ridge(layers=2, bits=6, clip=4.0)}
    return tiny_recipe(backbone, **more)


def slices_of(kind: str) -> Slices:
    return ROWS if kind.endswith("module") else TEXTS


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(kind: str, backbone: Backbone) -> Any:
    return open_trainer(recipe_of(kind, backbone))


def without(slices: Slices, place: tuple[int, int]) -> tuple[Slices, UUID]:
    piece, index = place
    kept = [record for number, record in enumerate(slices[piece]) if number != index]
    return {**slices, piece: kept}, slices[piece][index].record_id


def equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return len(left) == len(right) > 0 and all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def check_alike(before: Trace, after: Trace) -> None:
    assert before.shown == after.shown != []
    assert before.stream == after.stream != []
    assert all(equal(*groups) for groups in zip(before.start, after.start, strict=True))


@pytest.mark.parametrize("kind", KINDS[:-1], indirect=True, scope="module")  # ridge draws nothing: see below
@settings(max_examples=4, **FEW)
@given(PLACES, st.permutations([0, 1, 2]))
def test_taking_a_record_out_changes_no_other_stage(
    kind: str, engine: Any, place: tuple[int, int], order: list[int]
) -> None:
    """Order, initialisation and dropout stream of stages that never read it, of its own shard and of another."""
    order = order if kind == "s3t" else [0, 1, 2]
    slices = slices_of(kind)
    less, gone = without(slices, place)
    before = trace_chain(engine, slices, order)
    beside = trace_chain(engine, slices, order, shard=1)
    after = trace_chain(engine, less, order)
    for one, other in zip(beside, trace_chain(engine, slices, order, shard=1), strict=True):
        check_alike(one, other)
    first = order.index(place[0])
    for depth, (one, other) in enumerate(zip(before, after, strict=True)):
        if depth < first:
            check_alike(one, other)
            continue
        assert other.order == [record_id for record_id in one.order if record_id != gone]
        if depth == first:  # it begins as before, on a parent that never saw the record
            assert all(equal(*groups) for groups in zip(one.start, other.start, strict=True))
        elif kind == "s3t":  # the head comes from its parent, the block from the seed alone
            assert equal(one.start[0], other.start[0])
            assert not equal(one.start[1], other.start[1])
        if len(one.shown[0]) == len(other.shown[0]):
            assert one.stream[0] == other.stream[0]


@settings(max_examples=4, **FEW)
@given(PLACES)
def test_taking_a_record_out_changes_no_features_of_another(backbone: Backbone, place: tuple[int, int]) -> None:
    engine = S3T(recipe_of("s3t", backbone), cache_bytes=2**20)
    less, gone = without(TEXTS, place)
    kept = [record.record_id for records in less.values() for record in records]
    found: list[list[torch.Tensor]] = []
    for slices in (TEXTS, less):
        engine.clear()
        train_chain(engine, slices, (0, 1, 2))
        assert (gone in engine.record_ids) == (slices is TEXTS)
        found.append([engine.trunk.rows(kept, boundary)[0] for boundary in engine.trunk.boundaries])
    assert equal(*found)


@settings(max_examples=4, **FEW)
@given(PLACES)
def test_sums_of_other_records_and_cells_never_move(backbone: Backbone, place: tuple[int, int]) -> None:
    """Engine `ridge` draws nothing at random, and a record's features do not know who was computed beside it."""
    engine = RidgeTrainer(recipe_of("ridge", backbone))
    less, gone = without(TEXTS, place)
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ridge, "CHUNK", 4)
        found = [[train_chain(engine, slices, (piece,))[0] for piece in slices] for slices in (TEXTS, less)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [one == other for one, other in zip(*found, strict=True)] == [piece != place[0] for piece in TEXTS]
    (record,) = (each for each in TEXTS[place[0]] if each.record_id == gone)
    stage = stages_of(engine, less, (place[0],))[0]
    assert engine.remove(stage, found[0][place[0]], [record]) == found[1][place[0]]
    inputs = inputs_of(engine.recipe, TEXTS[place[0]])
    together = engine.pools.features(inputs)
    alone = np.concatenate([engine.pools.features([each]) for each in inputs])
    assert np.array_equal(together, alone)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes of their own, forked from a server that was started anew and has loaded the engines."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["training_process", "shards.engine.s3t", "shards.engine.sisa", "shards.engine.ridge"]
    )
    return context


def test_a_killed_process_and_those_that_go_on_end_in_the_same_bits(
    kind: str, engine: Any, processes: Any, tmp_path: Path
) -> None:
    """SIGKILL in the middle of a stage, with an artefact half written, and at a stage's boundary: each time another
    process resumes from the artefacts that are there.
    """
    slices = slices_of(kind)
    orders = [tuple(order) for order in engine.recipe.slice_orders]
    wanted = {
        "-".join(map(str, order[: depth + 1])): data
        for order in orders
        for depth, data in enumerate(train_chain(engine, slices, order))
    }
    there = 0
    for kill, finished in (("train 1", 0), ("done 1", 1), ("train 2", 1), ("write 1", 0), ("", len(wanted))):
        arguments = (tmp_path, engine.recipe.to_json(), slices, orders, kill)
        process = processes.Process(target=train_into, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if kill else 0)
        there = min(there + finished, len(wanted))
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".part"}
        assert len(found) == there
        assert found == {name: wanted[name] for name in found}
    assert found == wanted
