"""Models: declare, list, train or rebuild, look at the grid and the versions."""

import re
from datetime import timedelta
from typing import Any

from fastapi import APIRouter, Response

from service.api.auth import Caller, ModelAdmin
from service.api.context import Here
from service.api.doorbell import Task
from service.api.errors import RESPONSES
from service.api.schemas import NamePath, NewModel
from service.domain.errors import InvalidInputError
from service.store import datasets, grid, models
from service.store.database import Connection, transaction
from service.store.datasets import Dataset
from service.store.declare import declare_model
from service.store.models import Model
from shards.assembly import Assembly
from shards.errors import RecipeError
from shards.recipe import Recipe

router = APIRouter(prefix="/v1/models", tags=["models"], responses=RESPONSES)


@router.post("", status_code=201)
def create_model(body: NewModel, here: Here, _caller: ModelAdmin, response: Response) -> dict[str, Any]:
    """Declare a model; nothing is trained before the first rebuild."""
    recipe = _recipe(body.recipe)
    with transaction(here.pool) as connection:
        dataset = _declared(connection, body.dataset, "dataset")
        _check_grid(recipe, dataset)
        evaluation = None
        if body.evaluation_dataset is not None:
            evaluation = _declared(connection, body.evaluation_dataset, "evaluation_dataset")
            _check_evaluation(recipe, evaluation)
        made = declare_model(
            connection,
            name=body.name,
            dataset_id=dataset.dataset_id,
            evaluation_id=evaluation.dataset_id if evaluation else None,
            recipe=recipe,
            erase_after=timedelta(seconds=body.erase_after_seconds),
        )
        response.headers["Location"] = f"/v1/models/{made.name}"
        return _shown(connection, made)


@router.get("")
def list_models(here: Here, _caller: Caller) -> dict[str, Any]:
    """All models."""
    with transaction(here.pool) as connection:
        return {"models": [_shown(connection, model) for model in models.list_models(connection)]}


@router.get("/{name}")
def get_model(name: NamePath, here: Here, _caller: Caller) -> dict[str, Any]:
    """One model with its recipe."""
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        return {**_shown(connection, model), "recipe": model.recipe}


@router.post("/{name}/rebuild", status_code=202)
def rebuild_model(name: NamePath, here: Here, _caller: ModelAdmin) -> dict[str, Any]:
    """Train the stages that are missing on today's records; the first time, all of them."""
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        models.mark_rebuild_wanted(connection, model.model_id)
    here.doorbell.ring(Task.REBUILD, model.model_id)
    return {"model": name, "links": {"model": f"/v1/models/{name}", "shards": f"/v1/models/{name}/shards"}}


@router.get("/{name}/shards")
def get_shards(name: NamePath, here: Here, _caller: Caller) -> dict[str, Any]:
    """The grid: what each shard and slice contributes to answers now."""
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        recipe = model.parsed_recipe
        return {
            "model": name,
            "version": model.version,
            "floor": model.floor,
            "cleared": model.cleared,
            "slices": recipe.slices,
            "orders": [list(order) for order in recipe.slice_orders],
            "shards": grid.grid(connection, model),
        }


@router.get("/{name}/versions")
def list_versions(name: NamePath, here: Here, _caller: Caller) -> dict[str, Any]:
    """The newest versions first."""
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        found = models.list_versions(connection, model.model_id)
    versions = [
        {
            "version": version.version,
            "assembly": version.assembly,
            "cause": version.cause,
            "canonical": version.canonical,
            "depths": list(Assembly.from_json(version.body).depths),
            "created_at": version.created_at.isoformat(),
        }
        for version in found
    ]
    return {"model": name, "floor": model.floor, "versions": versions}


def _recipe(body: dict[str, Any]) -> Recipe:
    try:
        recipe = Recipe.from_json(body)
    except RecipeError as error:
        named = re.match(r"recipe(\.\w+)*", str(error))
        raise InvalidInputError(str(error), field=named[0] if named else "recipe") from None
    if recipe.backbone.provenance == "own_contains_subjects":
        raise InvalidInputError(
            "recipe.backbone.provenance: a backbone that was trained on the subjects cannot forget them here:"
            " take one that is public or own_clean",
            field="recipe.backbone.provenance",
        )
    return recipe


def _declared(connection: Connection, name: str, field: str) -> Dataset:
    found = datasets.find_dataset(connection, name)
    if found is None:
        raise InvalidInputError("there is no dataset of that name; declare it first", field=field)
    return found


def _check_grid(recipe: Recipe, dataset: Dataset) -> None:
    """The recipe must say again what the dataset declares: its digest is what certificates name."""
    for field, wanted in (
        ("shards", dataset.shards),
        ("slices", dataset.slices),
        ("classes", tuple(dataset.classes)),
    ):
        if getattr(recipe, field) != wanted:
            raise InvalidInputError(
                f"recipe.{field} differs from the dataset's: make them equal", field=f"recipe.{field}"
            )


def _check_evaluation(recipe: Recipe, evaluation: Dataset) -> None:
    if evaluation.deletable:
        raise InvalidInputError(
            "an evaluation dataset must be declared with deletable: false", field="evaluation_dataset"
        )
    if tuple(evaluation.classes) != recipe.classes:
        raise InvalidInputError(
            "the evaluation dataset's classes differ from recipe.classes", field="evaluation_dataset"
        )


def _shown(connection: Connection, model: Model) -> dict[str, Any]:
    dataset = datasets.get_dataset_by_id(connection, model.dataset_id)
    evaluation = datasets.get_dataset_by_id(connection, model.evaluation_id).name if model.evaluation_id else None
    assembly = grid.served(connection, model)
    recipe = model.parsed_recipe
    return {
        "name": model.name,
        "dataset": dataset.name,
        "evaluation_dataset": evaluation,
        "recipe_digest": model.recipe_digest,
        "version": model.version,
        "floor": model.floor,
        "cleared": model.cleared,
        "erase_after_seconds": int(model.erase_after.total_seconds()),
        "jobs": {row.state: row.jobs for row in grid.count_jobs(connection, model.model_id)},
        "depths": list(assembly.depths) if assembly else [0] * recipe.shards,
        "slices": recipe.slices,
        "building": model.building or model.rebuild_wanted,
    }
