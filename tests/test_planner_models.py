"""Several models on one dataset: each has its own target, and its own stages to lose (rule 26)."""

import base64
import itertools
import json
from datetime import datetime, timedelta

import pytest
from test_planner import DONE, fail_at
from world_copies import SUBJECTS, Copy

from service.evidence.verify import verify
from service.store import models, request_steps
from service.store.database import transaction
from shards.partition import dataset_key, record_id_of
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
        checks = verify(envelope, world.public_key, artifacts=world.context.artifacts.files.root)
        assert [check.name for check in checks if not check.passed] == []
        times = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["times"]
        (said,) = [datetime.fromisoformat(time["at"]) for time in times if time["state"] == "deactivated"]
        assert deactivated_at - timedelta(milliseconds=1) <= said  # its own, not the faster model's


def test_weights_in_reserve_leave_each_models_memory(world: Copy) -> None:
    """The first model's plan has taken the records out already: for the second they are new all the same."""
    recipe = type(world.recipe).from_json(world.recipe.to_json() | {"seed": 9})
    with transaction(world.pool) as connection:
        second = models.insert_model(
            connection, name="second", dataset_id=world.dataset.dataset_id, evaluation_id=None, recipe=recipe,
            erase_after=timedelta(0),
        )  # fmt: skip
    steps.rebuild_model(world.context, second)
    train_queued(world.context)
    steps.publish_model(world.context, second)
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    cells = {subject: world.row("SELECT cell_id FROM record WHERE record_id = %s", record_id_of(key, names[0]))
             for subject, names in SUBJECTS.items()}  # fmt: skip
    one, two = next((a, b) for a, b in itertools.combinations(SUBJECTS, 2) if cells[a] == cells[b])
    first = world.ask(one)
    both = (world.model_id, second)
    for model_id in both:
        steps.plan_targets(world.context, model_id)
    world.finish(first)
    for model_id in both:
        steps.rebuild_model(world.context, model_id)
    train_queued(world.context)  # trained and loaded, and not served yet
    late = world.ask(two)
    for model_id in both:
        steps.plan_targets(world.context, model_id)
        bounds = world.row("SELECT version, floor, (SELECT count(DISTINCT assembly) FROM model_version v"
                           " WHERE v.model_id = m.model_id) FROM model m WHERE model_id = %s", model_id)  # fmt: skip
        assert bounds == (3, 3, 2), model_id  # the same assembly again
        (plan,) = world.row("SELECT plan -> 'stages' FROM request_target WHERE (request_id, model_id) = (%s, %s)",
                            late, model_id)  # fmt: skip
        assert plan
    world.finish(late)
    assert world.states(late) == DONE * 2
    world.no_trace_of(late)
