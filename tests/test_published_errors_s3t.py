"""One test for each error in how the published S3T code trains and deletes (facts/exact-unlearning.md, section 4.1).

Each was seen to fail on a copy of this code into which the error, or its nearest like, had been put.
"""

import dataclasses
import itertools
import random
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact import Slices, stages_of, trace_chain, train_chain
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_sisa import module_recipe, vector_record
from tiny import WORDS, World, tiny_backbone, tiny_recipe, tiny_record, tiny_records

from shards.assembly import Assembly, Member
from shards.digest import sha256_hex
from shards.engine.artifacts import decode, encode
from shards.engine.determinism import epoch_order, prepare, stage_seed
from shards.engine.interface import check_lineage
from shards.engine.registry import open_reader, open_trainer
from shards.engine.s3t import S3T
from shards.errors import ArtifactDigestError, ManifestMismatchError
from shards.manifest import Record
from shards.partition import cell_of
from shards.recipe import Lora
from shards.stages import Stage

pytestmark = pytest.mark.golden
SLICES: Slices = {0: tiny_records(6, "a"), 1: tiny_records(7, "b"), 2: tiny_records(5, "c")}
TEXTS = [" ".join(WORDS[(5 * row + word) % 96] for word in range(2 + row % 9)) for row in range(12)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> S3T:
    prepare()
    backbone = tiny_backbone(tmp_path_factory.mktemp("backbone"), width=16, inner=32)
    lora = Lora(rank=2, alpha=8, dropout=0.1)
    return S3T(tiny_recipe(backbone, slices=3, orders=3, epochs=2, lora=lora, learning_rate=1e-2))


def fresh(engine: S3T) -> S3T:
    """The engine as another process would have it: nothing left of any stage."""
    return S3T(engine.recipe, engine.backbone)


def records_of(stage: Stage, slices: Slices) -> list[Record]:
    return [record for piece in stage.prefix for record in slices[piece]]


def answer(engine: S3T, stage: Stage, artifacts: list[bytes], *others: bytes) -> np.ndarray:
    """What a chain answers from a reader that holds `others` besides, loaded before and after."""
    reader = open_reader(engine.recipe, trainer=engine)
    for data in (*others[: len(others) // 2], *reversed(artifacts), *others[len(others) // 2 :]):
        reader.load(sha256_hex(data), data)
    member = Member(stage.key, stage.prefix, tuple(map(sha256_hex, artifacts)))
    return reader.build(Assembly(engine.recipe.digest, (member, None))).logits(TEXTS)


def changed(data: bytes, part: str) -> bytes:
    """The artefact with other values in some of its tensors."""
    artifact = decode(data)
    tensors = {name: tensor + 0.5 if part in name else tensor for name, tensor in artifact.tensors.items()}
    return encode(artifact.stage, tensors)


def test_1_a_stage_stands_on_the_adapters_of_those_before_it(engine: S3T) -> None:
    """1: the earlier LoRA weights were wiped at each stage, by wrapping the loaded model in a new adapter."""
    first, second = train_chain(engine, SLICES, (0, 1))
    stage = stages_of(engine, SLICES, (0, 1))[1]
    records = records_of(stage, SLICES)
    assert fresh(engine).train(stage, records, [first]) == second
    other = changed(first, "lora_B")
    assert fresh(engine).train(stage, records, [other]) != second
    assert not np.array_equal(answer(engine, stage, [first, second]), answer(engine, stage, [other, second]))


@pytest.mark.parametrize(("slices", "wide"), [(6, 2), (4, 3), (11, 1)])
def test_2_a_block_is_the_layers_of_its_integers(tmp_path: Path, slices: int, wide: int) -> None:
    """2: `"layer.1" in name` is true of layers 10 and 11 as well, so that late slices trained the top layers."""
    backbone = tiny_backbone(tmp_path, layers=12, width=8, inner=8)
    engine = S3T(tiny_recipe(backbone, slices=slices, orders=1, layers_per_slice=wide, lora=Lora(rank=1, alpha=1)))
    cells: Slices = {piece: [] for piece in range(slices - 1)} | {slices - 1: tiny_records(2)}
    moving: list[set[int]] = []

    def look(_done: int, _total: int) -> None:
        named = list(engine._adapters.model.named_parameters())
        layers = [re.search(r"layer\.(\d+)\.", name) for name, tensor in named if tensor.grad is not None]
        moving.append({int(found[1]) for found in layers if found})

    line = stages_of(engine, cells, range(slices))
    artifacts = train_chain(engine, cells, range(slices))
    engine.train(line[-1], cells[slices - 1], artifacts[:-1], look)
    for depth, data in enumerate(artifacts, 1):
        found = {int(name.split(".")[5]) for name in decode(data).lora}
        assert found == set(range(12 - depth * wide, 12 - (depth - 1) * wide))
    assert moving == [set(range(12 - slices * wide, 12 - (slices - 1) * wide))]


def test_3_a_prefix_is_served_with_the_head_of_its_own_stage(engine: S3T) -> None:
    """3: one head sees the slices of every stage, so that switching layers off alone is not exact."""
    first, second, third = train_chain(engine, SLICES, (0, 1, 2))
    stage = stages_of(engine, SLICES, (0, 1, 2))[0]
    alone = answer(engine, stage, [first])
    assert np.array_equal(answer(engine, stage, [first], second, third), alone)
    assert not np.array_equal(answer(engine, stage, [changed(first, "classifier")]), alone)
    assert train_chain(engine, SLICES, (1, 0)) == train_chain(fresh(engine), SLICES, (1, 0))
    last = stages_of(engine, SLICES, (0, 1, 2))[2]
    records = records_of(last, SLICES)
    assert engine.train(last, records, [changed(first, "classifier"), second]) == third
    assert engine.train(last, records, [first, changed(second, "classifier")]) != third


def test_4_the_weights_of_the_last_step_are_kept_whatever_they_are_worth(engine: S3T) -> None:
    """4: checkpoints were chosen on the test set, with early stopping, and the best epoch was reported."""
    rough = dataclasses.replace(engine.recipe, epochs=4, learning_rate=0.5, head_learning_rate=1.0)
    trainer = S3T(rough, engine.backbone)
    records = [tiny_record(f"n{number}", label="yes" if number % 2 else "no") for number in range(10)]
    stage = stages_of(trainer, {0: records}, (0,))[0]
    seen: list[tuple[int, int]] = []
    last: dict[str, torch.Tensor] = {}

    def look(done: int, total: int) -> None:
        seen.append((done, total))
        named = trainer._adapters.block(3, 4) | trainer._adapters.head
        last.update({name: tensor.detach().clone() for name, tensor in named.items()})

    artifact = decode(trainer.train(stage, records, [], look))
    assert seen == [(step, 12) for step in range(1, 13)]
    assert all(torch.equal(artifact.tensors[name], tensor) for name, tensor in last.items())


def test_5_a_stage_and_an_answer_name_the_artefacts_they_stand_on(engine: S3T) -> None:
    """5: the next stage and the inference took whichever checkpoint the directory listed first."""
    chains = {order: train_chain(engine, SLICES, order) for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1))}
    strangers = [data for order, line in chains.items() if order != (0, 1, 2) for data in line]
    stages = stages_of(engine, SLICES, (0, 1, 2))
    alone = answer(engine, stages[2], chains[0, 1, 2])
    for mixed in itertools.islice(itertools.permutations(strangers), 0, 720, 240):
        assert np.array_equal(answer(engine, stages[2], chains[0, 1, 2], *mixed), alone)
    stale = train_chain(engine, {**SLICES, 0: SLICES[0][1:]}, (0,))[0]
    for other in (*strangers, stale, chains[0, 1, 2][1]):
        with pytest.raises(ArtifactDigestError, match="not its ancestors"):
            engine.train(stages[1], records_of(stages[1], SLICES), [other])


def test_6_nothing_random_is_unseeded_and_nobody_moves_the_others(engine: S3T) -> None:
    """6: model, adapters and head were made before the seed was set; one record less shuffled all the others; the
    batch size hung on free memory.
    """
    digests: set[tuple[str, ...]] = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global stream is what is meant
        lines = train_chain(fresh(engine), SLICES, (0, 1)), train_chain(fresh(engine), {0: [], 1: []}, (0, 1))
        digests.add(tuple(sha256_hex(data) for line in lines for data in line))
    assert len(digests) == 1
    gone = SLICES[0][2].record_id
    less = {**SLICES, 0: [record for record in SLICES[0] if record.record_id != gone]}
    for whole, rest in zip(trace_chain(engine, SLICES, (0, 1)), trace_chain(engine, less, (0, 1)), strict=True):
        assert rest.order == [record_id for record_id in whole.order if record_id != gone]
        for trace in (whole, rest):
            count = len(trace.order) // 2
            assert [len(batch) for batch in trace.shown] == [min(4, count - at) for at in range(0, count, 4)] * 2


def test_7_a_stage_never_meets_the_slices_after_it(engine: S3T) -> None:
    """7: a "validation" set was drawn from the whole training set, later slices included."""
    stage = stages_of(engine, SLICES, (0, 1, 2))[0]
    with pytest.raises(ManifestMismatchError, match="reads slices"):
        check_lineage(stage, SLICES)
    assert {record.record_id for record in check_lineage(stage, {0: SLICES[0]})} == {r.record_id for r in SLICES[0]}
    with pytest.raises(ManifestMismatchError):
        check_lineage(stage, {0: [*SLICES[0], SLICES[1][0]]})
    world = World(engine, {(shard, piece): list(rs) for shard in (0, 1) for piece, rs in SLICES.items()})
    world.rebuild()
    readers = {key: {root.slice for root in each.lineage} for key, each in world.live.items()}
    assert all(pieces == set(world.live[key].prefix) for key, pieces in readers.items())
    before = dict(world.digests)
    world.delete({SLICES[2][0].record_id})
    world.rebuild()
    for key, pieces in readers.items():
        assert (world.digests.get(key) == before[key]) == (2 not in pieces)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.binary(min_size=32, max_size=32))
def test_8_cells_are_even_whole_and_by_subject(shards_: int, slices: int, key: bytes) -> None:
    """8: slices were cut at rounded percents, with a remainder dropped, and had no map from an id to its slice."""
    subjects = [uuid.UUID(int=number) for number in range(4000)]
    cells = Counter(cell_of(key, subject, shards=shards_, slices=slices) for subject in subjects)
    count = shards_ * slices
    assert sum(cells.values()) == 4000
    assert {(cell.shard, cell.slice) for cell in cells} == set(itertools.product(range(shards_), range(slices)))
    spread = (4000 / count * (1 - 1 / count)) ** 0.5
    assert all(abs(size - 4000 / count) <= 5.5 * spread for size in cells.values())
    assert [cell_of(key, each, shards=shards_, slices=slices) for each in subjects[5:9]] == [
        cell_of(key, uuid.UUID(int=number), shards=shards_, slices=slices) for number in range(5, 9)
    ]


def engines(engine: S3T) -> Iterator[tuple[Any, Slices]]:
    """Trainers of several engines and tasks, with one slice of records."""
    backbone = engine.recipe.pretrained
    yield engine, {0: SLICES[0]}
    numbers = [dataclasses.replace(record, label=str(place)) for place, record in enumerate(SLICES[0])]
    yield open_trainer(tiny_recipe(backbone, task="regression", classes=(), epochs=2)), {0: numbers}
    yield open_trainer(tiny_recipe(backbone, engine="sisa", orders=1, epochs=3)), {0: SLICES[0]}
    yield open_trainer(module_recipe(epochs=4)), {0: [vector_record(f"v{number}") for number in range(7)]}


def test_9_records_are_shown_in_a_keyed_order_on_every_path(engine: S3T) -> None:
    """9: one data set's path shuffled, the others showed records as the file had them."""
    for trainer, slices in engines(engine):
        ids = [record.record_id for record in slices[0]]
        (trace,) = trace_chain(trainer, slices, (0,))
        seed = stage_seed(trainer.recipe, 0, (0,))
        epochs = [trace.order[at : at + len(ids)] for at in range(0, len(trace.order), len(ids))]
        assert len(epochs) >= 2
        assert epochs == [epoch_order(seed, epoch, ids) for epoch in range(len(epochs))]
        assert len({tuple(order) for order in [*epochs, ids]}) == len(epochs) + 1
        (again,) = trace_chain(trainer, {0: list(reversed(slices[0]))}, (0,))
        assert again.order == trace.order
