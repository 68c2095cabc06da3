"""Models: declare, list, train or rebuild, look at the grid and the versions."""

import re
from collections.abc import Collection
from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from service.api.auth import Caller, ModelAdmin
from service.api.context import Here
from service.api.doorbell import Task
from service.api.errors import RESPONSES
from service.api.schemas import ModelChange, NamePath, NewModel, RebuildPolicy
from service.domain.errors import InvalidInputError
from service.domain.release import Canary, Gate
from service.evidence.events import EventKind
from service.store import capacity, datasets, events, gates, grid, models, policies
from service.store.database import Connection, transaction
from service.store.datasets import Dataset
from service.store.declare import declare_model
from service.store.models import Model
from service.store.priors import Prior
from shards.assembly import Assembly
from shards.errors import RecipeError
from shards.rebuild import Policy
from shards.recipe import Recipe

router = APIRouter(prefix="/v1/models", tags=["models"], responses=RESPONSES)


@router.post("", status_code=201)
def create_model(body: NewModel, here: Here, caller: ModelAdmin, response: Response) -> dict[str, Any]:
    """Declare a model; nothing is trained before the first rebuild."""
    recipe = _recipe(body.recipe)
    policy = _policy(body.rebuild, recipe)
    _check_min_shards(body.min_shards, recipe)
    _check_command(recipe, here.settings.commands, evaluated=body.evaluation_dataset is not None)
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
            policy=policy,
            min_shards=body.min_shards,
            answers=body.answers,
        )
        events.append(
            connection,
            EventKind.MODEL_DECLARED,
            model_id=made.model_id,
            recipe=made.recipe_digest,
            actor=caller.prefix,
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


@router.patch("/{name}")
def change_model(name: NamePath, body: ModelChange, here: Here, caller: ModelAdmin) -> dict[str, Any]:
    """Set when missing stages are trained, how few shards may answer, how much, and how a rebuild comes into service.

    Deletions that waited under the old rebuild policy are dealt with by the new one.
    """
    with transaction(here.pool) as connection:
        changed = models.get_model(connection, name)
        recipe = changed.parsed_recipe
        if body.min_shards is not None:
            _check_min_shards(body.min_shards, recipe)
            changed = policies.set_min_shards(connection, name, body.min_shards, actor=caller.prefix)
        if body.answers is not None:
            changed = policies.set_answers(connection, name, body.answers, actor=caller.prefix)
        if body.rebuild is not None:
            policy = _policy(body.rebuild, recipe)
            changed = policies.set_policy(connection, name, policy, actor=caller.prefix)
        if "gate" in body.model_fields_set:
            gate = Gate(**body.gate.model_dump()) if body.gate else None
            changed = policies.set_gate(connection, name, gate, actor=caller.prefix)
        if "canary" in body.model_fields_set:
            canary = Canary(**body.canary.model_dump()) if body.canary else None
            changed = policies.set_canary(connection, name, canary, actor=caller.prefix)
        shown = _shown(connection, changed)
    if changed.rebuild_wanted:
        here.doorbell.ring(Task.REBUILD, changed.model_id)
        here.doorbell.ring(Task.PLAN, changed.model_id)
    return shown


@router.post("/{name}/rebuild", status_code=202)
def rebuild_model(name: NamePath, here: Here, caller: ModelAdmin) -> dict[str, Any]:
    """Train now what is missing or stale, whatever the rebuild policy waits for; the first time, everything."""
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        models.mark_rebuild_wanted(connection, model.model_id, forced=True)
        events.append(connection, EventKind.REBUILD_REQUESTED, model_id=model.model_id, actor=caller.prefix)
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


@router.get("/{name}/capacity")
def get_capacity(
    name: NamePath,
    here: Here,
    _caller: Caller,
    per_day: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
    layers: Annotated[int | None, Query(ge=1, le=10_000)] = None,
) -> dict[str, Any]:
    """How many more deletions the model stands, what they cost, and what its rebuild policy would train now.

    `per_day` is the expected deletions a day, by default the model's own of the last 30 days; `layers` those of the
    backbone, for the comparison with SISA.
    """
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        found = capacity.forecast(connection, model, per_day=per_day, layers=layers)
        return {"model": name, "version": model.version, **found.to_json()}


@router.get("/{name}/versions")
def list_versions(name: NamePath, here: Here, _caller: Caller) -> dict[str, Any]:
    """The newest versions first."""
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        found = models.list_versions(connection, model.model_id)
    recipe = model.parsed_recipe
    versions = [
        {
            "version": version.version,
            "assembly": version.assembly,
            "cause": version.cause,
            "canonical": version.canonical,
            "depths": grid.depths(recipe, Assembly.from_json(version.body)),
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
    if recipe.backbone is not None and recipe.backbone.provenance == "own_contains_subjects":
        raise InvalidInputError(
            "recipe.backbone.provenance: a backbone that was trained on the subjects cannot forget them here:"
            " take one that is public or own_clean",
            field="recipe.backbone.provenance",
        )
    return recipe


def _policy(body: RebuildPolicy, recipe: Recipe) -> Policy:
    try:
        policy = Policy(kind=body.kind, spares=body.spares, min_depth=body.min_depth)
        policy.check(recipe)
    except RecipeError as error:
        message = str(error).replace("policy.", "rebuild.")
        named = re.match(r"rebuild(\.\w+)*", message)
        raise InvalidInputError(message, field=named[0] if named else "rebuild") from None
    return policy


def _check_min_shards(min_shards: int, recipe: Recipe) -> None:
    if min_shards > recipe.seats:
        raise InvalidInputError(f"min_shards must be at most {recipe.seats}, the model's", field="min_shards")


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
        ("task", dataset.task),
        ("input", dataset.input),
    ):
        if getattr(recipe, field) != wanted:
            raise InvalidInputError(
                f"recipe.{field} differs from the dataset's: make them equal", field=f"recipe.{field}"
            )
    if recipe.module is not None and recipe.module.width != dataset.width:
        raise InvalidInputError(
            f"recipe.module.width differs from the dataset's width, {dataset.width}: make them equal",
            field="recipe.module.width",
        )
    if [Prior(each.name, each.slices, each.expires) for each in recipe.prior] != list(dataset.priors):
        raise InvalidInputError(
            "recipe.prior differs from the dataset's priors: give each of them, in the same order and with the same"
            " slices and expires, a rate",
            field="recipe.prior",
        )


def _check_command(recipe: Recipe, commands: Collection[str], *, evaluated: bool) -> None:
    """A command is the operator's to allow, never a caller's to give."""
    if recipe.engine != "external":
        return
    if recipe.command not in commands:
        raise InvalidInputError(
            "recipe.command is not among the commands that the operator allows (EXPUNGE_COMMANDS): take one of those,"
            " or ask for it",
            field="recipe.command",
        )
    if evaluated:
        raise InvalidInputError(
            "evaluation_dataset: models of engine external are not served here, so nothing can evaluate them: leave it"
            " out",
            field="evaluation_dataset",
        )


def _check_evaluation(recipe: Recipe, evaluation: Dataset) -> None:
    if evaluation.deletable:
        raise InvalidInputError(
            "an evaluation dataset must be declared with deletable: false", field="evaluation_dataset"
        )
    for field in ("classes", "task", "input"):
        said = getattr(evaluation, field)
        if (tuple(said) if field == "classes" else said) != getattr(recipe, field):
            raise InvalidInputError(
                f"the evaluation dataset's {field} differs from recipe.{field}", field="evaluation_dataset"
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
        "depths": grid.depths(recipe, assembly),
        "slices": recipe.slices,
        "building": model.building or model.rebuild_wanted or gates.is_evaluating(connection, model.model_id),
        "gate": model.gate,
        "canary": model.canary,
        "stable": model.stable,
        "canary_until": model.canary_until.isoformat() if model.canary_until else None,
        "pinned": model.pinned,
        "rebuild": model.policy.to_json(),
        "min_shards": model.min_shards,
        "answers": model.answers,
        "rebuild_at": model.rebuild_at.isoformat() if model.rebuild_at else None,
        "rebuild_due": model.rebuild_due.isoformat() if model.rebuild_due else None,
        "deferring": model.deferring,
        "reproducible": model.reproducible,
    }
