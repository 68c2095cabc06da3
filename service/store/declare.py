"""Declaring a model, with what is taken said as a conflict."""

from datetime import timedelta
from typing import LiteralString
from uuid import UUID

from psycopg import errors
from psycopg.rows import scalar_row

from service.domain.answers import Answers
from service.domain.errors import ConflictError
from service.store import models, targets
from service.store.database import Connection
from service.store.models import Model
from shards.rebuild import Policy
from shards.recipe import Recipe

INSERT_OWED: LiteralString = """
INSERT INTO request_target (request_id, model_id, state)
SELECT DISTINCT d.request_id, %(model_id)s::bigint, 'received'::deletion_state
FROM record r
JOIN record_subject rs ON rs.record_id = r.record_id
JOIN deletion_request d ON d.subject_id = rs.subject_id
WHERE r.dataset_id = %(dataset_id)s::uuid AND d.state NOT IN ('rejected', 'revoked', 'expired', 'lifted')
  AND NOT EXISTS (SELECT FROM tombstone t WHERE t.record_id = r.record_id AND t.lifted_at IS NULL)
  AND NOT EXISTS (  -- it named models, and none of this dataset, though there was one
      SELECT FROM model o
      WHERE o.dataset_id = r.dataset_id AND o.created_at <= d.created_at
        AND NOT EXISTS (SELECT FROM request_target g WHERE (g.request_id, g.model_id) = (d.request_id, o.model_id)))
RETURNING request_id
"""


def declare_model(
    connection: Connection,
    *,
    name: str,
    dataset_id: UUID,
    evaluation_id: UUID | None,
    recipe: Recipe,
    erase_after: timedelta,
    policy: Policy = models.NOW,
    min_shards: int = 1,
    answers: Answers = Answers.PROBABILITIES,
) -> Model:
    """Create a model with nothing trained.

    Requests whose records still lie in the dataset, since no model had learnt from it, become this model's to honour
    before it can serve anything.

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
            policy=policy,
            min_shards=min_shards,
            answers=answers,
        )
    except errors.UniqueViolation as error:
        if "recipe" in (error.diag.constraint_name or ""):
            raise ConflictError(
                "another model has this recipe, and equal recipes give equal weights: use that model,"
                " or change the seed"
            ) from None
        raise ConflictError("there is a model of that name already; choose another name") from None
    with connection.cursor(row_factory=scalar_row) as cursor:
        owed = cursor.execute(INSERT_OWED, {"model_id": model_id, "dataset_id": dataset_id}).fetchall()
    targets.refresh_requests(connection, owed)
    return models.get_model_by_id(connection, model_id)
