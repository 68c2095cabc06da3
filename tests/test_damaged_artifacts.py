"""Files that are not what their rows say: nobody trains on them, or serves them, and none is replaced in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_relay_reaper import below, job_states, live_file
from test_workers_path import served
from world_copies import Copy

from service.serving.metrics import ServingMetrics
from service.serving.replica import Replica
from service.serving.weights import Weights
from service.store import jobs, leases, objects, work
from service.store.database import transaction
from shards.engine.s3t import S3T
from shards.engine.stacked import StackedReader
from workers import steps
from workers.reaper import Reaper
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


def a_parent(world: Copy) -> tuple[str, str]:
    """A stage whose child lost its artefact and is queued again."""
    (parent,) = world.row("SELECT parent FROM stage WHERE parent IS NOT NULL ORDER BY stage_key LIMIT 1")
    (child,) = below(world, parent)
    with transaction(world.pool) as connection:
        objects.doom_stages(connection, [child])
        jobs.insert_jobs(connection, world.model_id, [child])
        connection.execute("UPDATE model SET building = true")
    return parent, child


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # the copy shares its files
    path.write_bytes(data)


def test_a_damaged_artefact_is_refused_for_training_and_for_serving(world: Copy) -> None:
    parent, child = a_parent(world)
    name, path = live_file(world, parent)
    damage(path)
    replica = Replica(world.model_id, "tiny", ServingMetrics())
    weights = Weights(replica, world.context.artifacts.get, StackedReader, ServingMetrics())
    with transaction(world.pool) as connection:
        target = leases.get_target(connection, world.model_id)
        clean = leases.list_clean_artifacts(connection, world.model_id)
    assert not weights.maintain(target, clean, lambda: False)
    held = weights._reader.held() if weights._reader else frozenset()
    assert name.split("/")[2] not in held
    assert len(held) == len(clean) - 1
    needed = json.dumps(target.body)
    assert (replica.pointer is None) == (name.split("/")[2] in needed)

    train_queued(world.context)
    assert job_states(world, child) == {("queued", "ArtifactDigestError")}
    assert world.rows("SELECT 1 FROM artifact WHERE stage_key = %s AND state IN ('live', 'writing')", child) == []


@pytest.mark.parametrize("harm", [Path.unlink, damage])
def test_a_lost_artefact_is_trained_again(world: Copy, harm: Callable[[Path], None]) -> None:
    """Rule 20: its stage is unusable, what stands on it waits, and the relay hears that something is missing."""
    parent, child = a_parent(world)
    name, path = live_file(world, parent)
    harm(path)
    train_queued(world.context)
    assert world.row("SELECT state FROM artifact WHERE object_name = %s", name) == ("lost",)
    assert [body["object_name"] for body in world.events("artifact.lost")] == [name]
    with transaction(world.pool) as connection:
        assert work.list_to_rebuild(connection) == [world.model_id]
    steps.rebuild_model(world.context, world.model_id)
    world.rest()
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    assert {state for state, _ in job_states(world, parent, child)} == {"done"}
    assert live_file(world, parent)[1].exists()
    _, _, depths = served(world)
    assert depths == (2, 2)


def test_another_digest_under_one_key_raises_the_alarm(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retrain-equal is broken: the first artefact keeps serving, the second is destroyed, both digests are told."""
    real = S3T.train

    def train(engine: S3T, *args: Any) -> bytes:
        return real(engine, *args) + b" "

    (key,) = world.row("SELECT stage_key FROM stage WHERE parent IS NULL LIMIT 1")
    name, path = live_file(world, key)
    first = path.read_bytes()

    def again() -> None:
        with transaction(world.pool) as connection:
            jobs.insert_jobs(connection, world.model_id, [key])
        for _ in range(world.context.settings.job_attempts):
            train_queued(world.context)
            world.rest()
        Reaper(world.pool, world.context.artifacts, job_attempts=2).look()

    before = served(world)
    monkeypatch.setattr(S3T, "train", train)
    again()
    assert job_states(world, key) == {("failed", "DigestMismatch")}
    told = world.events("stage.digest_mismatch")
    assert [body["stage"] for body in told] == [key, key]
    digest = name.split("/")[2]
    assert all(digest in body["digests"] and len(body["digests"]) == 2 for body in told)  # type: ignore[operator,arg-type]
    states = world.rows("SELECT state FROM artifact WHERE stage_key = %s ORDER BY state", key)
    assert states == [("live",), ("destroyed",), ("destroyed",)]
    assert (live_file(world, key), path.read_bytes(), served(world)) == ((name, path), first, before)

    monkeypatch.undo()
    again()  # the same digest is no alarm, and no second live artefact
    assert len(world.events("stage.digest_mismatch")) == 2
    assert live_file(world, key) == (name, path)
