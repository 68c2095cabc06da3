"""Engine ridge: sums of frozen features, exact under any deletion, solved once for what is served."""

import gc
import io
import random
import uuid
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import World, manifest_root, tiny_backbone, tiny_recipe, tiny_record, tiny_records
from transformers import AutoModel, ViTConfig, ViTImageProcessor, ViTModel

from shards.assembly import Assembly, Member
from shards.digest import sha256_hex
from shards.engine.artifacts import decode
from shards.engine.determinism import prepare
from shards.engine.files import backbone_digest
from shards.engine.inputs import Encoded
from shards.engine.pools import Pools
from shards.engine.registry import open_reader, open_trainer
from shards.engine.replay import replay
from shards.engine.ridge import RidgeTrainer, decode_sums
from shards.engine.ridge_reader import RidgeReader
from shards.engine.window import Batch
from shards.errors import ArtifactDigestError, BackboneError, MemoryShortageError, RecipeError, ShardsError
from shards.manifest import Record
from shards.partition import cell_of
from shards.plan import canonical
from shards.recipe import Backbone, Recipe, Ridge, Scale
from shards.stages import Stage, chain

pytestmark = pytest.mark.golden
KEY = b"partition key of the tests ....."
OWN = Ridge(layers=2, bits=6, clip=4.0, penalty=2.0)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    prepare()
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


def ridge_recipe(backbone: Backbone, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {"engine": "ridge", "orders": 1, "ridge": OWN, "max_tokens": 40}
    return tiny_recipe(backbone, **(fields | changes))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, backbone: Backbone) -> RidgeTrainer:
    return RidgeTrainer(ridge_recipe(backbone, precision=request.param))


@pytest.fixture(scope="module")
def plain(backbone: Backbone) -> RidgeTrainer:
    return RidgeTrainer(ridge_recipe(backbone))


def texts(count: int) -> list[str]:
    """Of all lengths up to 40 tokens and over."""
    return [" ".join(f"w{(place * 7 + step) % 96}" for step in range(1 + place * 5 % 50)) for place in range(count)]


def cells_of(owners: dict[str, int], gone: frozenset[str] = frozenset()) -> dict[tuple[int, int], list[Record]]:
    cells: dict[tuple[int, int], list[Record]] = {(shard, piece): [] for shard in range(2) for piece in range(2)}
    for owner, count in owners.items():
        cell = cell_of(KEY, uuid.uuid5(uuid.NAMESPACE_OID, owner), shards=2, slices=2)
        if owner not in gone:
            cells[cell.shard, cell.slice] += records_of(owner, count)
    return cells


def records_of(owner: str, count: int) -> list[Record]:
    return [tiny_record(f"{owner}-{number}") for number in range(count)]


def stage_of(recipe: Recipe, records: Sequence[Record], shard: int = 0, piece: int = 0) -> Stage:
    return chain(recipe.digest, shard, (piece,), {piece: manifest_root(records)})[0]


def served(world: World) -> np.ndarray:
    reader = open_reader(world.recipe, trainer=world.engine)
    for digest, data in world.artifacts.items():
        reader.load(digest, data)
    return reader.build(world.assembly()).logits(texts(9))


OWNERS = st.dictionaries(st.sampled_from([f"s{n}" for n in range(30)]), st.integers(1, 3), min_size=4, max_size=12)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(OWNERS, st.data())
def test_deleting_equals_never_having_had(engine: RidgeTrainer, owners: dict[str, int], data: st.DataObject) -> None:
    gone = data.draw(st.lists(st.sampled_from(sorted(owners)), min_size=1, max_size=3, unique=True))
    world = World(engine, cells_of(owners))
    world.rebuild()
    before = world.assembly()
    assert len(before.members) == 4
    assert before.aggregation == "sums"
    for owner in gone:
        world.delete({record.record_id for record in records_of(owner, owners[owner])})
    hit = [member for member in world.assembly().members if member is None]
    assert 1 <= len(hit) <= len(gone)

    without = World(engine, cells_of(owners, frozenset(gone)))
    without.rebuild()
    assert set(world.live) <= set(without.live)
    assert {key: without.digests[key] for key in world.digests} == world.digests
    world.rebuild()
    assert world.digests == without.digests
    assert world.assembly().digest == without.assembly().digest
    assert canonical(world.assembly(), engine.recipe, world.roots)
    assert served(world).tobytes() == served(without).tobytes()


def test_removing_records_in_any_order_equals_training_without_them(engine: RidgeTrainer) -> None:
    records = tiny_records(24)
    gone = random.Random(3).sample(records, 9)
    left = [record for record in records if record not in gone]
    wanted = engine.train(stage_of(engine.recipe, left), left, [])
    for sequence in (gone, gone[::-1]):
        remaining, data = list(records), engine.train(stage_of(engine.recipe, records), records[::-1], [])
        for at in range(0, 9, 3):
            batch = sequence[at : at + 3]
            remaining = [record for record in remaining if record not in batch]
            data = engine.remove(stage_of(engine.recipe, remaining), data, batch)
        assert sha256_hex(data) == sha256_hex(wanted)
        assert replay(engine, [stage_of(engine.recipe, left)], {0: left}) == [sha256_hex(data)]


def test_only_the_same_cells_own_records_can_be_removed(plain: RidgeTrainer) -> None:
    records = tiny_records(6)
    data = plain.train(stage_of(plain.recipe, records), records, [])
    with pytest.raises(ArtifactDigestError, match="another cell"):
        plain.remove(stage_of(plain.recipe, records[1:], piece=1), data, records[:1])
    with pytest.raises(ShardsError, match="not among the summed ones"):
        plain.remove(stage_of(plain.recipe, []), data, tiny_records(6, "other"))


def test_features_depend_on_their_input_alone(engine: RidgeTrainer) -> None:
    given = texts(40)
    together = engine.pools.features(given)
    assert together.shape == (40, engine.pools.width)
    assert engine.pools.width == 2 * 32 + 1
    assert (engine.pools.features(given[::-1])[::-1] == together).all()
    for place in (0, 7, 23, 39):
        assert (engine.pools.features([given[place]]) == together[place]).all()
        assert (engine.pools.features([given[place], *given[:place]])[0] == together[place]).all()
    assert engine.purity == "batched"


def test_features_are_means_over_own_tokens_of_the_last_layers(plain: RidgeTrainer) -> None:
    given = texts(6)
    model: Any = AutoModel.from_pretrained(plain.recipe.pretrained.source).eval()
    found = plain.pools.features(given)
    for text, row in zip(given, found, strict=True):
        (encoded,) = plain.backbone.encode([text])
        batch = plain.backbone.collate([encoded], plain.backbone.length(encoded))
        with torch.no_grad():
            states = model(**batch.inputs, output_hidden_states=True).hidden_states[-2:]
        pooled = np.concatenate([state[0].mean(0).numpy() for state in states])
        assert np.abs(row[:-1] / 2**6 - np.clip(pooled, -4, 4)).max() <= 0.5 / 2**6 + 1e-5
        assert row[-1] == 2**6


def test_a_text_without_tokens_has_no_features(plain: RidgeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.backbone.codec, "encode", lambda inputs: [Encoded(()) for _ in inputs])
    assert plain.pools.features(["", ""]).tolist() == [[0] * 64 + [2**6]] * 2


def test_memory_that_runs_out_is_said_with_the_fields(plain: RidgeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(_batch: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(plain.pools, "_pooled", greedy)
    with pytest.raises(MemoryShortageError, match=r"turn down max_tokens or ridge\.layers"):
        plain.train(stage_of(plain.recipe, tiny_records(2)), tiny_records(2), [])


def test_the_probe_meets_every_size_of_a_pass(plain: RidgeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    inner = Pools._pooled

    def spied(self: Pools, batch: Batch) -> np.ndarray:
        seen.add(batch.rows)
        return inner(self, batch)

    monkeypatch.setattr(Pools, "_pooled", spied)
    assert Pools(plain.backbone, plain.recipe).purity == "batched"
    assert seen == {1, 2, 4, 8, 16, 32}


def test_a_probe_that_fails_makes_every_input_run_alone(plain: RidgeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards.engine import pools  # noqa: PLC0415

    together = plain.pools.features(texts(9))
    monkeypatch.setattr(pools.Pools, "_is_pure", lambda _: False)
    single = pools.Pools(plain.backbone, plain.recipe)
    assert single.purity == "single"
    assert (single.features(texts(9)) == together).all()


def refit(engine: RidgeTrainer, records: Sequence[Record], wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features in their own unit, and the weights of a plain float64 fit: lambda once, the bias free."""
    x = engine.pools.features([record.text for record in records]) / 2.0**OWN.bits
    penalty = np.diag([OWN.penalty] * (x.shape[1] - 1) + [0.0])
    return x, np.linalg.solve(x.T @ x + penalty, x.T @ wanted)


def test_a_classifier_serves_the_refit_of_all_its_cells(plain: RidgeTrainer) -> None:
    world = World(plain, cells_of({f"s{number}": 3 for number in range(30)}))
    world.rebuild()
    records = [record for cell in world.cells.values() for record in cell]
    wanted = np.array([[record.label == "no", record.label == "yes"] for record in records], np.float64)
    x, weights = refit(plain, records, wanted)
    reader = RidgeReader(plain.recipe, plain.backbone)
    for digest, data in world.artifacts.items():
        reader.load(digest, data)
    predictor = reader.build(world.assembly())
    assert np.abs(predictor._weights * 2**OWN.bits - weights).max() < 1e-9  # type: ignore[operator]
    logits = predictor.logits([record.text for record in records])
    assert logits.dtype == np.float32
    scores = x @ weights
    assert (logits.argmax(axis=1) == scores.argmax(axis=1)).all()
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    inside = (scores > 0.001).all(axis=1)
    assert np.abs(shares - scores)[inside].max() < 1e-5
    assert (scores.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.7
    prepared = reader.prepare([record.text for record in records])
    assert predictor.answer(prepared).tobytes() == logits.tobytes()
    assert predictor.logits([records[4].text]).tobytes() == logits[4:5].tobytes()


def test_a_regression_answers_in_the_labels_unit(backbone: Backbone) -> None:
    scale = Scale(offset=50.0, spread=20.0)
    engine = RidgeTrainer(ridge_recipe(backbone, task="regression", classes=(), scale=scale))
    records = [
        Record(record.record_id, record.salt, record.text, str(40 + 7 * len(record.text.split())))
        for record in tiny_records(60)
    ]
    stage = stage_of(engine.recipe, records)
    data = engine.train(stage, records, [])
    sums = decode_sums(decode(data))
    assert (sums.count, sums.xty.shape) == (60, (65, 1))
    values = np.array([float(record.label) for record in records])
    target = np.rint((values - 50) / 20 * 2**12) / 2**12
    x, weights = refit(engine, records, target[:, None])
    reader = RidgeReader(engine.recipe, engine.backbone)
    reader.load(sha256_hex(data), data)
    predictor = reader.build(assembly_of(engine.recipe, stage, data))
    found = predictor.logits([record.text for record in records])
    assert np.abs(found - (x @ weights * 20 + 50)).max() < 1e-3
    assert np.abs(found[:, 0] - values).mean() < np.abs(values - values.mean()).mean() / 3


def assembly_of(recipe: Recipe, stage: Stage, data: bytes) -> Assembly:
    member = Member(stage.key, stage.prefix, (sha256_hex(data),))
    return Assembly(recipe.digest, (member, None, None, None), "sums")


def test_images_are_pooled_over_their_patches(tmp_path: Path) -> None:
    ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    backbone = Backbone(source=str(tmp_path), digest=backbone_digest(tmp_path))
    engine = RidgeTrainer(ridge_recipe(backbone, input="image"))
    records: list[Record] = []
    for place, record in enumerate(tiny_records(12)):
        file = io.BytesIO()
        shade = 200 if record.label == "yes" else 20
        Image.new("RGB", (20 + place, 30), (shade, place, 255 - shade)).save(file, "PNG")
        records.append(Record(record.record_id, record.salt, "", record.label, file.getvalue()))
    images = [record.image for record in records]
    together = engine.pools.features(images)
    assert together.shape == (12, 33)
    assert (engine.pools.features(images[5:6]) == together[5]).all()
    stage = stage_of(engine.recipe, records)
    data = engine.train(stage, records, [])
    reader = RidgeReader(engine.recipe, engine.backbone)
    reader.load(sha256_hex(data), data)
    found = reader.build(assembly_of(engine.recipe, stage, data)).logits(images).argmax(axis=1)
    assert found.tolist() == [int(record.label == "yes") for record in records]


def test_sums_that_may_overflow_are_refused_before_any_feature_is_computed(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Ridge(layers=1, bits=20, clip=1024.0)
    engine = RidgeTrainer(ridge_recipe(backbone, ridge=wide))
    monkeypatch.setattr(engine.pools, "features", lambda _: pytest.fail("computed"))
    with pytest.raises(RecipeError, match=r"lower ridge.bits or ridge.clip, or make smaller cells"):
        engine.sums(tiny_records(2))  # 2 records in each of 4 cells: 2^3 * 2^60
    small = RidgeTrainer(ridge_recipe(backbone, ridge=Ridge(layers=1, penalty=1e-12)))
    monkeypatch.setattr(small.pools, "features", lambda _: pytest.fail("computed"))
    with pytest.raises(RecipeError, match=r"ridge.penalty of 1e-12 is lost"):
        small.sums(tiny_records(2))


def test_what_does_not_fit_is_refused(plain: RidgeTrainer, backbone: Backbone) -> None:
    records = tiny_records(3)
    stage = stage_of(plain.recipe, records)
    data = plain.train(stage, records, [])
    with pytest.raises(RecipeError, match="label is not among"):
        plain.train(stage, [tiny_record("x", label="perhaps")], [])
    with pytest.raises(ArtifactDigestError, match="no parents"):
        plain.train(stage, records, [data])
    other = open_trainer(ridge_recipe(backbone, seed=8))
    with pytest.raises(RecipeError, match="is of recipe"):
        other.train(stage, records, [])
    with pytest.raises(BackboneError, match=r"lower ridge\.layers"):
        RidgeTrainer(ridge_recipe(backbone, ridge=Ridge(layers=5)))
    reader = RidgeReader(other.recipe, plain.backbone)
    with pytest.raises(ArtifactDigestError, match="is of recipe"):
        reader.load(sha256_hex(data), data)
    with pytest.raises(ArtifactDigestError, match="was promised"):
        reader.load("0" * 64, data)
    with pytest.raises(RecipeError, match="the assembly is of recipe"):
        reader.build(assembly_of(plain.recipe, stage, data))


def test_features_that_are_not_finite_publish_nothing(plain: RidgeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tiny_records(3)
    broken = np.full((3, plain.pools.width - 1), np.nan, np.float32)
    monkeypatch.setattr(plain.pools, "_pooled", lambda batch: broken[: batch.rows])
    with pytest.raises(ShardsError, match="not finite"):
        plain.train(stage_of(plain.recipe, records), records, [])


def test_an_empty_cell_and_a_class_that_is_gone(plain: RidgeTrainer) -> None:
    stage = stage_of(plain.recipe, [])
    data = plain.train(stage, [], [])
    reader = RidgeReader(plain.recipe, plain.backbone)
    reader.load(sha256_hex(data), data)
    empty = reader.build(assembly_of(plain.recipe, stage, data)).logits(texts(2))
    assert (empty == empty[0, 0]).all()
    records = [tiny_record(f"n{number}", label="no") for number in range(5)]
    stage = stage_of(plain.recipe, records)
    data = plain.train(stage, records, [])
    reader.load(sha256_hex(data), data)
    one = reader.build(assembly_of(plain.recipe, stage, data)).logits(texts(4))
    assert (one.argmax(axis=1) == 0).all()


def test_progress_counts_records(plain: RidgeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards.engine import ridge  # noqa: PLC0415

    monkeypatch.setattr(ridge, "CHUNK", 4)
    seen: list[tuple[int, int]] = []
    records = tiny_records(10)
    stage = stage_of(plain.recipe, records)
    data = plain.train(stage, records, [], lambda done, of: seen.append((done, of)))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    monkeypatch.undo()
    assert plain.train(stage, records, []) == data
    plain.forget([records[0].record_id])
    plain.clear()
    assert plain.record_ids == []


def test_dropped_sums_and_their_weights_leave_the_memory(plain: RidgeTrainer) -> None:
    reader = RidgeReader(plain.recipe, plain.backbone)
    members: list[Member | None] = []
    for piece in range(2):
        records = tiny_records(8, f"c{piece}")
        stage = stage_of(plain.recipe, records, piece=piece)
        data = plain.train(stage, records, [])
        reader.load(sha256_hex(data), data)
        reader.load(sha256_hex(data), data)
        members.append(Member(stage.key, stage.prefix, (sha256_hex(data),)))
    del data
    nobody = (None, None)
    both = reader.build(Assembly(plain.recipe.digest, (*members, *nobody), "sums"))
    second = reader.build(Assembly(plain.recipe.digest, (None, members[1], *nobody), "sums"))
    first = members[0]
    assert first is not None
    assert reader.held() == {digest for member in members if member for digest in member.artifacts}
    dying: list[weakref.ref[Any]] = reader.drop(first.artifacts)
    assert len(reader.held()) == 1
    assert len(dying) == 3
    assert len([1 for reference in dying if reference() is not None]) == 1, (
        "the sums went at once, the weights stay with their predictor"
    )
    answered = second.logits(texts(3))
    del both
    gc.collect()
    assert [reference() for reference in dying] == [None] * 3
    assert second.logits(texts(3)).tobytes() == answered.tobytes()
    with pytest.raises(ArtifactDigestError, match="not in memory"):
        reader.build(Assembly(plain.recipe.digest, (first, None, *nobody), "sums"))
    assert isinstance(members[1], Member)
    wrong = Member("0" * 64, (1,), members[1].artifacts)
    with pytest.raises(ArtifactDigestError, match="the assembly names"):
        reader.build(Assembly(plain.recipe.digest, (None, wrong, *nobody), "sums"))
    dead = reader.build(Assembly(plain.recipe.digest, (None, None, *nobody), "sums"))
    with pytest.raises(ShardsError, match="no cell has clean sums"):
        dead.logits(texts(1))
    with pytest.raises(ShardsError, match="no cell has clean sums"):
        dead.answer(reader.prepare(texts(1)))
