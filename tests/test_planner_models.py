"""Several models on one dataset: each has its own target, and its own stages to lose (rule 26)."""

import base64
import json
from datetime import datetime, timedelta

import pytest
from test_planner import DONE, fail_at
from world_copies import Copy

from service.evidence.verify import verify
from service.store import models, request_steps
from service.store.database import transaction
from workers import steps
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


def test_one_failing_model_does_not_hold_the_others(world: Copy) -> None:
    """And when it is retried, the records are gone already, but its own stages are not (rule 26)."""
    recipe = type(world.recipe).from_json(world.recipe.to_json() | {"seed": 8})
    with transaction(world.pool) as connection:
        second = models.insert_model(
            connection, name="second", dataset_id=world.dataset.dataset_id, evaluation_id=None, recipe=recipe,
            erase_after=timedelta(0),
        )  # fmt: skip
    steps.rebuild_model(world.context, second)
    train_queued(world.context)
    steps.publish_model(world.context, second)
    fail_at(world, f"NEW.model_id = {second}")
    request_id = world.ask("s1")
    for model_id in (world.model_id, second):
        steps.plan_targets(world.context, model_id)
    world.finish(request_id)
    assert world.states(request_id) == [*DONE, ("failed", None)]
    assert world.shown(request_id) == ("failed", None)

    world.as_owner("DROP TRIGGER fail ON request_target")
    with transaction(world.pool) as connection:
        request_steps.retry(connection, request_id, actor=world.actor)
    assert world.shown(request_id) == ("received", None)
    steps.plan_targets(world.context, second)
    assert world.row("SELECT version, floor FROM model WHERE model_id = %s", second) == (2, 2)
    world.finish(request_id)
    assert world.states(request_id) == DONE * 2
    assert world.shown(request_id) == ("completed", "erased")
    world.no_trace_of(request_id)
    assert world.row("SELECT count(*) FROM request_target WHERE jsonb_array_length(plan -> 'stages') > 0") == (2,)
    for envelope, deactivated_at in world.rows(
        "SELECT envelope, deactivated_at FROM certificate JOIN request_target USING (request_id, model_id)"
    ):
        checks = verify(envelope, world.public_key, artifacts=world.context.artifacts.root)
        assert [check.name for check in checks if not check.passed] == []
        times = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["times"]
        (said,) = [datetime.fromisoformat(time["at"]) for time in times if time["state"] == "deactivated"]
        assert deactivated_at - timedelta(milliseconds=1) <= said  # its own, not the faster model's
