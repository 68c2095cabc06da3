from pathlib import Path

import pytest
import torch
from tiny import tiny_backbone, tiny_recipe
from torch import nn

from shards.engine import backbone as module
from shards.engine.backbone import Backbone
from shards.engine.files import backbone_digest, locate
from shards.engine.linears import RowLinear, SequenceLinear
from shards.engine.s3t import S3T
from shards.engine.window import Window, same_bits
from shards.errors import BackboneError, RecipeError
from shards.recipe import Lora

pytestmark = pytest.mark.golden


def test_the_digest_covers_config_tokenizer_and_weights_and_nothing_else(tmp_path: Path) -> None:
    entry = tiny_backbone(tmp_path)
    (tmp_path / "README.md").write_text("not counted")
    assert backbone_digest(tmp_path) == entry.digest
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before + b" ")
        assert backbone_digest(tmp_path) != entry.digest
        (tmp_path / name).write_bytes(before)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="safetensors"):
        backbone_digest(tmp_path)


def test_another_backbone_than_the_recipes_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_backbone(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BackboneError, match="the recipe names"):
        Backbone.load(recipe)


def test_what_is_not_there_is_said_with_what_to_do() -> None:
    with pytest.raises(BackboneError, match="hf download nobody/nothing"):
        locate("nobody/nothing")


def test_more_blocks_than_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="lower slices"):
        Backbone.load(tiny_recipe(tiny_backbone(tmp_path), slices=3, layers_per_slice=2))


def test_targets_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="q_proj"):
        S3T(tiny_recipe(tiny_backbone(tmp_path), lora=Lora(targets=("q_proj",))))


def test_layers_and_head_are_found_by_structure(tmp_path: Path) -> None:
    found = Backbone.load(tiny_recipe(tiny_backbone(tmp_path, layers=12)))
    assert (found.layers, found.depth, found.heads) == ("bert.encoder.layer", 12, ("classifier",))
    assert found.layer_index("bert.encoder.layer.1.output.dense") == 1
    assert found.layer_index("bert.encoder.layer.11.output.dense") == 11
    assert found.layer_index("bert.pooler.dense") is None


def test_replicas_share_weights_and_nothing_else(tmp_path: Path) -> None:
    found = Backbone.load(tiny_recipe(tiny_backbone(tmp_path)))
    one, two = found.replica(), found.replica()
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    assert all(left.data_ptr() == right.data_ptr() for left, right in pairs)
    one.classifier = nn.Identity()
    assert isinstance(two.classifier, RowLinear)


def test_few_rows_are_filled_up_outside_the_layers() -> None:
    linear = nn.Linear(8, 3)
    wide = RowLinear(8, 3)
    wide.load_state_dict(linear.state_dict())
    rows = torch.randn(33, 8)
    whole = wide(rows)
    torch.testing.assert_close(whole, linear(rows))
    assert all(same_bits(wide(rows[:count]), whole[:count]) for count in range(1, 33))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_injected_equals_full_forward(tmp_path: Path, precision: str) -> None:
    found = Backbone.load(tiny_recipe(tiny_backbone(tmp_path), precision=precision))
    window = Window(found.replica(), found.layers, as_tuple=found.as_tuple)
    batch = found.collate(found.encode(["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]), 16)
    with torch.no_grad(), found.autocast():
        full = window.logits(batch)
        states = window.states(batch, [0, 1, 2, 3])
        for boundary, hidden in states.items():
            assert same_bits(window.logits(batch, boundary, hidden), full)
            upwards = window.states(batch, [3], boundary, hidden)[3]
            assert same_bits(upwards, states[3])
        assert same_bits(window.logits(batch), full)


def test_matrices_that_depend_on_rows_are_multiplied_one_sequence_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Backbone.load(tiny_recipe(tiny_backbone(tmp_path)))
    batch = found.collate(found.encode(["w1 w2 w3", "w4"]), 16)
    with torch.no_grad():
        plain = found.model(**batch.inputs).logits
        monkeypatch.setattr(module, "depends_on_rows", lambda linear, *_: linear.in_features == 64)
        pure = found.pure_replica([16], 8)
        kinds = {name for name, part in pure.named_modules() if isinstance(part, SequenceLinear)}
        assert kinds == {f"bert.encoder.layer.{index}.output.dense" for index in range(4)}
        torch.testing.assert_close(pure(**batch.inputs).logits, plain)


def test_texts_are_cut_and_padded_on_the_right(tmp_path: Path) -> None:
    found = Backbone.load(tiny_recipe(tiny_backbone(tmp_path), max_tokens=8))
    encoded = found.encode(["w1", "w1 " * 50])
    assert [found.length(each) for each in encoded] == [3, 8]
    batch = found.collate(encoded, 8)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [3, 8]
    assert batch.inputs["input_ids"][0, 3:].tolist() == [0] * 5
    assert found.encode([]) == []
