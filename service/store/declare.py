"""Declaring a model, with what is taken said as a conflict."""

from datetime import timedelta
from uuid import UUID

from psycopg import errors

from service.domain.errors import ConflictError
from service.store import models
from service.store.database import Connection
from service.store.models import Model
from shards.recipe import Recipe


def declare_model(
    connection: Connection,
    *,
    name: str,
    dataset_id: UUID,
    evaluation_id: UUID | None,
    recipe: Recipe,
    erase_after: timedelta,
) -> Model:
    """Create a model with nothing trained.

    Raises:
        ConflictError: the name or the recipe is another model's; the transaction can do nothing more.
    """
    try:
        model_id = models.insert_model(
            connection,
            name=name,
            dataset_id=dataset_id,
            evaluation_id=evaluation_id,
            recipe=recipe,
            erase_after=erase_after,
        )
    except errors.UniqueViolation as error:
        if "recipe" in (error.diag.constraint_name or ""):
            raise ConflictError(
                "another model has this recipe, and equal recipes give equal weights: use that model,"
                " or change the seed"
            ) from None
        raise ConflictError("there is a model of that name already; choose another name") from None
    return models.get_model_by_id(connection, model_id)
