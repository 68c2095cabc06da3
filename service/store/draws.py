"""The daily draw: which of the served stages are trained again from nothing, once a day and model."""

from datetime import date
from typing import Any, LiteralString

from psycopg.rows import scalar_row

from service.domain.replays import draw
from service.store import models
from service.store.database import Connection
from service.store.served import list_served

LIST_UNDRAWN: LiteralString = """
SELECT m.model_id FROM model m
WHERE m.version > 0
  AND NOT EXISTS (SELECT FROM replay r WHERE r.model_id = m.model_id AND r.drawn_on = current_date
                    AND r.challenge_id IS NULL
                    AND (r.attempts > 0 OR r.outcome IS NULL))  -- without an attempt: noted by a training
ORDER BY m.model_id
"""
TODAY: LiteralString = "SELECT current_date"
IS_DRAWN: LiteralString = """
SELECT FROM replay
WHERE model_id = %(model_id)s::bigint AND drawn_on = current_date AND challenge_id IS NULL
  AND (attempts > 0 OR outcome IS NULL)
LIMIT 1
"""
INSERT: LiteralString = """
INSERT INTO replay (model_id, stage_key, digest, fingerprint, made_by, drawn_on)
VALUES (%(model_id)s::bigint, %(stage_key)s::text, %(digest)s::text, %(fingerprint)s::text, %(made_by)s::text,
        current_date)
ON CONFLICT (model_id, drawn_on, stage_key) WHERE challenge_id IS NULL DO NOTHING
"""


def list_undrawn(connection: Connection) -> list[int]:
    """Models that serve something and of which nothing was drawn today."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_UNDRAWN).fetchall()


def draw_today(connection: Connection, model_id: int, count: int) -> int:
    """Draw `count` of the stages that speak for a shard today, once a day; returns how many.

    The draw is a function of day, model and what is served: nobody chooses what is checked. Stages made today have
    their turn tomorrow.
    """
    models.lock_model(connection, model_id)
    if connection.execute(IS_DRAWN, {"model_id": model_id}).fetchone() is not None:
        return 0
    with connection.cursor(row_factory=scalar_row) as cursor:
        day: date | None = cursor.execute(TODAY).fetchone()
    leaves = {
        each.stage_key: each
        for each in list_served(connection, model_id)
        if each.leaf == each.stage_key and each.settled
    }
    chosen = draw(leaves, count, f"{day}:{model_id}")
    for key in chosen:
        found = leaves[key]
        values: dict[str, Any] = {
            "model_id": model_id,
            "stage_key": key,
            "digest": found.digest,
            "fingerprint": found.fingerprint,
            "made_by": found.host,
        }
        connection.execute(INSERT, values)
    return len(chosen)
