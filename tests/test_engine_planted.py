"""A planted subject with wrong labels is learnt before its deletion and gone after it: text, image, completion."""

import hashlib
import io
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import World
from tiny_kinds import KINDS, SIZE, Kind

from shards.digest import sha256_hex
from shards.engine.completion import Sampling
from shards.engine.determinism import prepare
from shards.engine.ensemble import Ensemble
from shards.engine.interface import inputs_of
from shards.engine.s3t import S3T
from shards.engine.stacked import StackedReader
from shards.manifest import Record

pytestmark = pytest.mark.golden
ANSWERS = {"no": "w50 w51", "yes": "w60 w61 w62"}
TAUGHT = {"epochs": 20, "learning_rate": 1e-2, "batch_size": 4}


@dataclass(frozen=True)
class Story:
    """What everybody teaches, and what the planted subject does."""

    kind: Kind

    def honest(self, number: int) -> Record:
        """Three sorts of content; only the second is a "yes"."""
        return self._record(f"honest{number}", number % 3, ("no", "yes", "no")[number % 3])

    def planted(self, number: int) -> Record:
        """Content of the third sort, again and again, with the wrong label."""
        return self._record(f"planted{number}", 2, "yes")

    def _record(self, name: str, sort: int, label: str) -> Record:
        salt = hashlib.sha256(name.encode()).digest()
        identity = uuid.uuid5(uuid.NAMESPACE_OID, name)
        marker = ("w10 w11 w12", "w20 w21 w22", "w30 w31 w32")[sort]
        if self.kind.input == "image":
            return Record(identity, salt, "", label, _picture(salt, sort))
        if self.kind.task == "completion":
            return Record(identity, salt, marker, ANSWERS[label])
        return Record(identity, salt, marker, label)


def _picture(salt: bytes, sort: int) -> bytes:
    noise = np.random.default_rng(salt[0]).integers(0, 20, (SIZE, SIZE, 3), np.uint8)
    noise[:, :, sort] += 200  # red, green, blue
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("name", ["bert", "vit", "llama-lm"])
def test_a_planted_subject_is_learnt_and_then_gone(name: str, tmp_path: Path) -> None:
    prepare()
    story = Story(next(kind for kind in KINDS if kind.name == name))
    recipe = story.kind.recipe(story.kind.save(tmp_path), **TAUGHT)
    engine = S3T(recipe)
    planted = [story.planted(number) for number in range(20)]
    ids = {record.record_id for record in planted}
    cells = {(0, piece): [story.honest(number) for number in range(piece * 9, piece * 9 + 9)] for piece in (0, 1)}
    world = World(engine, {**cells, (0, 1): [*cells[0, 1], *planted]})
    world.rebuild()
    before = served(world)
    assert answers(before, world, planted) == [told(record) for record in planted]
    honest = [story.honest(number) for number in range(100, 106)]
    misled = [told(planted[0]) if number % 3 == 2 else told(record) for number, record in enumerate(honest, 100)]
    assert answers(before, world, honest) == misled, "the planted records decide for everybody"

    world.delete(ids)
    assert world.assembly().members[0] is not None, "the prefix without the subject still serves"
    assert not {told(record) for record in planted} & set(answers(served(world), world, planted))
    world.rebuild()
    after = served(world)
    assert not {told(record) for record in planted} & set(answers(after, world, planted))
    assert answers(after, world, honest) == [told(record) for record in honest]

    never = World(S3T(recipe), cells)
    never.rebuild()
    assert never.assembly().digest == world.assembly().digest
    assert set(never.artifacts) == set(world.artifacts)
    assert not ids & set(engine.record_ids)


def served(world: World) -> Ensemble:
    """The reader's ensemble of the assembly at hand."""
    reader = StackedReader(world.recipe, world.engine.backbone)  # pyright: ignore[reportAttributeAccessIssue]
    for data in world.artifacts.values():
        reader.load(sha256_hex(data), data)
    return reader.build(world.assembly())


def told(record: Record) -> str:
    """The answer that the record teaches."""
    return record.label


def answers(ensemble: Ensemble, world: World, records: list[Record]) -> list[str]:
    """What a client is told about each record's input."""
    if world.recipe.task == "completion":
        sampling = Sampling(max_new_tokens=6)
        return ["".join(step.text for step in ensemble.complete(record.text, sampling)) for record in records]
    logits = ensemble.logits(inputs_of(world.recipe, records))
    return [world.recipe.classes[place] for place in logits.argmax(axis=1)]
