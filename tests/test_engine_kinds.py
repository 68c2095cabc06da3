"""Ten kinds of backbone, three tasks, one mechanism: each trained in blocks, served, and compared with plain peft."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tiny import manifest_root
from tiny_kinds import KINDS, Kind

from shards.assembly import Assembly, Member
from shards.digest import sha256_hex
from shards.engine.artifacts import decode
from shards.engine.backbone import Backbone
from shards.engine.determinism import prepare
from shards.engine.ensemble import Ensemble
from shards.engine.inputs import Images
from shards.engine.interface import Input, inputs_of
from shards.engine.prompts import Prompts
from shards.engine.s3t import S3T
from shards.engine.skeleton import Skeleton
from shards.engine.stacked import StackedReader
from shards.engine.window import Batch, Window, same_bits
from shards.manifest import Record
from shards.recipe import Recipe
from shards.stages import Stage, chain

pytestmark = [
    pytest.mark.golden,
    # Of the plain peft model: it asks for a property that transformers renamed, and sees a Conv1D and says so.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out"),
]


class Trained:
    """Two stages of one kind."""

    def __init__(self, kind: Kind, directory: Path) -> None:
        prepare()
        self.kind = kind
        self.directory = directory
        self.recipe: Recipe = kind.recipe(kind.save(directory))
        self.engine = S3T(self.recipe)
        self.backbone = self.engine.backbone
        self.cells = {0: kind.records(6, "a"), 1: kind.records(5, "b")}
        self.stages = chain(
            self.recipe.digest, 0, (0, 1), {piece: manifest_root(records) for piece, records in self.cells.items()}
        )
        self.artifacts = self.train(self.engine)

    def train(self, engine: S3T, parents: Sequence[bytes] = ()) -> list[bytes]:
        artifacts = list(parents)
        for stage in self.stages[len(parents) :]:
            artifacts.append(engine.train(stage, self.read_by(stage), artifacts))
        return artifacts

    def read_by(self, stage: Stage) -> list[Record]:
        return [record for piece in stage.prefix for record in self.cells[piece]]

    @cached_property
    def reader(self) -> StackedReader:
        reader = StackedReader(self.recipe, self.backbone)
        for data in self.artifacts:
            reader.load(sha256_hex(data), data)
        return reader

    @cached_property
    def ensemble(self) -> Ensemble:
        member = Member(self.stages[1].key, (0, 1), tuple(map(sha256_hex, self.artifacts)))
        return self.reader.build(Assembly(self.recipe.digest, (member,)))

    @cached_property
    def inputs(self) -> list[Input]:
        return inputs_of(self.recipe, self.kind.records(13, "q"))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(request.param, tmp_path_factory.mktemp(request.param.name))


def test_the_layers_are_found_by_structure(trained: Trained) -> None:
    assert (trained.backbone.layers, trained.backbone.depth) == (trained.kind.layers, 4)
    assert bool(trained.backbone.heads) == (trained.kind.task != "completion")
    assert trained.backbone.as_tuple == (trained.kind.name == "deberta")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_injected_equals_full_forward(trained: Trained, precision: str) -> None:
    found = Backbone.load(trained.kind.recipe(trained.recipe.pretrained, precision=precision))
    window = Window(found.replica(), found.layers, as_tuple=found.as_tuple)
    batch = found.made_up(5, found.lengths[-1])
    with torch.no_grad(), found.autocast():
        full = window.logits(batch)
        states = window.states(batch, [0, 1, 2, 3])
        for boundary, hidden in states.items():
            assert same_bits(window.logits(batch, boundary, hidden), full)
            assert same_bits(window.states(batch, [3], boundary, hidden)[3], states[3])
        window.learn_entry(batch)
        for boundary, hidden in states.items():  # the embeddings' output is not needed, so they do not run
            assert same_bits(_without_entry(window, batch, boundary, hidden), full)
        assert same_bits(window.logits(batch), full)
        plain = found.model(**batch.inputs).logits
    assert full.shape == (5, found.outputs)
    if batch.keep is not None:
        plain = plain[batch.keep]
    torch.testing.assert_close(full, plain)


def _without_entry(window: Window, batch: Batch, boundary: int, hidden: torch.Tensor) -> torch.Tensor:
    entry = window._entry
    assert entry is not None
    kind: Any = type(entry)
    original = kind.forward

    def refuse(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert module is not entry
        return original(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", refuse)
        return window.logits(batch, boundary, hidden)


def test_gradients_reach_the_block_and_the_head_and_nothing_else(trained: Trained) -> None:
    engine = S3T(trained.recipe, trained.backbone)
    before = {name: tensor.clone() for name, tensor in trained.backbone.model.named_parameters()}
    assert trained.train(engine, trained.artifacts[:1]) == trained.artifacts
    adapters = engine._adapters
    reached = {name for name, tensor in adapters.model.named_parameters() if tensor.grad is not None}
    exported = {name.replace(".default.", ".").replace(".modules_to_save.", ".") for name in reached}
    block = adapters.block(2, 3)
    assert {f"base_model.model.{name}" for name in exported} == block.keys() | adapters.head.keys()
    first, second = map(decode, trained.artifacts)
    assert second.lora.keys() == block.keys()
    assert all(tensor.any() for name, tensor in second.lora.items() if ".lora_B." in name)
    assert all(torch.equal(adapters.block(3, 4)[name], tensor) for name, tensor in first.lora.items())
    now = dict(trained.backbone.model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_training_twice_gives_the_same_bytes(trained: Trained) -> None:
    torch.manual_seed(5)
    other = S3T(trained.recipe, cache_bytes=0)
    assert trained.train(other) == trained.artifacts
    assert other.trunk.held_bytes == 0
    assert other.purity == "batched"


def test_the_reader_answers_like_plain_peft(trained: Trained) -> None:
    model = plain_peft(trained)
    found = trained.ensemble.logits(trained.inputs)
    expected = np.concatenate([alone(trained, model, each) for each in trained.inputs])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".lora_B." in name:
                tensor.zero_()
    untrained = np.concatenate([alone(trained, model, each) for each in trained.inputs])
    assert np.abs(untrained - expected).max() > 1e-4, "the adapters decide the answers"


def test_an_answer_depends_on_its_own_input_alone(trained: Trained) -> None:
    together = trained.ensemble.logits(trained.inputs)
    assert trained.reader._skeleton.purity == "batched"
    backwards = trained.ensemble.logits(trained.inputs[::-1])[::-1]
    assert np.array_equal(together, backwards)
    for size in (1, 2, 5):
        for at in range(0, len(trained.inputs), size):
            assert np.array_equal(trained.ensemble.logits(trained.inputs[at : at + size]), together[at : at + size])


def test_members_in_one_pass_answer_as_each_alone(trained: Trained) -> None:
    skeleton = trained.reader._skeleton
    members = skeleton.made_up(3)
    top = max(skeleton._layer_of.values())
    members[1] = replace(members[1], lora={n: p for n, p in members[1].lora.items() if skeleton._layer_of[n] == top})
    together = skeleton.logits(members, trained.inputs)
    assert not np.array_equal(together[0], together[2])
    for member, found in zip(members, together, strict=True):
        assert np.array_equal(skeleton.logits([member], trained.inputs)[0], found)
    assert skeleton._group(3) == 3
    if trained.backbone.model.config.model_type == "deberta-v2":  # one input of positions for all rows
        recipe = replace(trained.recipe, lora=replace(trained.recipe.lora, targets=("pos_key_proj",)))
        apart = Skeleton(recipe, trained.backbone)
        assert apart.purity == "batched"
        assert apart._group(3) == 1
        members = apart.made_up(2)
        for member, found in zip(members, apart.logits(members, trained.inputs), strict=True):
            assert np.array_equal(apart.logits([member], trained.inputs)[0], found)


def plain_peft(trained: Trained) -> Any:
    """The same tensors in a model that Expunge has not touched: loaded by transformers and peft alone."""
    kinds = {"completion": "AutoModelForCausalLM", "image": "AutoModelForImageClassification"}
    name = kinds.get(trained.recipe.task) or kinds.get(trained.recipe.input) or "AutoModelForSequenceClassification"
    labels = {} if trained.recipe.task == "completion" else {"num_labels": trained.recipe.outputs}
    base = getattr(transformers, name).from_pretrained(trained.directory, **labels)
    lora = trained.recipe.lora
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        layers_to_transform=[2, 3],
        layers_pattern=trained.kind.layers.rpartition(".")[2],
        modules_to_save=list(trained.backbone.heads) or None,
    )
    model = peft.get_peft_model(base, config).eval()
    tensors: Mapping[str, torch.Tensor] = {}
    for data in trained.artifacts:
        tensors = {**tensors, **decode(data).tensors}
    result = peft.set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    return model


def alone(trained: Trained, model: Any, given: Input) -> NDArray[np.float32]:
    """The answer to one input, without padding."""
    backbone = trained.backbone
    codec = backbone.codec
    encoded = backbone.encode([given])
    if isinstance(codec, Images):
        inputs = {"pixel_values": torch.stack([each.pixels for each in encoded if each.pixels is not None])}
    else:
        ids = torch.tensor([encoded[0].ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model.config.pad_token_id = 0
    with torch.no_grad():
        logits = model(**inputs).logits
    return (logits[:, -1] if isinstance(codec, Prompts) else logits).numpy()
