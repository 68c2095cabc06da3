"""Deletions that meet training, ingestion, holds, waiting periods and versions before the newest."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from conftest import Database
from test_planner import DONE
from test_workers_path import build
from world import World, make_world
from world_copies import SUBJECTS, Copy

from service.store import models, publish, targets
from service.store.artifacts import Artifacts
from service.store.database import transaction
from shards.assembly import Assembly
from shards.engine.s3t import S3T
from shards.recipe import Backbone
from workers import steps
from workers.reaper import Reaper
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


def once(action: Callable[[], Any]) -> Callable[[], None]:
    waiting = [action]
    return lambda: waiting.pop()() if waiting else None


def reap(world: Copy) -> None:
    """The reaper, long after."""
    with transaction(world.pool) as connection:
        connection.execute("UPDATE artifact SET created_at = created_at - interval '1 hour' WHERE state = 'writing'")
    Reaper(world.pool, world.context.artifacts, job_attempts=2).look()


@pytest.mark.parametrize("moment", ["training", "uploaded"])
def test_a_deletion_reaches_a_stage_in_training(world: Copy, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Its job is cancelled, its publication refused, whether the upload had begun or not (rules 21 and 22)."""
    world.add({"new": ["new-record"]})
    assert steps.rebuild_model(world.context, world.model_id) > 0
    (cell_id,) = world.row("SELECT cell_id FROM record ORDER BY added DESC LIMIT 1")
    reading = {key for (key,) in world.rows(
        "SELECT stage_key FROM stage_cell JOIN cell USING (cell_id, generation) JOIN stage_job USING (stage_key)"
        " WHERE cell_id = %s AND stage_job.state = 'queued'", cell_id)}  # fmt: skip
    asked: list[UUID] = []

    def delete() -> None:
        asked.append(world.ask("new"))
        assert steps.plan_targets(world.context, world.model_id) == 1

    act = once(delete)
    real_train, real_put = S3T.train, Artifacts.put

    def train(engine: S3T, stage: Any, *args: Any) -> bytes:
        data = real_train(engine, stage, *args)
        if moment == "training" and stage.key in reading:
            act()
        return data

    def put(store: Artifacts, name: str, data: bytes) -> None:
        real_put(store, name, data)
        if moment == "uploaded" and name.split("/")[1] in reading:
            act()

    monkeypatch.setattr(S3T, "train", train)
    monkeypatch.setattr(Artifacts, "put", put)
    train_queued(world.context)
    (request_id,) = asked
    states = world.rows("SELECT state, token, error FROM stage_job WHERE stage_key = ANY(%s)", list(reading))
    assert {state for state, *_ in states} == {"cancelled"}
    assert {body["stage"] for body in world.events("stage.cancelled")} == reading
    assert not reading & {str(body["stage"]) for body in world.events("stage.trained")}
    world.finish(request_id)
    reap(world)
    assert world.states(request_id) == DONE
    world.no_trace_of(request_id)
    assert not reading & {name.split("/")[1] for name in world.context.artifacts.names(older_than=-60)}
    assert world.rows("SELECT 1 FROM artifact WHERE stage_key = ANY(%s) AND state <> 'destroyed'", list(reading)) == []


def test_a_deletion_before_anything_was_trained(database: Database, tmp_path: Path, small_backbone: Backbone) -> None:
    """There is no version to raise: the target waits for floor 0, which is cleared, and is certified all the same."""
    made = make_world(database, tmp_path, small_backbone)
    world = Copy(**{name: getattr(made, name) for name in World.__dataclass_fields__}, owner_url=database.owner_url)
    world.add(SUBJECTS)
    request_id = world.ask("s1")
    assert steps.plan_targets(world.context, world.model_id) == 1
    assert world.bounds() == (0, 0, 0)
    world.finish(request_id)
    assert world.states(request_id) == DONE
    world.no_trace_of(request_id)
    build(world)
    assert world.bounds() == (1, 0, 0)
    world.pool.close()


@pytest.mark.parametrize("order", ["plan while the file is written", "ingestion while the plan begins"])
def test_ingestion_and_plan_of_one_subject(world: Copy, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Rule 23: whichever commits first, no record of the subject is left in service."""
    if order.startswith("plan"):
        real_put = Artifacts.put
        world.ask("s1")
        plan = once(lambda: steps.plan_targets(world.context, world.model_id))

        def put(store: Artifacts, name: str, data: bytes) -> None:
            plan()
            real_put(store, name, data)

        monkeypatch.setattr(Artifacts, "put", put)
        done = world.add({"s1": ["s1-new"], "s2": ["s2-new"]})
        assert (done.accepted, done.skipped) == (1, 1)
    else:
        real_lock = targets.lock_subjects
        upload = once(lambda: world.add({"s1": ["s1-new"]}))

        def lock(*args: Any) -> None:
            upload()
            real_lock(*args)

        monkeypatch.setattr(targets, "lock_subjects", lock)
        world.ask("s1")
        steps.plan_targets(world.context, world.model_id)
        assert world.row("SELECT count(*) FROM tombstone") == (3,)
    assert world.active("s1") == 0


def test_ingestions_and_plans_side_by_side(world: Copy) -> None:
    chosen = [f"s{number}" for number in range(6)]
    for subject in chosen:
        start, asked = threading.Barrier(2), world.ask(subject)

        def upload(subject: str = subject, start: threading.Barrier = start) -> None:
            start.wait()
            for number in range(3):
                world.add({subject: [f"{subject}-late{number}"]})

        thread = threading.Thread(target=upload)
        thread.start()
        start.wait()
        steps.plan_targets(world.context, world.model_id)
        thread.join()
        assert world.active(subject) == 0
        world.finish(asked)
        assert world.states(asked) == DONE


def test_a_deleted_subject_is_refused_at_ingestion(world: Copy) -> None:
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    for _ in range(2):  # once deactivated, and once erased
        again = world.add({"s1": ["s1-again"], "s2": [f"s2-{len(world.events('ingestion.refused'))}"]})
        assert (again.accepted, again.skipped) == (1, 1)
        world.finish(request_id)
    assert world.events("ingestion.refused") == [{"lines": 1, "reason": "do_not_train"}] * 2
    assert world.active("s1") == 0
    line = world.line(1, "s2", "also-s1", also=("s1",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "line", lambda *_: line)
        assert world.add({"s2": ["also-s1"]}).skipped == 1


def test_a_hold_stops_erasure_but_not_deactivation(world: Copy) -> None:
    alias = world.line(0, "s1", "x").owner
    with transaction(world.pool) as connection:
        connection.execute(
            "INSERT INTO hold (hold_id, subject_id, reason_code, created_by) SELECT gen_random_uuid(), subject_id,"
            " 'litigation', %s FROM subject_alias WHERE digest = %s",
            (world.actor, alias.digest),
        )
    held, free = world.ask("s1"), world.ask("s2")
    steps.plan_targets(world.context, world.model_id)
    world.finish(held, free)
    assert world.states(held) == [("deactivated", None)]
    assert world.states(free) == DONE
    assert world.active("s1") == 0
    assert world.row("SELECT count(*) FROM record r JOIN tombstone t USING (record_id)") == (2,)
    with transaction(world.pool) as connection:
        connection.execute("UPDATE hold SET released_at = now()")
    world.finish(held)
    assert world.states(held) == DONE
    world.no_trace_of(held)


def test_erasure_waits_for_its_time(world: Copy) -> None:
    with transaction(world.pool) as connection:
        connection.execute("UPDATE model SET erase_after = '1 day'")
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    assert world.states(request_id) == [("deactivated", None)]
    with transaction(world.pool) as connection:
        connection.execute("UPDATE request_target SET deactivated_at = deactivated_at - interval '1 day'")
    world.finish(request_id)
    assert world.states(request_id) == DONE


def test_the_floor_rises_over_older_versions_that_may_still_serve(world: Copy) -> None:
    """The newest version is clean, but the floor lets servers answer from the tainted one before it."""
    with transaction(world.pool) as connection:
        model = models.lock_model(connection, world.model_id)
        empty = Assembly(model.recipe_digest, (None,) * world.recipe.shards)
        publish.publish(
            connection,
            model,
            publish.Candidate(empty, canonical=False, tainted=frozenset(), served=None, reserve=False),
            cause="rebuild",
        )
        everything = [row[0] for row in connection.execute("SELECT record_id FROM record")]
    assert world.bounds() == (2, 0, 0)
    request_id = world.ask(record_ids=everything, dataset_id=world.dataset.dataset_id)
    steps.plan_targets(world.context, world.model_id)
    assert world.bounds() == (3, 3, 0)
    assert world.row("SELECT version FROM request_target") == (3,)
    world.finish(request_id)
    assert world.states(request_id) == DONE
