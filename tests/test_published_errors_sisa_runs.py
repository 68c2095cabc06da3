"""The errors in what runs around the published SISA code (facts/exact-unlearning.md 4.27 to 4.30): one test each.

Those in its training are in test_published_errors_sisa.py. Each test was seen to fail on a copy of this code into which
the error, or its nearest like, had been put.
"""

from uuid import UUID

import numpy as np
import pytest
import torch
from exact import Slices, served, stages_of, trace_chain
from test_engine_sisa import module_recipe, vectors
from test_workers_path import build
from tiny import World, tiny_recipe
from world_copies import Copy

from service.store import cells, lineage
from service.store.database import transaction
from shards.assembly import Assembly
from shards.engine.artifacts import decode
from shards.engine.determinism import prepare
from shards.engine.interface import inputs_of
from shards.engine.modules import build as build_module
from shards.engine.modules import restore
from shards.engine.sisa import Sisa
from shards.errors import RecipeError
from shards.orders import cyclic
from shards.recipe import Backbone, PriorClass, Recipe
from workers import steps

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.golden


def trained_on(world: Copy) -> set[UUID]:
    """Records that the stages of the newest version read."""
    (body,) = world.row(
        "SELECT a.body FROM model JOIN model_version v USING (model_id, version) JOIN assembly a"
        " ON a.digest = v.assembly"
    )
    keys = [member.stage for member in Assembly.from_json(body).members if member]
    with transaction(world.pool) as connection:
        reads = [read for key in keys for read in lineage.list_reads(connection, key)]
        return {i for read in reads for i in cells.list_active(connection, read.cell_id, read.generation)}


@pytest.mark.integration
def test_a_later_request_never_brings_an_earlier_deletion_back(world: Copy) -> None:
    """4.27: requests overwrote those before them, so that a second file resurrected what the first had deleted."""
    gone: set[UUID] = set()
    asked: list[UUID] = []
    whole = trained_on(world)
    for subject in ("s1", "s4", "s1", "bob"):
        asked.append(world.ask(subject))
        steps.plan_targets(world.context, world.model_id)
        named = "SELECT record_id FROM deletion_request_record WHERE request_id = %s"
        gone |= {i for (i,) in world.rows(named, asked[-1])}
        build(world)  # before anything is erased
        assert trained_on(world) == whole - gone < whole
    world.finish(*asked)
    build(world)
    assert trained_on(world) == whole - gone
    assert world.add({"s1": ["s1r0"], "s4": ["new of s4"]}).skipped == 2
    build(world)
    assert trained_on(world) == whole - gone


def test_a_declared_prior_decides_the_orders() -> None:
    """4.28: `if / if / else` let uniform requests overwrite the exponential ones that had been asked for."""
    backbone = Backbone(source="/somewhere", digest="d" * 64)
    rates = {"guests": 9.0, "staff": 0.1, "trials": 2.0, "leavers": 0.01}
    prior = tuple(PriorClass(name=name, rate=rate, slices=1, expires=name == "leavers") for name, rate in rates.items())
    recipe = tiny_recipe(backbone, slices=4, orders=3, prior=prior)
    assert [order[0] for order in recipe.slice_orders] == [1, 2, 0]
    assert {order[-1] for order in recipe.slice_orders} == {3}
    swapped = tuple(PriorClass(name=each.name, rate=rates["guests"], slices=1) for each in prior)
    assert tiny_recipe(backbone, slices=4, orders=3, prior=swapped).slice_orders == cyclic(4, 3)
    assert tiny_recipe(backbone, slices=4, orders=3).slice_orders == cyclic(4, 3) != recipe.slice_orders


@pytest.mark.parametrize("name", ["Plain", "Normed"])
def test_answers_come_from_a_model_that_is_not_in_training(name: str) -> None:
    """4.29: neither eval() nor no_grad() at test time: dropout and batch normalisation answered as in training."""
    prepare()
    recipe = module_recipe(name, shards=1, slices=1, epochs=6)
    world = World(Sisa(recipe), {(0, 0): vectors(12, "r")})
    world.rebuild()
    inputs = inputs_of(recipe, vectors(9, "u"))
    answers = [served(world, inputs) for _ in range(2)]
    assert np.array_equal(*answers)
    assert np.array_equal(served(world, inputs[3:4]), answers[0][3:4])
    assert recipe.module is not None
    plain = build_module(recipe.module, 0)
    restore(plain, decode(next(iter(world.artifacts.values()))).tensors)
    rows = torch.tensor([[float(number) for number in text.strip("[]").split(",")] for text in map(str, inputs)])
    with torch.no_grad():
        wanted = plain.eval()(rows).numpy()
        assert not np.allclose(answers[0], plain.train()(rows).numpy(), atol=1e-4)
    np.testing.assert_allclose(answers[0], wanted, atol=1e-5)


def test_what_is_trained_on_is_counted_from_the_records() -> None:
    """4.30: the file said 280368 records where the preparation made 249215: an index beyond the end."""
    with pytest.raises(RecipeError, match="no field 'nb_train'"):
        Recipe.from_json({**module_recipe().to_json(), "nb_train": 280368})
    slices: Slices = {0: vectors(1, "a"), 1: vectors(11, "b"), 2: []}
    engine = Sisa(module_recipe(epochs=4))
    for stage, trace in zip(stages_of(engine, slices, (0, 1, 2)), trace_chain(engine, slices, (0, 1, 2)), strict=True):
        ids = {record.record_id for piece in stage.prefix for record in slices[piece]}
        assert set(trace.order) == ids
        assert len(trace.order) == 2 * len(ids)
