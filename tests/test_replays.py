"""Replays: drawn once a day, trained again in a process of their own; what differs leaves service, and is kept."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import Database
from test_relay_reaper import below, job_states
from test_workers_path import build, served
from world import Bells, World, make_world
from world_copies import SUBJECTS, Copy, Mould

from service.domain.errors import NotFoundError
from service.domain.replays import ReplayOutcome, draw
from service.store import gauges, grid, lineage, models, objects, payloads, publish, quarantine, replays, stages
from service.store import served as served_stages
from service.store.database import transaction
from service.store.replays import Claim
from shards.assembly import Member
from shards.digest import digest_of, sha256_hex
from shards.engine.determinism import prepare
from shards.engine.registry import open_trainer
from shards.engine.s3t import S3T
from shards.recipe import Backbone, Ridge
from workers import steps
from workers.barrier import Barrier
from workers.reaper import Reaper
from workers.replay_one import replay_one
from workers.replays import Replays
from workers.training import train_queued
from workers.verdicts import Verdict, end_replay

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


@pytest.fixture
def world(trained: Mould, tmp_path: Path) -> Iterator[Copy]:
    """A trained installation whose stages were made yesterday."""
    with trained.copy(tmp_path) as copy:
        settings = copy.context.settings.model_copy(update={"redis_url": f"unix://{tmp_path}/nobody?db=0"})
        copy.context = replace(copy.context, settings=settings)
        age(copy)
        yield copy


def age(world: World) -> None:
    with transaction(world.pool) as connection:
        connection.execute("UPDATE artifact SET created_at = created_at - interval '1 day'")


def loop_of(world: World, bells: Bells, sample: int = 1) -> Replays:
    return Replays(world.pool, bells, sample=sample)  # type: ignore[arg-type]


def drawn(world: World, sample: int = 1) -> list[int]:
    """Replays of today's sample."""
    assert loop_of(world, Bells(), sample).look() == sample
    return [i for (i,) in world.rows("SELECT replay_id FROM replay WHERE outcome IS NULL ORDER BY replay_id")]


def claimed(world: World, replay_id: int, host: str = "here") -> Claim:
    with transaction(world.pool) as connection:
        found = replays.claim_replay(connection, replay_id, host=host, seconds=30)
    assert found is not None
    return found


def replayed(world: World, replay_id: int) -> Verdict | None:
    """What the fresh process would do, in this one."""
    claim = claimed(world, replay_id)
    return replay_one(world.context, claim.replay_id, claim.token)


def outcome(world: Copy, replay_id: int) -> tuple[str | None, str | None]:
    return world.row("SELECT outcome, reason FROM replay WHERE replay_id = %s", replay_id)  # type: ignore[return-value]


def leaf_of(world: Copy, replay_id: int) -> str:
    return world.row("SELECT stage_key FROM replay WHERE replay_id = %s", replay_id)[0]


def figures(world: World) -> gauges.Figures:
    with transaction(world.pool) as connection:
        return gauges.read_figures(connection)


def plant(world: Copy, key: str) -> tuple[str, str]:
    """Swap the stage's artefact and its rows for one trained on fewer records, and serve it: digest and file name."""
    with transaction(world.pool) as connection:
        stage = stages.list_by_key(connection, [key], world.recipe.digest)[key]
        found = stages.list_open(connection, world.model_id, world.recipe.digest)
        reads = lineage.list_reads(connection, key)
    records = [
        e.record for r in reads if r.object_name for e in payloads.decode(world.context.artifacts.get(r.object_name))
    ]
    parents = [world.context.artifacts.get(found.objects[found.digests[stage.parent]])] if stage.parent else []
    prepare()
    data = open_trainer(world.recipe, "cpu").train(stage, records[:-2], parents)
    digest, old = sha256_hex(data), found.digests[key]
    assert digest != old
    world.context.artifacts.delete(found.objects[old])
    name = f"stages/{key}/{digest}/{uuid4()}.safetensors"
    world.context.artifacts.put(name, data)
    with transaction(world.pool) as connection:
        connection.execute(
            "UPDATE artifact SET object_name = %s, digest = %s WHERE digest = %s AND stage_key = %s",
            [name, digest, old, key],
        )
        connection.execute("UPDATE artifact SET parent_digest = %s WHERE parent_digest = %s", [digest, old])
        model = models.lock_model(connection, world.model_id)
        publish.publish(connection, model, publish.candidate(connection, model), cause="rebuild")
    return digest, name


def members(world: Copy) -> list[Member]:
    with transaction(world.pool) as connection:
        assembly = grid.served(connection, models.get_model_by_id(connection, world.model_id))
    assert assembly is not None
    return [member for member in assembly.members if member]


def states(world: Copy, key: str) -> list[tuple[str, str]]:
    return world.rows("SELECT digest, state FROM artifact WHERE stage_key = %s AND kind = 'stage' ORDER BY state", key)  # type: ignore[return-value]


def test_the_sample_is_drawn_once_a_day_and_is_nobodys_choice(world: Copy) -> None:
    bells = Bells()
    first = loop_of(world, bells)
    assert [first.look(), first.look(), loop_of(world, Bells()).look()] == [1, 0, 0]
    (replay_id,) = [i for (i,) in world.rows("SELECT replay_id FROM replay")]
    assert bells.rung == [("stages.replay", (replay_id,))]
    with transaction(world.pool) as connection:
        leaves = {each.leaf for each in served_stages.list_served(connection, world.model_id)}
    (day,) = world.row("SELECT current_date")
    assert len(leaves) == world.recipe.shards
    assert [leaf_of(world, replay_id)] == draw(leaves, 1, f"{day}:{world.model_id}")
    with transaction(world.pool) as connection:  # the next day; yesterday's was never taken
        connection.execute("UPDATE replay SET drawn_on = drawn_on - 1")
    assert loop_of(world, bells, sample=5).look() == 2
    assert loop_of(world, bells, sample=0).look() == 0


def test_nothing_is_drawn_of_what_was_trained_today_or_is_not_wanted(world: Copy) -> None:
    assert loop_of(world, Bells(), sample=0).look() == 0
    with transaction(world.pool) as connection:
        connection.execute("UPDATE artifact SET created_at = clock_timestamp()")
    bells = Bells()
    assert loop_of(world, bells).look() == 0
    assert bells.rung == []


@pytest.mark.parametrize("place", ["leaf", "root"])
def test_a_wrong_stage_leaves_service_and_is_kept(world: Copy, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (replay_id,) = drawn(world)
    leaf = leaf_of(world, replay_id)
    (root,) = world.row("SELECT parent FROM stage WHERE stage_key = %s", leaf)
    key = leaf if place == "leaf" else root
    (true,) = [digest for digest, _ in states(world, key)]
    wrong, name = plant(world, key)
    with transaction(world.pool) as connection:
        connection.execute("UPDATE replay SET digest = %s WHERE stage_key = %s AND digest = %s", [wrong, key, true])
    version, _, depths = served(world)
    said: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("workers.verdicts.log.error", lambda event, **fields: said.append((event, fields)))

    verdict = replayed(world, replay_id)

    assert verdict is not None
    assert (verdict.outcome, verdict.stage, verdict.expected, verdict.found) == ("mismatch", key, wrong, true)
    assert outcome(world, replay_id) == ("mismatch", None)
    assert said == [("stage.replay_mismatch", {"stage": key, "digest": wrong, "replayed": true})]
    (body,) = world.events("stage.replay_mismatch")
    assert (body["stage"], body["digest"], body["replayed"]) == (key, wrong, true)
    gone = {key, *below(world, key)}
    assert {body["object_name"].split("/")[1] for body in world.events("artifact.quarantined")} == gone  # type: ignore[attr-defined]
    assert name in body["artifacts"]  # type: ignore[operator]
    assert states(world, key) == [(wrong, "quarantined")]
    after, _, now = served(world)
    assert after == version + 1
    assert world.bounds()[1] == after  # no replica may serve an older one
    assert sum(now) <= sum(depths)
    assert all(wrong not in member.artifacts for member in members(world))
    assert figures(world).replays_by_outcome == {"mismatch": 1}
    # The evidence stays, whoever comes by; what is missing is trained again, to the true digest.
    Barrier(world.pool, margin=0.05).look()
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    reaper = Reaper(world.pool, world.context.artifacts, job_attempts=2)
    reaper.look()
    reaper.remove_strays()
    assert sha256_hex(world.context.artifacts.get(name)) == wrong
    assert states(world, key) == [(true, "live"), (wrong, "quarantined")]
    assert served(world)[2] == depths
    # Except an erasure of what it was trained on.
    (shard, pieces) = world.row("SELECT shard, prefix FROM stage WHERE stage_key = %s", key)
    subject = subject_in(world, shard, pieces[0])
    request_id = world.ask(subject)
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    assert world.shown(request_id) == ("completed", "erased")
    assert {state for _, state in states(world, key)} == {"destroyed"}
    assert not world.context.artifacts.exists(name)
    world.no_trace_of(request_id)


def subject_in(world: Copy, shard: int, piece: int) -> str:
    for subject in SUBJECTS:
        digest = world.line(0, subject, "x").owner.digest
        if world.rows(
            "SELECT 1 FROM record r JOIN cell c USING (cell_id) JOIN subject_alias a ON a.subject_id = r.owner_id"
            " WHERE a.digest = %s AND c.shard = %s AND c.slice = %s",
            digest,
            shard,
            piece,
        ):
            return subject
    raise AssertionError("an empty cell")


def test_a_digest_that_was_taken_out_does_not_come_back(world: Copy) -> None:
    """A machine that is wrong at times: the retraining that agrees with the refused artefact is refused, too."""
    (replay_id,) = drawn(world)
    key = leaf_of(world, replay_id)
    claim = claimed(world, replay_id)
    with transaction(world.pool) as connection:
        (platform,) = [e.platform for e in served_stages.list_platforms(connection, [key])]
    verdict = Verdict(ReplayOutcome.MISMATCH, platform, "0" * 64, key, claim.digest)
    assert end_replay(world.context, claim, verdict)
    assert not end_replay(world.context, claim, verdict)  # ended: a second verdict changes nothing
    steps.rebuild_model(world.context, world.model_id)
    for _ in range(world.context.settings.job_attempts):
        train_queued(world.context)
        world.rest()
    assert job_states(world, key) == {("failed", "Quarantined")}
    assert {body["reason"] for body in world.events("stage.refused")} == {"Quarantined"}
    with transaction(world.pool) as connection:
        assert quarantine.list_digests(connection, world.model_id, key, digest_of(platform)) == [claim.digest]
    # Until somebody finds that it was the replay that was wrong.
    with transaction(world.pool) as connection:
        replays.release(connection, world.model_id, replay_id, world.actor)
        with pytest.raises(NotFoundError, match="mismatch to release"):
            replays.release(connection, world.model_id, replay_id, world.actor)
    Barrier(world.pool, margin=0.05).look()
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    assert (claim.digest, "live") in states(world, key)
    assert (claim.digest, "quarantined") in states(world, key)
    assert key in [member.stage for member in members(world)]
    (body,) = world.events("stage.replay_released")
    assert (body["stage"], body["actor"]) == (key, world.actor)


def test_running_jobs_on_a_wrong_stage_are_cancelled(world: Copy) -> None:
    (replay_id,) = drawn(world)
    (root,) = world.row("SELECT parent FROM stage WHERE stage_key = %s", leaf_of(world, replay_id))
    children = below(world, root)
    claim = claimed(world, replay_id)
    with transaction(world.pool) as connection:
        objects.doom_stages(connection, children)
        connection.execute("UPDATE stage_job SET state = 'running' WHERE stage_key = ANY(%s)", [children])
        (made,) = served_stages.list_platforms(connection, [root])
    assert end_replay(world.context, claim, Verdict(ReplayOutcome.MISMATCH, made.platform, "0" * 64, root, made.digest))
    assert job_states(world, *children) == {("cancelled", None)}
    assert [body["stage"] for body in world.events("stage.cancelled")] == children


def made_elsewhere(world: Copy) -> str:
    """Pretend that every artefact was made with other instructions; the other platform's fingerprint."""
    (body,) = world.row("SELECT p.body FROM platform p JOIN artifact a USING (fingerprint) LIMIT 1")
    other = body | {"isa": "NEON"}
    with transaction(world.pool) as connection:
        objects.insert_platform(connection, digest_of(other), other)
        connection.execute("UPDATE artifact SET fingerprint = %s WHERE fingerprint IS NOT NULL", [digest_of(other)])
    return digest_of(other)


def test_another_platform_is_said_and_harms_nothing(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    other = made_elsewhere(world)
    (replay_id,) = drawn(world)
    before = served(world)
    monkeypatch.setattr(S3T, "train", lambda *_: pytest.fail("trained although nothing can be compared"))
    verdict = replayed(world, replay_id)
    assert verdict is not None
    assert (verdict.outcome, verdict.differs) == ("other_platform", ("isa",))
    (body,) = world.events("stage.replay_other_platform")
    assert (body["fingerprint"], body["differs"]) == (other, ["isa"])
    assert body["platform"] != other
    assert served(world) == before
    assert figures(world).replays_by_outcome == {"other_platform": 1}
    assert figures(world).replayable_by_model == {"tiny": 0.0}


def test_the_share_counts_what_todays_machines_can_train_again(world: Copy) -> None:
    with transaction(world.pool) as connection:
        connection.execute("UPDATE machine SET seen_at = seen_at - interval '8 days'")
    assert figures(world).replayable_by_model == {}  # no machine is known
    (replay_id,) = drawn(world)
    replayed(world, replay_id)
    assert figures(world).replayable_by_model == {"tiny": 1.0}
    made_elsewhere(world)
    assert figures(world).replayable_by_model == {"tiny": 0.0}


def test_what_left_service_meanwhile_is_skipped(world: Copy) -> None:
    first, second = drawn(world, 2)
    (shard, pieces) = world.row("SELECT shard, prefix FROM stage WHERE stage_key = %s", leaf_of(world, first))
    request_id = world.ask(subject_in(world, shard, pieces[0]))
    steps.plan_targets(world.context, world.model_id)
    before = served(world)
    replayed(world, first)
    assert outcome(world, first) == ("skipped", "Tainted")
    world.finish(request_id)
    assert world.shown(request_id) == ("completed", "erased")
    (body,) = world.events("stage.replay_skipped")
    assert body["reason"] == "Tainted"
    assert served(world) == before
    with transaction(world.pool) as connection:
        connection.execute("UPDATE artifact SET state = 'lost' WHERE stage_key = %s", [leaf_of(world, second)])
    replayed(world, second)
    assert outcome(world, second) == ("skipped", "Replaced")


def test_a_deletion_during_a_replay_ends_it(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    (replay_id,) = drawn(world)
    (shard, pieces) = world.row("SELECT shard, prefix FROM stage WHERE stage_key = %s", leaf_of(world, replay_id))
    real, subject = S3T.train, subject_in(world, shard, pieces[0])
    monkeypatch.setattr("workers.replay_one.LOOK_SECONDS", 0)
    trained: list[str] = []

    def train(engine: S3T, *args: Any) -> bytes:
        world.ask(subject)
        steps.plan_targets(world.context, world.model_id)
        data = real(engine, *args)
        trained.append("all of it")
        return data

    monkeypatch.setattr(S3T, "train", train)
    replayed(world, replay_id)
    assert outcome(world, replay_id) == ("skipped", "Tainted")
    assert trained == []


@pytest.mark.parametrize(
    "changes",
    [{"engine": "sisa"}, {"engine": "ridge", "ridge": Ridge(layers=2, bits=6, penalty=0.5)}],
    ids=["sisa", "ridge"],
)
def test_stages_of_every_engine_are_replayed(
    database: Database, tmp_path: Path, small_backbone: Backbone, changes: dict[str, Any]
) -> None:
    made = make_world(database, tmp_path, small_backbone, orders=1, **changes)
    made.add({f"s{number}": [f"s{number}a"] for number in range(20)})
    build(made)
    age(made)
    (replay_id,) = drawn(made)
    verdict = replayed(made, replay_id)
    assert verdict is not None
    assert verdict.outcome == "equal"
    assert figures(made).replayable_by_model == {"tiny": 1.0}
    made.pool.close()
