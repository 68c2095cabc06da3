"""When a model that lost shards is expected to have them back: its rebuild's plan at the measured training speed."""

from datetime import datetime, timedelta
from typing import LiteralString

from psycopg.rows import scalar_row

from service.store import rebuilds
from service.store.database import Connection, get_time
from service.store.models import Model
from shards.rebuild import Policy

# What running jobs have had of their time is taken off; one that takes longer than expected takes off its own share.
GET_OPEN: LiteralString = """
SELECT sum(greatest(coalesce(work, 0) * %(speed)s::float
                    - coalesce(extract(epoch FROM clock_timestamp() - started_at), 0) * (state = 'running')::int,
                    0))::float
FROM stage_job
WHERE model_id = %(model_id)s::bigint AND state IN ('queued', 'running')
"""


def expected_at(connection: Connection, model: Model) -> datetime | None:
    """When what is missing will serve, as far as today's rows tell; None where nothing is planned.

    What is queued counts as one trainer after the other, as the rebuild planner counts it. A gate, a canary or another
    deletion may make it later, more trainers sooner.
    """
    now = get_time(connection)
    found = rebuilds.survey(connection, model)
    policy = Policy() if model.rebuild_forced else model.policy
    plan = found.plan(policy, now=now, due=model.rebuild_due)
    with connection.cursor(row_factory=scalar_row) as cursor:
        values = {"model_id": model.model_id, "speed": found.seconds_per_work}
        left = cursor.execute(GET_OPEN, values).fetchone()
    if left is None and not (model.rebuild_wanted or model.rebuild_at or model.building):
        return None
    start = rebuilds.moment(plan.start) if plan.stages else None
    seconds = (left or 0.0) + plan.work * found.seconds_per_work
    return max(now, start or now) + timedelta(seconds=seconds)
