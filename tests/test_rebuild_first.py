"""`rebuild_first`: the replacement is trained, then one swap deactivates; nothing is served worse, nothing too late."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import test_workers_crash
from test_erasure import add_model, train, verified
from test_planner import DONE, in_cells
from test_workers_crash import KilledError, Killer, revive
from test_workers_path import served
from world_copies import SUBJECTS, Copy, Mould

from service.domain.requests import Kind
from service.store import deferrals, leases, lifts, models, publish, stages, work
from service.store.database import transaction
from service.store.policies import set_policy
from shards import plan
from shards.engine.s3t import S3T
from shards.rebuild import Policy
from shards.stages import Stage
from workers import steps
from workers.relay import Relay
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
killer = test_workers_crash.killer
pytestmark = pytest.mark.integration

FIRST = Policy(kind="rebuild_first")


@pytest.fixture
def first(world: Copy) -> Copy:
    with transaction(world.pool) as connection:
        models.mark_policy(connection, world.model_id, FIRST)
    return world


def serving(world: Copy) -> set[str]:
    """Keys of the stages that the newest version serves."""
    (body,) = world.row(
        "SELECT a.body FROM model m JOIN model_version v USING (model_id, version)"
        " JOIN assembly a ON a.digest = v.assembly WHERE m.model_id = %s",
        world.model_id,
    )
    return {member["stage"] for member in body["members"] if member}


def reading(world: Copy, request_id: UUID) -> set[str]:
    """Stages whose lineage holds a record of the request."""
    with transaction(world.pool) as connection:
        keys = [key for (key,) in connection.execute("SELECT stage_key FROM stage")]
        touched = stages.list_touched_by(connection, keys, [request_id])[request_id]
        found = stages.list_by_key(connection, keys, world.recipe.digest)
    return set(plan.tainted(found.values(), touched))


def in_one_shard(world: Copy) -> tuple[str, str]:
    """Subjects of two slices of one shard: each one's deletion takes stages that the other's replacement stands on."""
    found = in_cells(world)
    one, two = sorted(found)[:2]  # cells are numbered by shard, then slice
    return found[one], found[two]


def swap(world: Copy) -> None:
    """Train the replacement, let the last job end, and the planner swap."""
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    assert steps.publish_model(world.context, world.model_id) is None
    steps.plan_targets(world.context, world.model_id)


def test_the_replacement_is_trained_first_and_one_swap_deactivates(first: Copy) -> None:
    assert served(first)[0::2] == (1, (2, 2))
    request_id = first.ask("s1")
    assert steps.plan_targets(first.context, first.model_id) == 1
    assert first.states(request_id) == [("received", None)]
    assert served(first)[0::2] == (1, (2, 2))
    assert serving(first) & reading(first, request_id)
    assert first.bounds() == (1, 0, 0)
    assert first.active("s1") == 0  # sealed: out of new manifests, and nobody ingests them again
    assert first.add({"s1": ["s1-again"], "s2": ["s2-more"]}).skipped == 1
    assert steps.plan_targets(first.context, first.model_id) == 0
    swap(first)
    assert first.states(request_id) == [("deactivating", None)]
    assert first.bounds() == (2, 2, 0)
    assert served(first)[0::2] == (2, (2, 2))  # no gap
    assert not serving(first) & reading(first, request_id)
    assert first.row("SELECT cause FROM model_version WHERE version = 2") == ("deactivate",)
    assert first.rows("SELECT 1 FROM deferral") == []
    first.finish(request_id)
    assert first.states(request_id) == DONE
    assert verified(first, request_id)
    first.no_trace_of(request_id)


def test_the_swap_serves_what_a_rebuild_afterwards_would(first: Copy, trained: Mould, tmp_path: Path) -> None:
    """The same artefacts to the bit: when a stage is trained decides nothing about it."""
    subjects = ("s1", "s2", "ann")
    for subject in subjects:
        first.ask(subject)
    steps.plan_targets(first.context, first.model_id)
    swap(first)
    directory = tmp_path / "other"
    directory.mkdir()
    with trained.copy(directory) as other:
        for subject in subjects:
            other.ask(subject)
        steps.plan_targets(other.context, other.model_id)
        assert served(other)[2] != (2, 2)
        train(other, other.model_id)
        assert (served(other)[0], served(first)[0]) == (3, 2)
        assert served(other)[1:] == served(first)[1:]


@pytest.mark.parametrize("trains", [False, True])
def test_a_request_that_is_withdrawn_while_it_waits_leaves_no_trace(first: Copy, *, trains: bool) -> None:
    before, rows = served(first), first.active("s1")
    request_id = first.ask("s1")
    steps.plan_targets(first.context, first.model_id)
    assert first.active("s1") == 0
    if trains:
        steps.rebuild_model(first.context, first.model_id)
        train_queued(first.context)
    with transaction(first.pool) as connection:
        lifts.revoke(connection, request_id, actor=first.actor, reason_code="withdrawn")
    assert first.states(request_id) == [("revoked", None)]
    assert first.active("s1") == rows
    assert first.rows("SELECT 1 FROM deferral") == []
    steps.rebuild_model(first.context, first.model_id)
    train_queued(first.context)
    steps.publish_model(first.context, first.model_id)
    assert steps.plan_targets(first.context, first.model_id) == 0
    assert served(first)[1] == before[1]
    assert first.add({"s1": ["s1-later"]}).accepted == 1
    again = first.ask("s1")
    steps.plan_targets(first.context, first.model_id)
    assert first.states(again) == [("received", None)]
    swap(first)
    first.finish(again)
    assert first.states(again) == DONE
    assert not serving(first) & reading(first, again)


def test_a_server_that_starts_meanwhile_finds_what_is_served(first: Copy) -> None:
    request_id = first.ask("s1")
    steps.plan_targets(first.context, first.model_id)
    with transaction(first.pool) as connection:
        clean = {found.stage_key for found in leases.list_clean_artifacts(connection, first.model_id)}
    assert serving(first) <= clean
    swap(first)
    with transaction(first.pool) as connection:
        clean = {found.stage_key for found in leases.list_clean_artifacts(connection, first.model_id)}
    assert not clean & reading(first, request_id)


@pytest.mark.parametrize("days", [0.5, 1.0])
def test_a_due_date_that_is_near_deactivates_at_once(first: Copy, days: float) -> None:
    request_id = first.ask("s1", due_at=datetime.now(UTC) + timedelta(days=days))
    steps.plan_targets(first.context, first.model_id)
    assert first.states(request_id) == [("deactivating", None)]
    assert first.bounds() == (2, 2, 0)
    assert not serving(first) & reading(first, request_id)


def test_a_due_date_that_comes_near_ends_the_wait(first: Copy) -> None:
    near, far = first.ask("s1"), first.ask("s2")
    steps.plan_targets(first.context, first.model_id)
    with transaction(first.pool) as connection:
        assert work.list_to_plan(connection) == []
        connection.execute("UPDATE request_target SET deferred_until = now() WHERE request_id = %s", [near])
        assert work.list_to_plan(connection) == [first.model_id]
    assert steps.plan_targets(first.context, first.model_id) == 1
    assert first.states(near) == [("deactivating", None)]
    assert first.states(far) == [("received", None)]
    assert first.bounds() == (2, 2, 0)
    assert not serving(first) & reading(first, near)
    swap(first)
    first.finish(near, far)
    assert (first.states(near), first.states(far)) == (DONE, DONE)
    assert verified(first, near)
    assert verified(first, far)
    assert served(first)[2] == (2, 2)


def test_a_second_request_joins_the_wait(first: Copy) -> None:
    one, two = in_one_shard(first)
    early = first.ask(one)
    steps.plan_targets(first.context, first.model_id)
    assert steps.rebuild_model(first.context, first.model_id) > 0
    late = first.ask(two)
    steps.plan_targets(first.context, first.model_id)
    assert first.events("stage.cancelled")  # what was queued would have read its records
    assert [first.states(each) for each in (early, late)] == [[("received", None)]] * 2
    train_queued(first.context)
    assert steps.publish_model(first.context, first.model_id) is None
    assert first.bounds() == (1, 0, 0)  # the second's replacement is not planned yet
    swap(first)
    assert first.bounds() == (2, 2, 0)
    assert served(first)[2] == (2, 2)
    first.finish(early, late)
    assert (first.states(early), first.states(late)) == (DONE, DONE)
    assert not serving(first) & (reading(first, early) | reading(first, late))
    assert verified(first, late)


def test_another_model_on_the_dataset_deactivates_at_once(first: Copy) -> None:
    other = add_model(first, "other")
    train(first, other)
    request_id = first.ask("s1")
    for model_id in (first.model_id, other):
        steps.plan_targets(first.context, model_id)
    assert first.states(request_id) == [("received", None), ("deactivating", None)]
    assert first.row("SELECT version, floor FROM model WHERE model_id = %s", other) == (2, 2)
    with transaction(first.pool) as connection:
        found = publish.candidate(connection, models.get_model_by_id(connection, other))
    assert not {m.stage for m in found.assembly.members if m} & found.tainted
    first.finish(request_id)  # the other's erasure takes the payloads; this one's weights serve on until the swap
    assert first.states(request_id) == [("received", None), *DONE]
    assert first.shown(request_id) == ("received", None)
    assert serving(first) & reading(first, request_id)
    swap(first)
    first.finish(request_id)
    assert first.states(request_id) == DONE * 2
    assert served(first)[2] == (2, 2)
    assert verified(first, request_id)
    first.no_trace_of(request_id)


@pytest.mark.parametrize("faster", ["this", "other"])
def test_whichever_model_plans_first_only_this_one_waits(first: Copy, faster: str) -> None:
    other = add_model(first, "other")
    train(first, other)
    request_id = first.ask("s1")
    order = (first.model_id, other) if faster == "this" else (other, first.model_id)
    for model_id in order:
        steps.plan_targets(first.context, model_id)
    assert first.states(request_id) == [("received", None), ("deactivating", None)]
    assert served(first)[0::2] == (1, (2, 2))


def test_a_stage_that_read_a_deferred_record_is_never_published(first: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 21, for records that this very model still serves: cancelled, and refused if it was not heard of."""
    first.add({"new": ["new-record"]})
    (cell_id,) = first.row("SELECT cell_id FROM record ORDER BY added DESC LIMIT 1")
    assert steps.rebuild_model(first.context, first.model_id) > 0
    coming = {key for (key,) in first.rows(
        "SELECT stage_key FROM stage_cell JOIN stage_job USING (stage_key) WHERE cell_id = %s"
        " AND stage_job.state = 'queued'", cell_id)}  # fmt: skip
    asked: list[UUID] = []
    real = S3T.train

    def train_(engine: S3T, stage: Stage, *args: Any) -> bytes:
        data = real(engine, stage, *args)
        if stage.key in coming and not asked:
            asked.append(first.ask(in_cells(first)[cell_id]))
            steps.plan_targets(first.context, first.model_id)
            with transaction(first.pool) as connection:  # as if the cancellation had come too late
                connection.execute("UPDATE stage_job SET state = 'running', token = token - 1 WHERE stage_key = %s",
                                   [stage.key])  # fmt: skip
        return data

    monkeypatch.setattr(S3T, "train", train_)
    train_queued(first.context)
    assert first.states(asked[0]) == [("received", None)]
    assert serving(first) & reading(first, asked[0])
    assert {body["reason"] for body in first.events("stage.refused")} == {"Tainted"}
    live = {key for (key,) in first.rows("SELECT stage_key FROM artifact WHERE kind = 'stage' AND state = 'live'")}
    assert not live & coming


@pytest.mark.parametrize("moment", ["queued", "trained", "ended"])
def test_a_crash_on_the_way_to_the_swap(first: Copy, moment: str) -> None:
    """The relay finds what comes next in the tables alone."""
    request_id = first.ask("s1")
    steps.plan_targets(first.context, first.model_id)
    bells = first.context.bell.rung  # type: ignore[attr-defined]

    def heard() -> set[str]:
        bells.clear()
        Relay(first.pool, first.context.bell).look()
        return {task for task, _ in bells}

    assert "model.rebuild" in heard()
    steps.rebuild_model(first.context, first.model_id)
    if moment == "queued":
        assert "stages.train" in heard()
    train_queued(first.context)
    if moment == "trained":
        assert "model.publish" in heard()
        assert "targets.plan" not in heard()
    steps.publish_model(first.context, first.model_id)
    steps.publish_model(first.context, first.model_id)
    assert "targets.plan" in heard()
    assert first.bounds() == (1, 0, 0)
    assert steps.plan_targets(first.context, first.model_id) == 1
    assert steps.plan_targets(first.context, first.model_id) == 0
    assert steps.publish_model(first.context, first.model_id) is None
    assert first.bounds() == (2, 2, 0)
    assert served(first)[2] == (2, 2)
    first.finish(request_id)
    assert first.states(request_id) == DONE


@pytest.mark.parametrize("part", range(2))
def test_killed_at_each_boundary_the_swap_ends_the_same(first: Copy, killer: Killer, part: int) -> None:
    """Before and after each commit and each object, the process dies; what it was to do is done again."""

    def way(request_id: UUID) -> None:
        steps.plan_targets(first.context, first.model_id)
        steps.rebuild_model(first.context, first.model_id)
        train_queued(first.context)
        steps.publish_model(first.context, first.model_id)
        steps.plan_targets(first.context, first.model_id)
        first.finish(request_id)

    request_id = first.ask("s0")
    killer.arm(10**9)
    way(request_id)
    boundaries = killer.seen
    chosen = range(1 + part * boundaries // 22, boundaries, boundaries // 11)
    for number, at in zip(range(1 + part, len(SUBJECTS), 2), chosen, strict=False):
        depths = served(first)[2]
        request_id = first.ask(f"s{number}")
        killer.arm(at)
        with pytest.raises(KilledError):
            way(request_id)
        for _ in range(2):
            revive(first)
            way(request_id)
        assert first.states(request_id) == DONE, (at, boundaries)
        assert served(first)[2] == depths == (2, 2), (at, boundaries)
        assert first.rows("SELECT 1 FROM deferral") == []
        assert first.row("SELECT deferring FROM model") == (False,)
        causes = first.rows("SELECT cause FROM model_version ORDER BY version DESC LIMIT 1")
        assert causes == [("deactivate",)]
        assert verified(first, request_id)
        first.no_trace_of(request_id)


def test_training_that_fails_for_good_deactivates(first: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    request_id = first.ask("s1")
    steps.plan_targets(first.context, first.model_id)
    steps.rebuild_model(first.context, first.model_id)

    def broken(*_: object) -> bytes:
        raise ValueError

    monkeypatch.setattr(S3T, "train", broken)
    for _ in range(3):
        train_queued(first.context)
        first.rest()
    assert first.row("SELECT DISTINCT state FROM stage_job WHERE state <> 'done'") == ("failed",)
    steps.publish_model(first.context, first.model_id)
    steps.plan_targets(first.context, first.model_id)
    assert first.states(request_id) == [("deactivating", None)]
    assert not serving(first) & reading(first, request_id)


def test_a_swap_waits_until_servers_have_loaded(first: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    with transaction(first.pool) as connection:
        leases.register(
            connection, process_id=uuid4(), model_id=first.model_id, name="r", covers=1, freed=1, ttl_ms=60_000
        )
    first.ask("s1")
    steps.plan_targets(first.context, first.model_id)
    steps.rebuild_model(first.context, first.model_id)
    train_queued(first.context)
    for _ in range(2):
        steps.publish_model(first.context, first.model_id)
        assert steps.plan_targets(first.context, first.model_id) == 0
    monkeypatch.setattr(deferrals, "LOAD_SECONDS", 0.0)
    steps.publish_model(first.context, first.model_id)
    assert steps.plan_targets(first.context, first.model_id) == 1


def test_a_restriction_in_the_meantime_takes_effect_at_once(first: Copy) -> None:
    """It needs no training, so it never waits; what waits goes on serving."""
    one, two, *_ = in_cells(first).values()
    waits = first.ask(one)
    steps.plan_targets(first.context, first.model_id)
    now = first.ask(two, kind=Kind.RESTRICT)
    steps.plan_targets(first.context, first.model_id)
    assert first.states(waits) == [("received", None)]
    assert first.states(now) == [("deactivating", None)]
    assert not serving(first) & (reading(first, now) - reading(first, waits))
    same = first.ask(one, kind=Kind.RESTRICT)
    steps.plan_targets(first.context, first.model_id)
    assert first.states(same) == [("deactivating", None)]
    assert not serving(first) & reading(first, waits)
    assert first.rows("SELECT 1 FROM deferral") == []
    assert first.states(waits) == [("received", None)]
    swap(first)  # which is all that it waits for, with nothing left to defer, too
    assert first.states(waits) == [("deactivating", None)]
    assert first.row("SELECT deferring FROM model") == (False,)


def test_a_policy_that_no_longer_waits_ends_the_wait(first: Copy) -> None:
    request_id = first.ask("s1")
    steps.plan_targets(first.context, first.model_id)
    with transaction(first.pool) as connection:
        set_policy(connection, "tiny", Policy(), actor=first.actor)
    assert first.events("model.policy_changed") == [{"actor": first.actor, "policy": {"kind": "now"}}]
    assert steps.plan_targets(first.context, first.model_id) == 1
    assert first.states(request_id) == [("deactivating", None)]
