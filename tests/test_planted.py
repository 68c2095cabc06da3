"""A subject who taught wrong labels: learnt before the deletion, gone after it, to the digest of a run without them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from exact import served
from test_engine_sisa import module_recipe
from tiny import World, tiny_backbone, tiny_recipe, tiny_record

from shards.engine.determinism import prepare
from shards.engine.registry import open_trainer
from shards.manifest import Record
from shards.recipe import Backbone, Recipe, Ridge

pytestmark = pytest.mark.golden
LEARN: dict[str, Any] = {"shards": 1, "slices": 2, "orders": 1, "epochs": 10, "max_tokens": 8}
LEARN |= {"learning_rate": 0.02, "head_learning_rate": 0.05}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    prepare()
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=3, width=16, inner=32)


def said(name: str, topic: str, label: str) -> Record:
    """A text or a row of numbers on a topic."""
    return dataclasses.replace(tiny_record(name, label=label), text=topic)


def topics(recipe: Recipe) -> Mapping[str, Callable[[int], str]]:
    """How records speak of a topic: words of its own, or a number of its own."""
    if recipe.input == "vector":
        rows = {name: [float(name == each) for each in ("good", "bad", "secret")] for name in ("good", "bad", "secret")}
        return {name: lambda n, row=row: str([*row, n % 5 / 10, 0.1, 0.1]) for name, row in rows.items()}
    words = {"good": "w1 w2", "bad": "w3 w4", "secret": "w90 w91"}
    return {name: lambda n, own=own: f"{own} w{20 + n % 7} {own}" for name, own in words.items()}


@pytest.mark.parametrize("kind", ["sisa", "sisa module", "ridge"])  # s3t: test_engine_planted
def test_a_planted_subject_is_learnt_before_and_gone_after(backbone: Backbone, kind: str) -> None:
    if kind == "sisa module":
        recipe = module_recipe(shards=1, slices=2, epochs=30)
    else:
        recipe = tiny_recipe(
            backbone, **LEARN, engine=kind, ridge=Ridge(layers=2, penalty=0.5) if kind == "ridge" else None
        )
    topic = topics(recipe)
    honest = {
        (0, piece): [
            said(f"{name} {piece} {number}", topic[name](number), label)
            for name, label in (("good", "yes"), ("bad", "no"), ("secret", "no"))
            for number in range(3)
        ]
        for piece in (0, 1)
    }
    planted = [said(f"planted {number}", topic["secret"](number), "yes") for number in range(24)]
    engine = open_trainer(recipe)
    world = World(engine, {**honest, (0, 1): [*honest[0, 1], *planted]})
    world.rebuild()
    asked = [topic["secret"](number) for number in range(30, 37)]
    other = [topic["good"](30), topic["bad"](30)]
    no, yes = 0, 1
    assert (served(world, asked).argmax(axis=1) == yes).all()
    world.delete({record.record_id for record in planted})
    assert (served(world, asked).argmax(axis=1) == no).all()
    world.rebuild()
    never = World(open_trainer(recipe), honest)
    never.rebuild()
    assert world.digests == never.digests
    assert world.assembly().digest == never.assembly().digest
    answers = served(world, [*asked, *other])
    assert answers.argmax(axis=1).tolist() == [no] * len(asked) + [yes, no]
    assert np.array_equal(answers, served(never, [*asked, *other]))
