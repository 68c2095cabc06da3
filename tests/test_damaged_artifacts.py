"""Files that are not what their rows say: nobody trains on them, or serves them, and none is replaced in silence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_relay_reaper import below, job_states, live_file
from test_workers_path import served
from world_copies import Copy

from service.serving.metrics import ServingMetrics
from service.serving.replica import Replica
from service.serving.weights import Weights
from service.store import jobs, leases, objects, replays, stages, work
from service.store.database import transaction
from shards.engine.s3t import S3T
from shards.engine.stacked import StackedReader
from workers import steps
from workers.barrier import Barrier
from workers.reaper import Reaper
from workers.replays import Replays
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


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Until it is undone, training gives another digest than before."""
    real = S3T.train
    monkeypatch.setattr(S3T, "train", lambda engine, *args: real(engine, *args) + b" ")
    return monkeypatch


def a_leaf(world: Copy) -> str:
    """A stage that speaks for its shard, and on which none stands."""
    (key,) = world.row(
        "SELECT member ->> 'stage' FROM model m JOIN model_version v USING (model_id, version)"
        " JOIN assembly a ON a.digest = v.assembly, jsonb_array_elements(a.body -> 'members') member LIMIT 1"
    )
    return str(key)


def train_again(world: Copy, key: str) -> None:
    """Queue the stage, whatever is there of it, and let trainer and reaper do what they do."""
    with transaction(world.pool) as connection:
        jobs.insert_jobs(connection, world.model_id, [key])
    for _ in range(world.context.settings.job_attempts):
        train_queued(world.context)
        world.rest()
    Reaper(world.pool, world.context.artifacts, job_attempts=2).look()


def stage_states(world: Copy, key: str) -> dict[str, set[str]]:
    rows = world.rows("SELECT digest, state FROM artifact WHERE stage_key = %s AND kind = 'stage'", key)
    return {digest: {state for each, state in rows if each == digest} for digest, _ in rows}


def release_all(world: Copy) -> None:
    with transaction(world.pool) as connection:
        for each in replays.list_replays(connection, world.model_id):
            replays.release(connection, world.model_id, each.replay_id, world.actor)


@pytest.mark.parametrize("lost", [False, True])
def test_another_digest_under_one_key_takes_both_out(world: Copy, other: pytest.MonkeyPatch, *, lost: bool) -> None:
    """Retrain-equal is broken, and nobody can say by which of the two: both leave service, and stay as evidence."""
    key = a_leaf(world)
    name, path = live_file(world, key)
    first = name.split("/")[2]
    before = served(world)
    if lost:
        with transaction(world.pool) as connection:
            objects.mark_lost(connection, objects.Object(name, first, key, None))
    train_again(world, key)

    (told,) = world.events("stage.digest_mismatch")
    assert (told["stage"], len(told["digests"])) == (key, 2)  # type: ignore[arg-type]
    assert first in told["digests"]  # type: ignore[operator]
    (second,) = set(told["digests"]) - {first}  # type: ignore[call-overload]
    states = stage_states(world, key)
    assert (states[first], states[second]) == ({"quarantined"}, {"quarantined", "destroyed"})
    kept = world.rows("SELECT object_name FROM artifact WHERE stage_key = %s AND state = 'quarantined'", key)
    assert path.exists()
    assert [world.context.artifacts.exists(name) for (name,) in kept] == [True, True]
    assert served(world)[0] == world.bounds()[1] == before[0] + 1
    with transaction(world.pool) as connection:
        clean = {each.digest for each in leases.list_clean_artifacts(connection, world.model_id)}
    assert not clean & {first, second}
    assert job_states(world, key) == {("failed", "Quarantined")}
    with transaction(world.pool) as connection:
        connection.execute("UPDATE artifact SET created_at = clock_timestamp()")
    assert Replays(world.pool, world.context.bell, sample=1).look() == 0  # of what was trained today
    (row,) = world.rows("SELECT digest, found, differs_at, outcome, attempts FROM replay")
    assert row == (first, second, key, "mismatch", 0)

    other.undo()
    steps.rebuild_model(world.context, world.model_id)
    train_again(world, key)
    assert job_states(world, key) == {("failed", "Quarantined")}  # neither comes back
    release_all(world)  # until an operator has found out which machine it was
    Barrier(world.pool, margin=0.05).look()
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    assert stage_states(world, key)[first] == {"quarantined", "destroyed", "live"}
    assert served(world)[1:] == before[1:]


def test_a_third_digest_is_no_way_out(world: Copy, other: pytest.MonkeyPatch) -> None:
    key = a_leaf(world)
    train_again(world, key)
    real = S3T.train
    other.setattr(S3T, "train", lambda engine, *args: real(engine, *args) + b" ")  # now two more bytes
    with transaction(world.pool) as connection:
        connection.execute("UPDATE stage_job SET state = 'cancelled' WHERE stage_key = %s", [key])
    train_again(world, key)
    assert len(stage_states(world, key)) == 3
    assert not [states for states in stage_states(world, key).values() if "live" in states]


@pytest.mark.usefixtures("other")
def test_what_stands_on_either_goes_with_it(world: Copy) -> None:
    (parent,) = world.row("SELECT parent FROM stage WHERE stage_key = %s", a_leaf(world))
    children = below(world, parent)
    train_again(world, parent)
    for child in children:
        assert set.union(*stage_states(world, child).values()) == {"quarantined"}


def test_the_same_digest_again_is_no_alarm_and_no_second_artefact(world: Copy) -> None:
    key = a_leaf(world)
    before = (live_file(world, key), served(world))
    train_again(world, key)
    assert world.events("stage.digest_mismatch") == []
    assert (live_file(world, key), served(world)) == before


def test_a_stage_on_another_parent_is_another_stage(world: Copy) -> None:
    """Its parent was lost and trained again on another platform: no contradiction, the new one takes its place."""
    key = a_leaf(world)
    name, path = live_file(world, key)
    with transaction(world.pool) as connection:
        connection.execute("UPDATE artifact SET parent_digest = %s WHERE object_name = %s", ["0" * 64, name])
        found = stages.list_open(connection, world.model_id, world.recipe.digest)
    assert key not in found.digests
    train_again(world, key)
    assert world.events("stage.digest_mismatch") == []
    assert job_states(world, key) == {("done", None)}
    assert not path.exists()
    assert live_file(world, key)[0] != name
