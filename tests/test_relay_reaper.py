"""Lost bells, dead workers, full disks, damaged files: what is left is found by its state and brought to an end."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from test_workers_path import served
from world import Bells
from world_copies import Copy

from service.store import jobs, objects
from service.store.database import transaction
from service.store.jobs import Job
from workers import relay, steps, training
from workers.barrier import Barrier
from workers.reaper import Reaper
from workers.relay import Relay
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


def reaper(world: Copy, attempts: int = 2) -> Reaper:
    return Reaper(world.pool, world.context.artifacts, job_attempts=attempts)


def age(world: Copy, table: str, column: str, seconds: int) -> None:
    with transaction(world.pool) as connection:
        connection.execute(f"UPDATE {table} SET {column} = {column} - interval '{seconds} s'".encode())


def claim(world: Copy) -> Job:
    with transaction(world.pool) as connection:
        found = jobs.claim_job(connection)
    assert found is not None
    return found


def job_states(world: Copy, *keys: str) -> set[tuple[str, str | None]]:
    return set(world.rows("SELECT state, error FROM stage_job WHERE stage_key = ANY(%s)", list(keys)))


def below(world: Copy, key: str) -> list[str]:
    return [child for (child,) in world.rows("SELECT stage_key FROM stage WHERE parent = %s", key)]


def live_file(world: Copy, key: str) -> tuple[str, Path]:
    (name,) = world.row("SELECT object_name FROM artifact WHERE stage_key = %s AND state = 'live'", key)
    return name, world.context.artifacts.files.root / name


def test_the_relay_alone_moves_a_request_to_its_end(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bell that a step rings is lost; what the state tables say is enough."""
    monkeypatch.setattr(relay, "QUIET_SECONDS", 0)
    do: dict[str, Callable[..., Any]] = {
        "targets.plan": lambda model_id: steps.plan_targets(world.context, model_id),
        "target.erase": lambda request_id, model_id: steps.erase_target(world.context, UUID(request_id), model_id),
        "target.certify": lambda request_id, model_id: steps.certify_target(world.context, UUID(request_id), model_id),
        "model.rebuild": lambda model_id: steps.rebuild_model(world.context, model_id),
        "model.publish": lambda model_id: steps.publish_model(world.context, model_id),
        "stages.train": lambda: train_queued(world.context),
    }
    request_id = world.ask("s1")
    bells, barrier = Bells(), Barrier(world.pool, margin=0.05)  # type: ignore[arg-type]
    look = Relay(world.pool, bells).look  # type: ignore[arg-type]
    while look():
        for task, ids in bells.rung[-10:]:
            do[task](*ids)
        barrier.look()
        world.log()
        age(world, "request_target", "attempted_at", 100)
        assert len(bells.rung) < 60
    assert world.shown(request_id) == ("completed", "erased")
    assert {task for task, _ in bells.rung} == do.keys()
    version, _, depths = served(world)
    assert (version, depths) == (3, (2, 2))


def test_the_relay_does_not_flood(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    world.ask("s1")
    bells = Bells()
    ringer = Relay(world.pool, bells)  # type: ignore[arg-type]
    assert [ringer.look(), ringer.look()] == [1, 1]  # the planner's is cheap to hear twice and the way is short
    steps.plan_targets(world.context, world.model_id)
    Barrier(world.pool, margin=0.05).look()  # type: ignore[arg-type]
    bells.rung.clear()
    assert [ringer.look(), ringer.look()] == [2, 0]
    assert sorted(task for task, _ in bells.rung) == ["model.rebuild", "target.erase"]
    monkeypatch.setattr(relay, "QUIET_SECONDS", 0)
    assert ringer.look() == 2
    with transaction(world.pool) as connection:  # attempts that fail come at growing distances
        connection.execute("UPDATE request_target SET attempts = 5, attempted_at = clock_timestamp()")
    assert ringer.look() == 1
    age(world, "request_target", "attempted_at", 33)
    assert ringer.look() == 2
    steps.rebuild_model(world.context, world.model_id)
    for queued, rings in ((1, 0), (0, 1)):  # a trainer takes all that it finds: one message in its queue is enough
        bells.rung.clear()
        monkeypatch.setattr(bells, "waiting", lambda _queue, queued=queued: queued)
        ringer.look()
        assert [task for task, _ in bells.rung].count("stages.train") == rings


def test_a_stalled_job_is_queued_again_and_fails_in_the_end_with_its_children(world: Copy) -> None:
    world.add({"new": ["new1"]})
    steps.rebuild_model(world.context, world.model_id)
    with transaction(world.pool) as connection:  # one that others stand on comes first
        connection.execute("UPDATE stage_job j SET queued_at = queued_at - interval '1 hour' FROM stage s"
                           " WHERE s.parent = j.stage_key AND j.state = 'queued'")  # fmt: skip
    first = claim(world)
    children = below(world, first.stage_key)
    assert children
    reaper(world).look()
    assert job_states(world, first.stage_key) == {("running", None)}
    age(world, "stage_job", "beat_at", 16)
    reaper(world).look()
    assert job_states(world, first.stage_key) == {("queued", "WorkerLost")}
    with transaction(world.pool) as connection:  # the zombie
        assert not jobs.beat(connection, first)
        assert not jobs.lock_claimed(connection, first)
    again = claim(world)
    assert (again.stage_key, again.attempts) == (first.stage_key, 2)
    age(world, "stage_job", "beat_at", 16)
    reaper(world).look()
    assert job_states(world, first.stage_key) == {("failed", "WorkerLost")}
    assert job_states(world, *children) == {("failed", "ParentFailed")}
    assert world.events("stage.failed") == [{"stage": first.stage_key, "error": "WorkerLost", "attempts": 2}]
    train_queued(world.context)
    assert steps.publish_model(world.context, world.model_id) is not None  # the rest is served
    assert steps.rebuild_model(world.context, world.model_id) == 1 + len(children)  # and an operator may ask again


def test_doomed_objects_are_destroyed_and_late_uploads_swept(world: Copy) -> None:
    (key,) = world.row("SELECT stage_key FROM stage WHERE parent IS NOT NULL LIMIT 1")
    name, path = live_file(world, key)
    data = path.read_bytes()
    with transaction(world.pool) as connection:
        objects.doom_stages(connection, [key])
    reaper(world).look()
    assert not path.exists()
    assert world.row("SELECT state, checked_at >= destroyed_at, sweeps FROM artifact WHERE object_name = %s", name) == (
        "destroyed", True, 0,
    )  # fmt: skip
    assert [body["object_name"] for body in world.events("artifact.destroyed")].count(name) == 1
    for sweeps, seconds in enumerate((61, 3601, 86401), start=1):
        world.context.artifacts.put(name, data)  # a writer that was paused
        reaper(world).look()
        assert path.exists()
        age(world, "artifact", "destroyed_at", seconds)
        reaper(world).look()
        assert not path.exists()
        assert world.row("SELECT sweeps FROM artifact WHERE object_name = %s", name) == (sweeps,)
        assert len(world.events("artifact.reappeared")) == sweeps
    age(world, "artifact", "destroyed_at", 10**7)
    reaper(world).look()
    assert world.row("SELECT sweeps FROM artifact WHERE object_name = %s", name) == (3,)


def test_objects_that_nobody_knows_are_removed_once_they_are_old(world: Copy) -> None:
    store = world.context.artifacts
    known = store.names(older_than=-60)
    strays = ["stages/a/b/old.safetensors", "stages/a/b/.old.safetensors.1.part", "cells/c/old.parquet"]
    for name in [*strays, "cells/c/fresh.parquet"]:
        store.put(name, b"x")
    for name in [*strays, *known]:
        os.utime(store.files.root / name, (0, time.time() - 3600))
    reaper(world).look()
    assert set(strays) <= set(store.names(older_than=-60))  # the store is listed once an hour
    assert reaper(world).remove_strays() == sorted(strays)
    assert sorted(store.names(older_than=-60)) == sorted([*known, "cells/c/fresh.parquet"])


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The next file cannot be written to its end."""

    def fill() -> None:
        real = os.fsync

        def fsync(descriptor: int) -> None:
            monkeypatch.setattr(os, "fsync", real)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(descriptor))

        monkeypatch.setattr(os, "fsync", fsync)

    return fill


def test_a_full_disk_leaves_nothing_half_written(world: Copy, full_disk: Callable[[], None]) -> None:
    store = world.context.artifacts
    before = store.names(older_than=-60)
    full_disk()
    with pytest.raises(OSError, match="No space"):
        world.add({"new": ["new1"]})
    assert (store.names(older_than=-60), world.active("new")) == (before, 0)
    assert world.add({"new": ["new1"]}).accepted == 1
    reaper(world).look()

    steps.rebuild_model(world.context, world.model_id)
    before = store.names(older_than=-60)
    job = claim(world)
    full_disk()
    assert training._attempt(world.context, job)[1] is False
    assert job_states(world, job.stage_key) == {("queued", "OSError")}
    assert store.names(older_than=-60) == before
    train_queued(world.context)
    assert job_states(world, job.stage_key) == {("queued", "OSError")}, "attempts keep their distance"
    world.rest()
    train_queued(world.context)
    assert job_states(world, job.stage_key) == {("done", "OSError")}
    assert world.rows("SELECT state FROM stage_job WHERE state <> 'done'") == [], "its children, where it has any, too"
    steps.publish_model(world.context, world.model_id)

    request_id = world.ask("new")
    steps.plan_targets(world.context, world.model_id)
    Barrier(world.pool, margin=0.05).look()
    full_disk()
    with pytest.raises(OSError, match="No space"):
        steps.erase_target(world.context, request_id, world.model_id)
    assert world.states(request_id) == [("erasing", None)]
    age(world, "artifact", "created_at", 3600)
    reaper(world).look()
    world.finish(request_id)
    assert world.states(request_id) == [("completed", "erased")]
    world.no_trace_of(request_id)
    assert world.rows("SELECT 1 FROM artifact WHERE state NOT IN ('live', 'destroyed')") == []
