import dataclasses
import gc
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import WORDS, World, tiny_backbone, tiny_recipe, tiny_records
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shards import merged
from shards.assembly import Assembly
from shards.digest import sha256_hex
from shards.engine.backbone import Backbone
from shards.engine.determinism import prepare
from shards.engine.ensemble import Ensemble, Monolithic, StageTensors, stage_logits
from shards.engine.inputs import buckets
from shards.engine.known import Known
from shards.engine.routed import Member
from shards.engine.s3t import S3T
from shards.engine.skeleton import Skeleton
from shards.engine.stacked import StackedReader
from shards.engine.window import Batch
from shards.errors import ArtifactDigestError, RecipeError, ShardsError
from shards.logits import mean_of_logits
from shards.stages import chain

pytestmark = pytest.mark.golden
TEXTS = [" ".join(WORDS[(7 * row + word) % 96] for word in range(1 + (5 * row) % 40)) for row in range(37)]


class Served:
    """A trained model with all that serving needs."""

    def __init__(self, directory: Path, precision: str) -> None:
        prepare()
        # inner 1536: wide enough that bf16 products with few rows take another path on AMX.
        entry = tiny_backbone(directory, inner=1536)
        recipe = tiny_recipe(entry, shards=3, precision=precision, max_tokens=48, learning_rate=0.01)
        engine = S3T(recipe, Backbone.load(recipe))
        cells = {(s, p): tiny_records(5, f"c{s}{p}") for s in range(3) for p in range(2)}
        self.world = World(engine, cells)
        self.world.rebuild()
        self.skeleton = Skeleton(recipe, engine.backbone)
        self.tensors = StageTensors(recipe)
        for digest, artifact in self.world.artifacts.items():
            self.tensors.add(digest, artifact)
        self.assembly = self.world.assembly()
        self.ensemble = Ensemble(self.skeleton, self.tensors, self.assembly)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("backbone"), request.param)


def test_an_answer_depends_on_its_own_input_alone(served: Served) -> None:
    assert served.skeleton.purity == "batched"
    together = served.ensemble.logits(TEXTS)
    backwards = served.ensemble.logits(TEXTS[::-1])[::-1]
    assert np.array_equal(together, backwards)
    for size in (1, 2, 3, 5, 8, 13):
        for at in range(0, len(TEXTS), size):
            assert np.array_equal(served.ensemble.logits(TEXTS[at : at + size]), together[at : at + size])


def test_the_preview_is_what_is_served_bit_for_bit(served: Served) -> None:
    lines = [member for member in served.assembly.members if member]
    each = [stage_logits(served.skeleton, served.tensors, [line], TEXTS)[0] for line in lines]
    assert np.array_equal(mean_of_logits(each), served.ensemble.logits(TEXTS))
    at_once = stage_logits(served.skeleton, served.tensors, lines[::-1], TEXTS)[::-1]
    assert all(np.array_equal(left, right) for left, right in zip(each, at_once, strict=True))
    two = Assembly(served.assembly.recipe, (served.assembly.members[0], None, served.assembly.members[2]))
    part = Ensemble(served.skeleton, served.tensors, two)
    assert part.live == 2
    assert np.array_equal(mean_of_logits([each[0], each[2]]), part.logits(TEXTS))


def test_members_differ_and_count(served: Served) -> None:
    lines = [member for member in served.assembly.members if member]
    each = stage_logits(served.skeleton, served.tensors, lines, TEXTS)
    assert not np.array_equal(each[0], each[1])
    assert np.allclose(served.ensemble.logits(TEXTS), np.mean(each, axis=0), atol=1e-5)
    assert served.ensemble.logits(TEXTS).dtype == np.float32
    assert served.ensemble.logits([]).shape == (0, 2)


def test_the_fallback_answers_like_the_stacked_pass(served: Served) -> None:
    slow = Skeleton(served.skeleton.recipe, served.skeleton.backbone)
    slow.batched = False
    assert slow.purity == "single"
    alone = Ensemble(slow, served.tensors, served.assembly)
    tolerance = 0.05 if served.skeleton.recipe.precision == "bfloat16" else 1e-5
    assert np.allclose(alone.logits(TEXTS), served.ensemble.logits(TEXTS), atol=tolerance)
    assert np.array_equal(alone.logits(TEXTS)[:3], alone.logits(TEXTS[:3]))


def test_serving_follows_the_trained_adapters(served: Served) -> None:
    member = served.assembly.members[0]
    assert member is not None
    shallow = type(member)(served.world.live[member.stage].parent or "", member.prefix[:1], member.artifacts[:1])
    deep, short = stage_logits(served.skeleton, served.tensors, [member, shallow], TEXTS)
    assert not np.array_equal(deep, short)


def test_concurrent_readers_get_their_own_answers(served: Served) -> None:
    expected = served.ensemble.logits(TEXTS[:6])
    found: list[bool] = []

    def read() -> None:
        found.extend(np.array_equal(served.ensemble.logits(TEXTS[:6]), expected) for _ in range(5))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


def test_only_verified_artefacts_of_the_recipe_are_taken(served: Served) -> None:
    digest, data = next(iter(served.world.artifacts.items()))
    fresh = StageTensors(served.skeleton.recipe)
    with pytest.raises(ArtifactDigestError):
        fresh.add(digest, data[:-1] + b"\x01")
    other = tiny_recipe(served.skeleton.recipe.backbone, seed=1)
    with pytest.raises(ArtifactDigestError, match="of recipe"):
        StageTensors(other).add(digest, data)
    assert fresh.digests() == frozenset()
    with pytest.raises(ArtifactDigestError, match="not in memory"):
        Ensemble(served.skeleton, fresh, served.assembly)
    with pytest.raises(RecipeError):
        Ensemble(Skeleton(other, served.skeleton.backbone), fresh, served.assembly)


def test_an_assembly_must_mean_the_artefacts_it_names(served: Served) -> None:
    first, second, third = served.assembly.members
    assert first is not None
    assert second is not None
    for wrong in (
        type(first)(first.stage, first.prefix, second.artifacts),
        type(first)(first.stage, first.prefix[::-1], first.artifacts),
        type(first)(first.stage, first.prefix[:1], first.artifacts[:1]),
    ):
        with pytest.raises(ArtifactDigestError):
            Ensemble(served.skeleton, served.tensors, Assembly(served.assembly.recipe, (wrong, second, third)))


def test_an_ancestor_on_other_records_is_not_the_one_that_is_meant(served: Served) -> None:
    """Under the same slices: as the stage was before a deletion."""
    first, second, third = served.assembly.members
    assert first is not None
    other = chain(served.skeleton.digest, 0, first.prefix, dict.fromkeys(first.prefix, "0" * 64))[0]
    data = served.world.engine.train(other, [], [])
    tensors = StageTensors(served.skeleton.recipe)
    for digest, artifact in (*served.world.artifacts.items(), (sha256_hex(data), data)):
        tensors.add(digest, artifact)
    wrong = type(first)(first.stage, first.prefix, (sha256_hex(data), *first.artifacts[1:]))
    with pytest.raises(ArtifactDigestError, match="stands on"):
        Ensemble(served.skeleton, tensors, Assembly(served.assembly.recipe, (wrong, second, third)))


def test_a_merged_adapter_is_watched_until_it_is_gone(served: Served) -> None:
    """It is a copy: the artefacts' own tensors may be gone while it still answers."""
    reader = StackedReader(served.skeleton.recipe, served.skeleton.backbone)
    for digest, data in served.world.artifacts.items():
        reader.load(digest, data)
    assembly = Assembly(served.assembly.recipe, served.assembly.members, "merged")
    ensembles = [reader.build(assembly) for _ in range(2)]
    watched = reader.drop(reader.held())
    assert any(reference() is not None for reference in watched)
    ensembles.pop()
    assert any(reference() is not None for reference in watched)
    ensembles.pop()
    gc.collect()
    assert not any(reference() is not None for reference in watched)


@pytest.mark.parametrize("aggregation", ["logits", "merged"])
def test_the_probe_meets_every_size_of_a_pass_and_the_widest_adapter(
    served: Served, aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[int, int]] = set()
    inner = Skeleton._upper

    def spied(self: Skeleton, members: Sequence[Member], batch: Batch, hidden: Tensor, start: int) -> Sequence[Tensor]:
        rank = max(down.shape[0] for down, _ in members[0].lora.values())
        seen.add((batch.rows, rank))
        return inner(self, members, batch, hidden, start)

    monkeypatch.setattr(Skeleton, "_upper", spied)
    recipe = dataclasses.replace(served.skeleton.recipe, aggregation=aggregation)
    Skeleton(recipe, served.skeleton.backbone)
    rank = recipe.lora.rank * (recipe.shards if aggregation == "merged" else 1)
    assert {(rows, rank) for rows in (1, 2, 4, 8, 16, 32)} <= seen


def test_discarded_tensors_are_gone(served: Served) -> None:
    tensors = StageTensors(served.skeleton.recipe)
    digest, data = next(iter(served.world.artifacts.items()))
    tensors.add(digest, data)
    tensors.add(digest, data)
    assert digest in tensors
    tensors.discard([digest, "unknown"])
    assert digest not in tensors


def test_without_live_shards_nothing_is_answered(served: Served) -> None:
    dead = Ensemble(served.skeleton, served.tensors, Assembly(served.assembly.recipe, (None, None, None)))
    with pytest.raises(ShardsError, match="rebuilt"):
        dead.logits(TEXTS)
    with pytest.raises(ValueError, match="no live shard"):
        mean_of_logits([])


def test_one_model_on_everything_trains_and_answers(served: Served) -> None:
    engine = served.world.engine
    records = [record for cell in served.world.cells.values() for record in cell]
    trained = engine.train_whole(records)
    assert engine.trunk.held_bytes == 0
    model = Monolithic(served.skeleton, served.tensors, trained)
    assert model.logits(TEXTS).shape == (37, 2)
    again = Monolithic(served.skeleton, served.tensors, engine.train_whole(records[::-1]))
    assert np.array_equal(model.logits(TEXTS), again.logits(TEXTS))


def test_buckets_end_in_the_longest_input() -> None:
    assert buckets(64) == (16, 32, 48, 64)
    assert buckets(50) == (16, 32, 48, 50)
    assert buckets(8) == (8,)


def test_a_short_prefix_runs_only_the_layers_that_it_trained(served: Served) -> None:
    """Below its lowest block a member is the base model, which runs once for all."""
    ran: Counter[int] = Counter()
    skeleton = Skeleton(served.skeleton.recipe, served.skeleton.backbone)
    for index, layer in enumerate(skeleton._window._layers):
        layer.register_forward_hook(lambda _m, _a, out, index=index: ran.update({index: len(out)}))
    deep, other, _ = served.assembly.members
    assert deep is not None
    assert other is not None
    short = type(other)(served.world.live[other.stage].parent or "", other.prefix[:1], other.artifacts[:1])
    for members, layers in (
        ((deep, other, None), {0: 4, 1: 4, 2: 8, 3: 8}),
        ((deep, short, None), {0: 4, 1: 4, 2: 8, 3: 8}),
        ((short, None, None), {0: 4, 1: 4, 2: 4, 3: 4}),
        ((short, None, short), {0: 4, 1: 4, 2: 4, 3: 8}),
    ):
        ran.clear()
        ensemble = Ensemble(skeleton, served.tensors, Assembly(served.assembly.recipe, members))
        found = ensemble.logits(TEXTS[:1] * 4)
        assert ran == layers
        each = [skeleton.logits([served.tensors.member(line)], TEXTS[:1])[0] for line in members if line]
        assert np.array_equal(found[:1], mean_of_logits(each))
        low = skeleton.prepare(TEXTS[:1])  # from the floor on, whatever a member's depth
        assert np.array_equal(found[:1], ensemble.answer(low))


# peft asks for a property that transformers has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_ensemble_answers_as_separate_peft_models(served: Served, tmp_path: Path) -> None:
    recipe = served.skeleton.recipe
    tolerance = 1e-5 if recipe.precision == "float32" else 0.05  # plain peft is not rounded at all
    tokens = AutoTokenizer.from_pretrained(recipe.pretrained.source)(
        TEXTS, padding=True, truncation=True, max_length=recipe.max_tokens, return_tensors="pt"
    )
    deep, other, third = served.assembly.members
    assert other is not None
    short = type(other)(served.world.live[other.stage].parent or "", other.prefix[:1], other.artifacts[:1])
    logits: list[np.ndarray] = []
    for number, line in enumerate(each for each in (deep, short, third) if each):
        own = merged.merge(
            [[merged.tensors_of(served.world.artifacts[digest]) for digest in line.artifacts]],
            merged.lora_scale(recipe),
        )
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "adapter_model.safetensors").write_bytes(merged.adapter_bytes(own))
        (directory / "adapter_config.json").write_bytes(merged.adapter_config(recipe, own))
        base = AutoModelForSequenceClassification.from_pretrained(recipe.pretrained.source, num_labels=2)
        model = PeftModel.from_pretrained(base, str(directory)).eval()
        with torch.inference_mode():
            logits.append(model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits.numpy())
    mixed = Ensemble(served.skeleton, served.tensors, Assembly(recipe.digest, (deep, short, third)))
    assert np.abs(mixed.logits(TEXTS) - np.mean(logits, axis=0)).max() < tolerance


def test_calls_in_company_have_the_bits_of_calls_alone(served: Served) -> None:
    """What the model server does: rows of any calls of one length in one pass."""
    alone = np.concatenate([served.ensemble.logits([text]) for text in TEXTS])
    found = np.zeros_like(alone)
    encoded = served.ensemble.encode(TEXTS)
    assert len({length for length, _ in encoded}) > 1
    for wanted in {length for length, _ in encoded}:
        places = [place for place, (length, _) in enumerate(encoded) if length == wanted]
        for at in range(0, len(places), 7):
            found[places[at : at + 7]] = served.ensemble.infer([encoded[place][1] for place in places[at : at + 7]])
    assert np.array_equal(found, alone)


def test_what_another_version_computed_is_not_computed_again(served: Served) -> None:
    """A swap in the midst of a request costs the members that changed, and the bits are those of a new request."""
    ran: Counter[int] = Counter()
    skeleton = Skeleton(served.skeleton.recipe, served.skeleton.backbone)
    top = skeleton._window._layers[-1]
    top.register_forward_hook(lambda _m, _a, out: ran.update({0: len(out)}))
    deep, other, _ = served.assembly.members
    assert deep is not None
    assert other is not None
    short = type(other)(served.world.live[other.stage].parent or "", other.prefix[:1], other.artifacts[:1])
    recipe = served.assembly.recipe
    before, after = (
        Ensemble(skeleton, served.tensors, Assembly(recipe, (deep, each, None))) for each in (other, short)
    )
    texts = [TEXTS[0], TEXTS[0], TEXTS[0]]
    encoded = [each for _, each in skeleton.encode(texts)]
    known: list[Known] = [{} for _ in encoded]
    found = before.infer(encoded[:2], known[:2])
    assert np.array_equal(found, before.logits(texts[:2]))
    ran.clear()
    again = after.infer(encoded, known)  # the third is new
    assert ran == {0: 2 * 1 + 1 * 2}
    assert all(own.keys() == {deep, short} for own in known)  # nothing of who is out of service is kept
    assert np.array_equal(again, after.logits(texts))
    ran.clear()
    assert np.array_equal(after.infer(encoded, known), again)
    assert not ran
