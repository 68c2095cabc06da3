"""Images, regressions and backbones that do not fit: what is read how, and what is refused with which words."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import tiny_backbone, tiny_recipe, tiny_record, tiny_records
from tiny_kinds import KINDS, SIZE, tiny_image
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shards.assembly import Assembly, Member
from shards.digest import sha256_hex
from shards.engine import structure
from shards.engine.backbone import Backbone
from shards.engine.determinism import prepare
from shards.engine.files import backbone_digest
from shards.engine.inputs import Images, Texts
from shards.engine.interface import Input
from shards.engine.memory import enough_memory
from shards.engine.s3t import S3T
from shards.engine.stacked import StackedReader
from shards.engine.structure import layer_list
from shards.engine.tasks import in_units, loss, targets
from shards.errors import BackboneError, DivergedError, MemoryShortageError, RecipeError
from shards.recipe import Backbone as Entry
from shards.recipe import Lora, Recipe, Scale
from shards.stages import Stage, chain

pytestmark = pytest.mark.golden
VIT = next(kind for kind in KINDS if kind.name == "vit")
NOWHERE = Entry(source="", digest="d" * 64)
SCALE = Scale(offset=100.0, spread=20.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    prepare()
    VIT.save(directory := tmp_path_factory.mktemp("vit"))
    return Images(directory, torch.device("cpu"))


def test_an_image_is_read_alone_and_to_one_size(images: Images) -> None:
    files: list[Input] = [tiny_image("a"), tiny_image("b", "JPEG"), tiny_image("c")]
    together = images.encode(files)
    assert [tuple(each.pixels.shape) for each in together if each.pixels is not None] == [(3, SIZE, SIZE)] * 3
    for file, encoded in zip(files, together, strict=True):
        (alone,) = images.encode([file])
        assert alone.pixels is not None
        assert encoded.pixels is not None
        assert torch.equal(alone.pixels, encoded.pixels)


def test_grey_transparent_and_turned_images_are_read_as_they_look(images: Images) -> None:
    grey = Image.new("L", (8, 8), 128)
    clear = Image.new("RGBA", (8, 8), (128, 128, 128, 255))
    pixels = [images.encode([png(image)])[0].pixels for image in (grey, clear)]
    assert torch.equal(pixels[0], pixels[1])  # pyright: ignore[reportArgumentType]
    half = Image.new("RGB", (SIZE, SIZE))
    half.paste((255, 255, 255), (0, 0, SIZE // 2, SIZE))
    turned = half.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 270 degrees
    upright = images.encode([png(half)])[0].pixels
    assert torch.equal(images.encode([png(turned, exif=exif)])[0].pixels, upright)  # pyright: ignore[reportArgumentType]


def png(image: Image.Image, **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **more)
    return out.getvalue()


@pytest.mark.parametrize("data", [b"", b"secret", tiny_image("a")[:200], b"GIF89a" + bytes(40)])
def test_what_is_no_image_is_refused_without_quoting_it(images: Images, data: bytes) -> None:
    with pytest.raises(RecipeError, match="PNG or JPEG") as caught:
        images.encode([data])
    assert "secret" not in str(caught.value)


def test_an_image_of_too_many_pixels_is_refused(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(RecipeError, match=r"more than 100 pixels|DecompressionBomb"):
        images.encode([tiny_image("a")])


def test_the_image_processor_counts_in_the_digest(tmp_path: Path) -> None:
    entry = VIT.save(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.5", "0.4"))
    assert backbone_digest(tmp_path) != entry.digest
    file.unlink()
    with pytest.raises(BackboneError, match="image processor"):
        Backbone.load(VIT.recipe(Entry(source=str(tmp_path), digest=backbone_digest(tmp_path))))


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    VIT.save(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"do_resize": true', '"do_resize": false'))
    with pytest.raises(BackboneError, match="several sizes"):
        Images(tmp_path, torch.device("cpu"))


def test_pixels_are_not_kept_beside_hidden_states(tmp_path: Path) -> None:
    prepare()
    engine = S3T(VIT.recipe(VIT.save(tmp_path)))
    records = VIT.records(5, "a")
    engine.trunk.warm(records, engine.trunk.boundaries[0])
    _, batch = engine.trunk.rows([record.record_id for record in records], engine.trunk.boundaries[0])
    assert not batch.inputs["pixel_values"].any()
    engine.forget(record.record_id for record in records[1:])
    assert engine.record_ids == [records[0].record_id]


def regression(entry: Entry, **changes: Any) -> Recipe:
    return tiny_recipe(entry, task="regression", classes=(), shards=1, orders=1, **changes)


def test_a_regression_learns_on_its_scale_and_answers_in_its_unit(tmp_path: Path) -> None:
    prepare()
    recipe = regression(tiny_backbone(tmp_path), scale=SCALE, epochs=60, learning_rate=1e-2)
    engine = S3T(recipe)
    records = [tiny_record(f"r{n}", ["w1" if n % 2 else "w2"], "140.5" if n % 2 else "6e1") for n in range(8)]
    stage = chain(recipe.digest, 0, (0,), {0: "0" * 64})[0]
    data = engine.train(stage, records, [])
    reader = StackedReader(recipe, engine.backbone)
    reader.load(sha256_hex(data), data)
    ensemble = reader.build(Assembly(recipe.digest, (Member(stage.key, (0,), (sha256_hex(data),)),)))
    assert ensemble.logits(["w1", "w2"]).shape == (2, 1)
    np.testing.assert_allclose(ensemble.logits(["w1", "w2"])[:, 0], [140.5, 60.0], atol=5)


def test_numbers_are_read_strictly_and_never_quoted() -> None:
    plain, scaled = regression(NOWHERE), regression(NOWHERE, scale=SCALE)
    record = tiny_record("r", label="1.5e2")
    assert targets(plain, [record]) == {record.record_id: 150.0}
    assert targets(scaled, [record]) == {record.record_id: 2.5}
    for label in ("nan", "inf", "-Infinity", "1_000", "", "12 kg", "0x10", "1,5", "\u0661"):
        with pytest.raises(RecipeError, match="no finite decimal number") as caught:
            targets(plain, [replace(record, label=label)])
        assert not label or label not in str(caught.value).replace("finite", "")


def test_the_loss_of_a_regression_is_on_the_declared_scale() -> None:
    logits = torch.tensor([[2.0], [0.0]])
    assert loss(regression(NOWHERE, scale=SCALE), logits, [1.0, 0.0]).item() == 0.5
    assert in_units(regression(NOWHERE, scale=SCALE), logits.numpy()).tolist() == [[140.0], [100.0]]
    assert in_units(regression(NOWHERE), logits.numpy()) is not None


def test_trunk_layers_must_be_what_the_blocks_leave(tmp_path: Path) -> None:
    entry = tiny_backbone(tmp_path)
    assert Backbone.load(tiny_recipe(entry, trunk_layers=2)).depth == 4
    with pytest.raises(RecipeError, match="trunk_layers is 3, but of 4 layers 2 slices of 1 leave 2"):
        Backbone.load(tiny_recipe(entry, trunk_layers=3))


def test_targets_that_are_not_there_are_named_with_those_that_are(tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_backbone(tmp_path), lora=Lora(targets=("query", "q_proj")))
    for build in (S3T, StackedReader):
        with pytest.raises(RecipeError, match=r"\['q_proj'\] are no linear .* 'attention.self.query'"):
            build(recipe)


class Pair(nn.Module):
    """Two lists of the config's length, or one of several kinds of layer."""

    def __init__(self, *lists: list[nn.Module]) -> None:
        super().__init__()
        self.config = transformers.BertConfig(num_hidden_layers=2)
        for name, layers in zip("ab", lists, strict=False):
            self.add_module(name, nn.ModuleList(layers))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Pair([nn.Linear(2, 2), nn.Linear(2, 2)], [nn.GELU(), nn.GELU()]),
        lambda: Pair([nn.Linear(2, 2), nn.GELU()]),
        lambda: Pair([nn.Linear(2, 2)]),
    ],
)
def test_where_structure_does_not_decide_the_lists_are_named_and_one_can_be_chosen(
    make: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackboneError, match=r"among its module lists: a \(\d\).*model_type 'bert'"):
        layer_list(make())
    monkeypatch.setitem(structure.LAYERS, "bert", "a")
    assert layer_list(make())[0] == "a"


def stage_of(recipe: Recipe) -> Stage:
    return chain(recipe.digest, 0, (0,), {0: "0" * 64})[0]


def test_a_loss_that_is_no_number_fails_the_stage_with_its_step(tmp_path: Path) -> None:
    prepare()
    recipe = tiny_recipe(tiny_backbone(tmp_path), learning_rate=1e30, head_learning_rate=1e30, epochs=3)
    engine = S3T(recipe)
    with pytest.raises(DivergedError, match=r"no longer a number at step [23] \(learning_rate 1e\+30"):
        engine.train(stage_of(recipe), tiny_records(6), [])


def test_memory_that_runs_out_is_said_in_the_recipes_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare()
    recipe = tiny_recipe(tiny_backbone(tmp_path))
    engine = S3T(recipe)
    monkeypatch.setattr(engine.trunk, "rows", lambda *_: torch.empty(2**60))
    with pytest.raises(MemoryShortageError, match=r"batch_size, max_tokens, layers_per_slice or lora\.rank") as caught:
        engine.train(stage_of(recipe), tiny_records(6), [])
    assert caught.value.__cause__ is None
    context = caught.value.__context__
    assert context is not None
    assert context.__traceback__ is None, "it would keep the tensors"
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(MemoryShortageError), enough_memory(recipe, "testing"):
            raise error
    with pytest.raises(RuntimeError, match="other"), enough_memory(recipe, "testing"):
        raise RuntimeError("other")


def test_a_tokenizer_remembers_no_words(tmp_path: Path) -> None:
    """A remembered word is told by its old tokens, once the tokenizer's unknown token is another."""
    backbone = tiny_backbone(tmp_path)
    model = models.BPE({"[A]": 0, "[B]": 1, "a": 2}, [], unk_token="[A]")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="[A]").save_pretrained(tmp_path)

    def again(tokenizer: Any) -> list[str]:
        tokenizer(["axa"])
        words = tokenizer.backend_tokenizer.model
        words.unk_token = "[B]"
        return [token.value for token in words.tokenize("axa")]

    assert again(AutoTokenizer.from_pretrained(tmp_path)) == ["a", "[A]", "a"]
    texts = Texts(tmp_path, tiny_recipe(backbone), 3, torch.device("cpu"))
    assert again(texts.tokenizer) == ["a", "[B]", "a"]
