"""Recipes and data that cannot work: each is refused, or does something sensible, and says what to do next."""

import dataclasses
import itertools
import json
import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from api_client import RECIPE, Api
from exact import served, train_chain
from test_engine_sisa import module_recipe, vector_record
from tiny import WORDS, World, tiny_backbone, tiny_recipe, tiny_record, tiny_records
from torch.nn.modules.module import register_module_forward_pre_hook

from shards.engine.artifacts import decode
from shards.engine.determinism import prepare
from shards.engine.interface import inputs_of
from shards.engine.registry import open_reader, open_trainer
from shards.errors import BackboneError, DivergedError, MemoryShortageError, RecipeError, ShardsError
from shards.plan import canonical
from shards.recipe import Backbone, Recipe, Ridge

pytest_plugins = ("api_fixtures",)
KINDS = ("s3t", "sisa", "sisa module", "ridge")
TEXTS = [" ".join(WORDS[(5 * row + word) % 96] for word in range(2 + row % 9)) for row in range(8)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    prepare()
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2, width=16, inner=32)


def recipe_of(kind: str, backbone: Backbone, **changes: Any) -> Recipe:
    if kind == "sisa module":
        recipe = module_recipe(**({"slices": 2} | changes))
        own = dataclasses.replace(recipe.module, arguments={"outputs": recipe.outputs})  # type: ignore[type-var]
        return dataclasses.replace(recipe, module=own)
    own = {"ridge": Ridge(layers=2, bits=6, clip=4.0)} if kind == "ridge" else {}
    return tiny_recipe(backbone, **({"engine": kind, "orders": 2 if kind == "s3t" else 1} | own | changes))


def made(recipe: Recipe, name: str, label: str) -> Any:
    return (vector_record if recipe.input == "vector" else tiny_record)(name, label=label)


@pytest.mark.golden
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_seen_only_in_deleted_records_keeps_its_logit(backbone: Backbone, kind: str) -> None:
    rates = {"learning_rate": 0.02, "head_learning_rate": 0.05}
    recipe = recipe_of(kind, backbone, classes=("no", "rare", "yes"), epochs=12, **rates)
    places = list(itertools.product(range(2), range(2)))
    common = {place: [made(recipe, f"{place} {n}", "yes") for n in range(4)] for place in places}
    rare = [made(recipe, f"rare {number}", "rare") for number in range(3)]
    world = World(open_trainer(recipe), {**common, (1, 1): [*common[1, 1], *rare]})
    world.rebuild()
    world.delete({record.record_id for record in rare})
    inputs = inputs_of(recipe, [record for records in common.values() for record in records])
    assert served(world, inputs).shape == (16, 3)
    world.rebuild()
    never = World(open_trainer(recipe), common)
    never.rebuild()
    assert world.digests == never.digests
    assert canonical(world.assembly(), recipe, world.roots)
    found = served(world, inputs)
    assert found.shape == (16, 3)
    assert np.isfinite(found).all()
    assert (found.argmax(axis=1) == 2).all()  # and the others keep their places


@pytest.mark.golden
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_slice_and_an_empty_shard_train_as_they_begin(backbone: Backbone, kind: str) -> None:
    recipe = recipe_of(kind, backbone, epochs=8)
    full = [made(recipe, f"r{number}", ("no", "yes")[number % 2]) for number in range(8)]
    world = World(open_trainer(recipe), {(0, 0): [], (0, 1): full, (1, 0): [], (1, 1): []})
    world.rebuild()
    assert canonical(world.assembly(), recipe, world.roots)
    again = World(open_trainer(recipe), world.cells)
    again.rebuild()
    assert again.digests == world.digests
    for key, stage in world.live.items():
        tensors = decode(world.artifacts[world.digests[key]]).tensors
        if kind == "s3t" and (stage.shard or stage.prefix == (0,)):
            assert not any(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name)
        if kind == "ridge":
            assert int(tensors["count"]) == (8 if (stage.shard, stage.prefix) == (0, (1,)) else 0)
    inputs = inputs_of(recipe, full)
    found = served(world, inputs)
    assert np.isfinite(found).all()
    alone = World(world.engine, world.cells)
    filled = (0, (1,)) if kind == "ridge" else (0, None)
    alone.live = {k: s for k, s in world.live.items() if (s.shard, s.prefix if filled[1] else None) == filled}
    alone.digests, alone.artifacts = world.digests, world.artifacts
    if kind == "ridge":  # nothing added is nothing changed
        assert np.array_equal(found, served(alone, inputs))
    elif kind == "s3t":  # an untrained head says next to nothing
        assert (found.argmax(axis=1) == served(alone, inputs).argmax(axis=1)).all()


@pytest.mark.golden
def test_more_blocks_than_layers_are_refused_where_blocks_are_cut(backbone: Backbone) -> None:
    for change in ({"slices": 3, "orders": 1}, {"slices": 1, "orders": 1, "layers_per_slice": 3}):
        deep = tiny_recipe(backbone, **change)
        for opened in (open_trainer, open_reader):
            with pytest.raises(BackboneError, match=r"layers.*lower slices or layers_per_slice"):
                opened(deep)
    with pytest.raises(RecipeError, match=r"trunk_layers is 1, but .* leave 0: say 0"):
        open_trainer(tiny_recipe(backbone, trunk_layers=1))
    for kind in ("sisa", "ridge"):  # whose slices are of data alone
        trainer = open_trainer(recipe_of(kind, backbone, slices=5))
        (piece,) = train_chain(trainer, {4: tiny_records(3)}, (4,)) if kind == "ridge" else (b"",)
        assert piece or trainer.recipe.slices == 5


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
@pytest.mark.parametrize("prior", [False, True])
def test_more_orders_than_there_are_are_refused(slices: int, prior: bool) -> None:
    classes = [{"name": f"c{n}", "rate": n + 1.0, "slices": 1} for n in range(slices)] if prior else []
    body = {**BODY, "slices": slices, "prior": classes}
    every = math.factorial(slices)
    assert len(Recipe.from_json({**body, "orders": every}).slice_orders) == every
    for orders in (every + 1, 10**9):
        with pytest.raises(RecipeError, match=rf"orders.* {every} distinct orders, not {orders}: lower orders"):
            Recipe.from_json({**body, "orders": orders})


BODY: dict[str, Any] = {
    "backbone": {"source": "/somewhere", "digest": "d" * 64},
    "classes": ["no", "yes"],
    "shards": 2,
    "slices": 2,
}


@pytest.mark.parametrize("rate", ["often", "0.5", None, True, [1], {}, math.nan, math.inf, -0.1, 10**400])
def test_a_prior_that_is_no_number_is_refused_by_its_field(rate: object) -> None:
    prior = [{"name": "guests", "rate": 1.0, "slices": 1}, {"name": "staff", "rate": rate, "slices": 1}]
    body = json.loads(json.dumps({**BODY, "prior": prior}))
    with pytest.raises(RecipeError, match=r"prior.*rate"):
        Recipe.from_json(body)


@pytest.mark.parametrize(
    ("prior", "named"),
    [
        ([{"name": "guests", "rate": 0.0, "slices": 2}], "0 everywhere"),
        ([{"name": "guests", "rate": 1.0, "slices": 1}], "add up to 2"),
        ([{"name": "guests", "rate": 1.0, "slices": 0}, {"name": "staff", "rate": 1.0, "slices": 2}], "at least 1"),
        ([{"name": "guests", "rate": 1.0, "slices": 1}] * 2, "same name"),
        ([{"name": "guests", "slices": 2}], "rate"),
        ({"guests": 1.0}, "must be a list"),
    ],
)
def test_a_prior_that_does_not_fit_the_slices_is_refused(prior: object, named: str) -> None:
    with pytest.raises(RecipeError, match=rf"prior.*{named}|{named}.*prior"):
        Recipe.from_json({**BODY, "prior": prior})


@pytest.mark.golden
def test_sums_that_could_overflow_are_refused_before_any_is_made(backbone: Backbone) -> None:
    """A cell is refused while the model's sum of all cells could still hold it; nothing is published."""
    wide = recipe_of("ridge", backbone, ridge=Ridge(layers=1, bits=20, clip=1024.0))
    engine: Any = open_trainer(wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.pools, "features", lambda _: pytest.fail("computed"))
        world = World(engine, {(s, p): tiny_records(2, f"{s}{p}") for s in range(2) for p in range(2)})
        with pytest.raises(RecipeError, match=r"may overflow 63 bits: lower ridge\.bits or ridge\.clip"):
            world.rebuild()
    assert world.artifacts == {}
    assert train_chain(engine, {0: tiny_records(1)}, (0,))


@contextmanager
def running_out_of_memory(after: int) -> Generator[None]:
    """Torch's own error from a layer of the model that is being trained, at a pass with that number."""
    passes = itertools.count(1)

    def hook(module: torch.nn.Module, _given: Any) -> None:
        if isinstance(module, torch.nn.Linear) and torch.is_grad_enabled() and next(passes) == after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["s3t", "sisa", "sisa module"])
def test_running_out_of_memory_names_the_fields_to_turn_down(backbone: Backbone, kind: str) -> None:
    recipe = recipe_of(kind, backbone)
    slices = {0: [made(recipe, f"r{number}", ("no", "yes")[number % 2]) for number in range(6)]}
    wanted = train_chain(open_trainer(recipe), slices, (0,))
    engine = open_trainer(recipe)
    with running_out_of_memory(3), pytest.raises(MemoryShortageError, match=r"batch_size.*recipe") as shortage:
        train_chain(engine, slices, (0,))
    assert "max_tokens" in str(shortage.value)
    assert train_chain(engine, slices, (0,)) == wanted  # with memory enough the next attempt gives the same bits


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["s3t", "sisa", "sisa module"])
def test_a_loss_that_is_no_number_names_its_step(backbone: Backbone, kind: str) -> None:
    recipe = recipe_of(kind, backbone, learning_rate=1e38, head_learning_rate=1e38)
    slices = {0: [made(recipe, f"r{number}", ("no", "yes")[number % 2]) for number in range(12)]}
    with pytest.raises(DivergedError, match=r"at step [23].*lower.*recipe"):
        train_chain(open_trainer(recipe), slices, (0,))


@pytest.mark.integration
def test_a_recipe_tuned_on_deletable_records_is_refused(api: Api) -> None:
    api.dataset()
    body = {"name": "m", "dataset": "reviews", "recipe": {**RECIPE, "tuned_on": "deletable"}}
    answer = api.client.post("/v1/models", json=body)
    assert answer.status_code == 422
    assert answer.json()["field"] == "recipe"
    assert "choose them on public or non-deletable data" in answer.json()["detail"]
    assert api.client.get("/v1/models").json()["models"] == []
    for wrong in ("Deletable", None, 1):
        with pytest.raises(RecipeError, match="tuned_on"):
            Recipe.from_json({**BODY, "tuned_on": wrong})
    declared = api.client.post("/v1/models", json={**body, "recipe": {**RECIPE, "tuned_on": "non_deletable"}})
    assert declared.status_code == 201


@pytest.mark.golden
def test_without_any_clean_stage_nothing_is_answered(backbone: Backbone) -> None:
    for kind in KINDS:
        world = World(open_trainer(recipe_of(kind, backbone)), {(s, p): [] for s in range(2) for p in range(2)})
        with pytest.raises(ShardsError, match="nothing can be answered until one is rebuilt"):
            served(world, TEXTS if kind != "sisa module" else ["[0, 0, 0, 0, 0, 0]"])
