"""The process of its own that replays a stage: it is another one, and ends, dies and is replaced without harm."""

import signal
import subprocess
import sys

import pytest
from test_replays import claimed, drawn, figures, leaf_of, loop_of, outcome, world
from test_workers_path import served
from world import Bells
from world_copies import Copy

from service.store import replays
from service.store.database import transaction
from shards.engine.s3t import S3T
from workers import replays as loop
from workers.replay_one import ENDED, replay_one
from workers.replays import ATTEMPTS, run_replay

__all__ = ["world"]  # a fixture
pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


def test_a_served_stage_is_trained_again_in_another_process(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    (replay_id,) = drawn(world)
    before = served(world)

    def here(*_: object) -> bytes:
        raise AssertionError("trained in the worker's own process")

    monkeypatch.setattr(S3T, "train", here)
    monkeypatch.setattr("workers.replays.log.warning", lambda *_, **said: pytest.fail(str(said)))
    assert run_replay(world.context, replay_id)
    assert outcome(world, replay_id) == ("equal", None)
    (body,) = world.events("stage.replay_equal")
    assert body["stage"] == leaf_of(world, replay_id)
    assert served(world) == before
    assert not run_replay(world.context, replay_id)  # rung twice
    read = figures(world)
    assert read.replays_by_outcome == {"equal": 1}
    assert read.replayable_by_model == {"tiny": 1.0}


def test_a_replay_whose_worker_dies_is_taken_up_and_given_up_in_the_end(
    world: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    (replay_id,) = drawn(world)
    zombie = claimed(world, replay_id)
    with transaction(world.pool) as connection:
        assert replays.list_due(connection) == []
        assert replays.claim_replay(connection, replay_id, host="other", seconds=30) is None
        assert replays.beat(connection, zombie, seconds=-1)  # its time is over
        assert replays.list_due(connection) == [replay_id]
    claimed(world, replay_id)
    assert replay_one(world.context, replay_id, zombie.token) is None
    with transaction(world.pool) as connection:
        connection.execute("UPDATE replay SET due_at = clock_timestamp()")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run_replay(world.context, replay_id)
    assert outcome(world, replay_id) == (None, "ProcessDied")
    look = loop_of(world, Bells()).look
    look()
    assert outcome(world, replay_id) == (None, "ProcessDied")  # due again only after a while
    with transaction(world.pool) as connection:
        connection.execute("UPDATE replay SET due_at = clock_timestamp()")
    look()
    assert world.row("SELECT attempts FROM replay") == (ATTEMPTS,)
    assert outcome(world, replay_id) == ("failed", "ProcessDied")
    (body,) = world.events("stage.replay_failed")
    assert body["error"] == "ProcessDied"


def test_a_process_whose_replay_was_given_to_another_is_ended(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    (replay_id,) = drawn(world)
    stays = world.context.artifacts.files.root / "stays"
    stays.write_text("#!/bin/sh\nexec sleep 600\n")
    stays.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(stays))
    monkeypatch.setattr(loop, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(loop, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(replays, "beat", lambda *_, **__: False)
    assert run_replay(world.context, replay_id)
    assert outcome(world, replay_id) == (None, "ProcessDied")


@pytest.mark.parametrize("inherited", [signal.SIG_DFL, signal.SIG_IGN], ids=["foreground", "background"])
def test_a_process_leaves_with_its_worker(
    world: Copy, monkeypatch: pytest.MonkeyPatch, inherited: signal.Handlers
) -> None:
    """The real process, told to leave by the end of its input. Shells make background programs ignore SIGINT."""
    (replay_id,) = drawn(world)
    claim = claimed(world, replay_id)
    monkeypatch.setattr(loop, "LEAVE_SECONDS", 60)
    ours = signal.signal(signal.SIGINT, inherited)  # here, not in `preexec_fn`, which would copy this whole process
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.replay_one", str(claim.replay_id), str(claim.token)],
            env=loop._environment(world.context.settings),
            stdin=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, ours)
    loop._end(process)
    assert process.returncode == ENDED
    assert outcome(world, replay_id) == (None, None)


def test_another_machine_of_the_same_platform_goes_first(world: Copy) -> None:
    (replay_id,) = drawn(world)
    (mine,) = world.row("SELECT made_by FROM replay")
    with transaction(world.pool) as connection:
        connection.execute("UPDATE machine SET host = 'other'")
        assert replays.claim_replay(connection, replay_id, host=mine, seconds=30) is None
        connection.execute("UPDATE replay SET drawn_at = drawn_at - interval '2 hours'")
        assert replays.claim_replay(connection, replay_id, host=mine, seconds=-1) is not None
        connection.execute("UPDATE replay SET drawn_at = now()")
        assert replays.claim_replay(connection, replay_id, host="other", seconds=30) is not None
