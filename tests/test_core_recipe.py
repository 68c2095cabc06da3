import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import RecipeError
from shards.orders import cyclic
from shards.recipe import Backbone, Recipe

BACKBONE = Backbone(source="/somewhere", digest="d" * 64)
RECIPE = Recipe(backbone=BACKBONE, classes=("no", "yes"), shards=4, slices=3, orders=2)


def test_a_recipe_survives_json() -> None:
    again = Recipe.from_json(json.loads(json.dumps(RECIPE.to_json())))
    assert again == RECIPE
    assert again.digest == RECIPE.digest


def test_where_the_backbone_lies_decides_nothing() -> None:
    body = RECIPE.to_json()
    body["backbone"]["source"] = "hub/elsewhere"
    assert Recipe.from_json(body).digest == RECIPE.digest


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"classes": ["yes", "no"]},
        {"epochs": 4},
        {"learning_rate": 0.002},
        {"precision": "bfloat16"},
        {"backbone_dropout": True},
        {"lora": {"rank": 4}},
        {"backbone": {"source": "/somewhere", "digest": "e" * 64}},
        {"backbone": {"source": "/somewhere", "digest": "d" * 64, "provenance": "own_clean"}},
    ],
)
def test_all_else_changes_the_digest(change: dict[str, Any]) -> None:
    assert Recipe.from_json(RECIPE.to_json() | change).digest != RECIPE.digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shards": 0}, "shards"),
        ({"shards": True}, "recipe.shards"),
        ({"shards": "4"}, "recipe.shards"),
        ({"slices": 2.0}, "recipe.slices"),
        ({"orders": 7}, "orders"),
        ({"engine": "ridge", "orders": 2}, "orders"),
        ({"engine": "external"}, "command"),
        ({"engine": "sisa", "ridge": {}}, "ridge"),
        ({"engine": "ridge", "ridge": {"clip": 0.0}}, "ridge"),
        ({"task": "regression"}, "classes"),
        ({"task": "regression", "classes": [], "scale": {"spread": 0.0}}, "scale"),
        ({"scale": {}}, "scale"),
        ({"input": "vector"}, "input"),
        ({"backbone": None}, "backbone"),
        ({"aggregation": "merged", "engine": "ridge"}, "aggregation"),
        ({"tuned_on": "deletable"}, "tuned_on"),
        ({"prior": [{"name": "a", "rate": 1, "slices": 2}]}, "prior"),
        ({"prior": [{"name": "a", "rate": 1, "slices": 1}, {"name": "a", "rate": 1, "slices": 2}]}, "prior"),
        ({"prior": [{"name": "a", "rate": "often", "slices": 3}]}, r"recipe.prior\[0\].rate"),
        ({"prior": {"a": 1}}, "recipe.prior must be a list"),
        ({"module": {"path": "a:B", "digest": "d", "arguments": []}}, "recipe.module.arguments"),
        ({"classes": ["one"]}, "classes"),
        ({"classes": ["one", "one"]}, "classes"),
        ({"classes": "no"}, "recipe.classes"),
        ({"engine": "magic"}, "recipe.engine"),
        ({"precision": "float16"}, "recipe.precision"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"learning_rate": 0}, "learning rates"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"lora": {"dropout": 1.0}}, "lora"),
        ({"lora": {"alpha": 0}}, "lora needs a rank and an alpha"),
        ({"engine": "sisa", "orders": 1, "trunk_layers": 3}, "trunk_layers"),
        ({"engine": "ridge", "orders": 1, "trunk_layers": 3}, "trunk_layers"),
        ({"seed": 2**53}, "recipe has no digest"),
        ({"classes": ["no", "\ud800"]}, "recipe has no digest"),
        (
            {
                "engine": "sisa",
                "orders": 1,
                "backbone": None,
                "input": "vector",
                "module": {"path": "a:B", "digest": "d", "width": 1, "arguments": {"n": float("nan")}},
            },
            "recipe has no digest",
        ),
        ({"lora": {"ranks": 8}}, "recipe.lora has no field 'ranks'"),
        ({"lora": 8}, "recipe.lora must be an object"),
        ({"colour": "red"}, "no field 'colour'"),
        ({"backbone": {"source": "x"}}, "digest"),
        ({"version": 2}, "recipe.version"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        Recipe.from_json(copy.deepcopy(RECIPE.to_json()) | change)


def test_whole_numbers_do_for_rates() -> None:
    assert Recipe.from_json(RECIPE.to_json() | {"learning_rate": 1}).learning_rate == 1.0


@given(st.integers(1, 8), st.data())
def test_rotations_are_orders_with_distinct_first_slices(slices: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, slices))
    orders = cyclic(slices, budget)
    assert len(orders) == budget
    for position in range(slices):  # a Latin rectangle: no slice twice at a position
        assert len({order[position] for order in orders}) == budget
    assert all(sorted(order) == list(range(slices)) for order in orders)


def test_fields_that_came_later_leave_older_digests_as_they_were() -> None:
    assert RECIPE.digest == "d7f5c50e884e91da5147843b57bcf50b5cf8c073383801ed776e8f86e2e9b687"
    assert "task" not in RECIPE.to_json()
    spelt_out = RECIPE.to_json() | {"task": "classification", "prior": [], "device": None}
    assert Recipe.from_json(spelt_out).digest == RECIPE.digest
    assert Recipe.from_json(RECIPE.to_json() | {"aggregation": "merged"}).digest != RECIPE.digest
