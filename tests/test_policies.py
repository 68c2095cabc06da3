"""Rebuild policies: what is trained after a deletion and when; growth; the preview against what is then served."""

import itertools
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from api_client import Api
from conftest import Database
from test_planner import in_cells
from test_rebuild_first import in_one_shard
from test_workers_path import build, served
from tiny import tiny_record
from world import World, make_world
from world_copies import SUBJECTS, Copy

from service.store import cells, datasets, grid, jobs, models, payloads, preview, stages, work
from service.store.api_keys import Scope
from service.store.database import transaction
from service.store.preview import Preview
from service.store.secrets import Secrets
from shards.assembly import Assembly
from shards.engine.interface import inputs_of
from shards.engine.registry import open_reader
from shards.manifest import Record
from shards.partition import dataset_key, record_id_of
from shards.rebuild import Kind, Policy
from shards.recipe import Backbone
from workers import steps
from workers.training import train_queued

pytest_plugins = ("world_fixtures", "api_fixtures")
pytestmark = pytest.mark.integration


def under(world: World, kind: Kind, **more: int) -> None:
    """Set the policy, and nothing else to do."""
    with transaction(world.pool) as connection:
        models.mark_policy(connection, world.model_id, Policy(kind=kind, **more))
        models.mark_rebuild_planned(connection, world.model_id, building=False)


def delete(world: World, subject: str) -> UUID:
    request_id = world.ask(subject)
    steps.plan_targets(world.context, world.model_id)
    with transaction(world.pool) as connection:
        connection.execute("UPDATE model SET cleared = floor, published_at = published_at - interval '1 hour'")
    return request_id


def queued(world: World) -> list[tuple[int, tuple[int, ...]]]:
    """Stages that wait to be trained, in the order of their turns."""
    rows = world.rows(
        "SELECT s.shard, s.prefix FROM stage_job j JOIN stage s USING (stage_key) WHERE j.state = 'queued'"
        " ORDER BY j.queued_at"
    )
    return [(shard, tuple(prefix)) for shard, prefix in rows]


def waiting(world: World) -> tuple[datetime | None, datetime | None]:
    return world.row("SELECT rebuild_at, rebuild_due FROM model WHERE model_id = %s", world.model_id)  # type: ignore[return-value]


def to_rebuild(world: World) -> list[int]:
    with transaction(world.pool) as connection:
        return work.list_to_rebuild(connection)


def foreseen(world: World, *subjects: str) -> Preview:
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    ids = [record_id_of(key, name) for subject in subjects for name in SUBJECTS[subject]]
    with transaction(world.pool) as connection:
        model = models.get_model_by_id(connection, world.model_id)
        return preview.preview(connection, model, ids).measured(world.context.artifacts)


def test_now_trains_at_once(world: Copy) -> None:
    delete(world, "s1")
    assert sum(served(world)[2]) < 4
    assert to_rebuild(world) == [world.model_id]
    assert steps.rebuild_model(world.context, world.model_id) > 0
    assert waiting(world) == (None, None)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    assert served(world)[2] == (2, 2)


def test_by_deadline_trains_one_batch_at_the_last_safe_start(world: Copy) -> None:
    under(world, "by_deadline")
    one, two = in_one_shard(world)
    first = delete(world, one)
    assert world.states(first) == [("deactivating", None)]  # at once, as always
    assert steps.rebuild_model(world.context, world.model_id) == 0
    at, due = waiting(world)
    (promised,) = world.row("SELECT due_at FROM deletion_request WHERE request_id = %s", first)
    assert due == promised
    assert at is not None
    assert promised - timedelta(days=1) < at < promised
    (event,) = world.events("rebuild.scheduled")
    assert event["start"] == at.isoformat()
    assert to_rebuild(world) == []
    delete(world, two)
    assert to_rebuild(world) == [world.model_id]
    assert steps.rebuild_model(world.context, world.model_id) == 0
    assert waiting(world)[1] == promised  # the earlier of the two
    assert to_rebuild(world) == []
    with transaction(world.pool) as connection:  # a month passes
        connection.execute("UPDATE model SET rebuild_at = now(), rebuild_due = now() + interval '1 hour'")
    assert to_rebuild(world) == [world.model_id]
    assert steps.rebuild_model(world.context, world.model_id) > 0
    assert waiting(world) == (None, None)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    assert served(world)[2] == (2, 2)
    assert world.row("SELECT count(*) FROM model_version WHERE cause = 'rebuild'") == (1,)


def test_an_operator_need_not_wait(world: Copy) -> None:
    under(world, "by_deadline")
    delete(world, "s1")
    assert steps.rebuild_model(world.context, world.model_id) == 0
    with transaction(world.pool) as connection:
        models.mark_rebuild_wanted(connection, world.model_id, forced=True)
    assert steps.rebuild_model(world.context, world.model_id) > 0
    assert waiting(world) == (None, None)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    delete(world, "s2")
    assert steps.rebuild_model(world.context, world.model_id) == 0  # that was for once


def test_spares_trains_one_full_order_and_no_more_than_asked(world: Copy) -> None:
    under(world, "spares")
    for subject in in_one_shard(world):  # nothing of the shard is left
        delete(world, subject)
    assert steps.rebuild_model(world.context, world.model_id) == 2
    lost = set(queued(world))
    assert sorted(len(prefix) for _, prefix in lost) == [1, 2]
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    assert served(world)[2] == (2, 2)
    under(world, "spares", spares=1)
    assert steps.rebuild_model(world.context, world.model_id) > 0
    assert lost.isdisjoint(queued(world))


def test_min_depth_waits_until_a_shard_serves_less(world: Copy) -> None:
    under(world, "min_depth", min_depth=1)
    one, two = in_one_shard(world)
    delete(world, one)
    assert sorted(served(world)[2]) == [1, 2]
    assert steps.rebuild_model(world.context, world.model_id) == 0
    assert waiting(world) == (None, None)
    delete(world, two)
    assert sorted(served(world)[2]) == [0, 2]
    assert steps.rebuild_model(world.context, world.model_id) == 2
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    assert served(world)[2] == (2, 2)


def test_training_speed_is_measured(world: Copy) -> None:
    with transaction(world.pool) as connection:
        measured = jobs.seconds_per_work(connection, world.model_id)
        assert 0 < measured != jobs.SECONDS_PER_WORK
        connection.execute("UPDATE stage_job SET started_at = ended_at - make_interval(secs => work * 3)")
        connection.execute("UPDATE stage_job SET started_at = ended_at - interval '1 day' WHERE stage_key ="
                           " (SELECT min(stage_key) FROM stage_job)")  # fmt: skip
        assert jobs.seconds_per_work(connection, world.model_id) == pytest.approx(3)  # one was paused
        connection.execute("UPDATE stage_job SET platform = NULL")
        assert jobs.seconds_per_work(connection, world.model_id) == jobs.SECONDS_PER_WORK


def test_new_records_make_stages_stale_and_never_tainted(world: Copy) -> None:
    before = served(world)
    world.add({"new": ["new1"]})
    assert served(world) == before  # what is clean goes on serving
    assert to_rebuild(world) == []  # when to learn from them is the operator's to say
    with transaction(world.pool) as connection:
        model = models.get_model_by_id(connection, world.model_id)
        shards = grid.grid(connection, model)
        open_stages = stages.list_open(connection, world.model_id, model.recipe_digest)
        assert not stages.list_touched(connection, open_stages.stages)
    stale = [(shard["shard"], each["slice"]) for shard in shards for each in shard["slices"] if each["stale"]]
    assert len(stale) == 1
    assert [shard["stale"] for shard in shards] == [shard["shard"] == stale[0][0] for shard in shards]
    assert {each["state"] for shard in shards for each in shard["slices"]} == {"served"}
    with transaction(world.pool) as connection:
        models.mark_rebuild_wanted(connection, world.model_id, forced=True)
    assert steps.rebuild_model(world.context, world.model_id) > 0
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    with transaction(world.pool) as connection:
        shards = grid.grid(connection, models.get_model_by_id(connection, world.model_id))
    assert not any(shard["stale"] for shard in shards)
    assert world.row("SELECT canonical FROM model_version ORDER BY version DESC LIMIT 1") == (True,)


@pytest.mark.parametrize("kind", ["now", "min_depth"])
def test_depth_comes_before_new_records(world: Copy, kind: Kind) -> None:
    under(world, kind, min_depth=1 if kind == "min_depth" else 0)
    found = in_cells(world)
    world.add({f"new{number}": [f"new{number}"] for number in range(40)})
    shard_of = dict(world.rows("SELECT cell_id, shard FROM cell WHERE dataset_id = %s", world.dataset.dataset_id))
    for cell_id in sorted(found, key=lambda each: -shard_of[each])[:2]:  # all of the last shard
        delete(world, found[cell_id])
    assert served(world)[2] == (2, 0)
    steps.rebuild_model(world.context, world.model_id)
    order = [shard for shard, _ in queued(world)]
    lost = order.count(1)
    assert order[:lost] == [1] * lost
    assert order[lost:] == [0] * (len(order) - lost)
    assert order[lost:]
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    assert served(world)[2] == (2, 2)


# Preview


def learnable(name: str) -> Record:
    """A record whose label depends on its words, so that accuracies differ."""
    made = tiny_record(name)
    good = made.label == "yes"
    return tiny_record(name, words=[*made.text.split()[:4], *(["w1"] * 2 if good else ["w2"] * 2)], label=made.label)


@pytest.fixture
def measured(
    database: Database, tmp_path: Path, small_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """A world whose stages are evaluated, the same at each run: not every partition gives accuracies that differ."""
    numbers = itertools.count(1)
    for module in ("datasets", "ingest"):
        monkeypatch.setattr(f"service.store.{module}.uuid4", lambda: UUID(int=next(numbers)))
    monkeypatch.setattr("world.tiny_record", learnable)
    made = make_world(database, tmp_path, small_backbone, epochs=12, learning_rate=1e-2, head_learning_rate=5e-2)
    made.secrets = Secrets(bytes(32), bytes(32))
    made.add(SUBJECTS)
    people = made.dataset
    with transaction(made.pool) as connection:
        made.dataset = datasets.insert_dataset(
            connection,
            name="evaluation",
            shards=1,
            slices=1,
            classes=list(made.recipe.classes),
            deletable=False,
            subject_row_cap=1000,
        )
    made.add({f"e{number}": [f"e{number}"] for number in range(90)})
    evaluation, made.dataset = made.dataset, people
    with transaction(made.pool) as connection:
        connection.execute("UPDATE model SET evaluation_id = %s", [evaluation.dataset_id])
    build(made)
    yield made
    made.pool.close()


def accuracy_served(world: World) -> float:
    """What the newest version answers on the evaluation set, by the serving code."""
    (body,) = world.row(
        "SELECT a.body FROM model m JOIN model_version v USING (model_id, version) JOIN assembly a"
        " ON a.digest = v.assembly WHERE m.model_id = %s",
        world.model_id,
    )
    assembly = Assembly.from_json(body)
    reader = open_reader(world.recipe, "cpu")
    digests = [digest for member in assembly.members if member for digest in member.artifacts]
    for digest, name in world.rows(
        "SELECT digest, object_name FROM artifact WHERE kind = 'stage' AND state = 'live' AND digest = ANY(%s)", digests
    ):
        reader.load(digest, world.context.artifacts.get(name))
    with transaction(world.pool) as connection:
        model = models.get_model_by_id(connection, world.model_id)
        assert model.evaluation_id is not None
        (cell,) = cells.list_cells(connection, model.evaluation_id)
    assert cell.object_name is not None
    records = [stored.record for stored in payloads.decode(world.context.artifacts.get(cell.object_name))]
    answers = reader.build(assembly).logits(inputs_of(world.recipe, records)).argmax(axis=1)
    labels = np.array([world.recipe.classes.index(record.label) for record in records])
    return float((answers == labels).mean())


def test_the_previewed_accuracy_is_the_one_then_served(measured: World) -> None:
    seen = Counter[float]()
    for subject in ("s1", "s2", "s3", "s4"):
        found = foreseen(measured, subject)
        if not any(found.depth_after):  # the four lie in the four cells: the last one leaves nothing
            assert found.accuracy_note == "no shard would answer"
            break
        assert found.accuracy_note is None
        assert found.accuracy_before == accuracy_served(measured)
        delete(measured, subject)
        assert found.accuracy_after == accuracy_served(measured)
        assert found.depth_after == list(served(measured)[2])
        seen[found.accuracy_after or 0.0] += 1
    assert len(seen) > 1


def test_the_preview_says_what_each_policy_would_train(measured: World) -> None:
    found = foreseen(measured, "s1")
    assert set(found.policies) == {"now", "by_deadline", "rebuild_first"}
    now, later = found.policies["now"], found.policies["by_deadline"]
    assert now["stages"] == found.stages_to_rebuild
    assert now["work"] == later["work"] > 0
    assert now["seconds"] > 0
    assert found.last_safe_start is not None
    assert later["start"] == found.last_safe_start
    assert now["start"] is None  # at once
    assert datetime.now(UTC) < datetime.fromisoformat(found.last_safe_start)
    assert datetime.fromisoformat(found.last_safe_start) < datetime.fromisoformat(found.due_at)
    delete(measured, "s1")
    assert steps.rebuild_model(measured.context, measured.model_id) == now["stages"]
    (done,) = measured.row("SELECT sum(work) FROM stage_job WHERE state = 'queued'")
    assert done == pytest.approx(now["work"])
    assert foreseen(measured, "s1").records == 0


def test_the_preview_counts_the_rows_that_the_rebuild_reads(world: Copy) -> None:
    both = list(in_cells(world).values())[:2]  # of two cells: each stage reads the rows that are left of its own
    found = foreseen(world, *both)
    for subject in both:
        delete(world, subject)
    assert steps.rebuild_model(world.context, world.model_id) == found.stages_to_rebuild
    (rows,) = world.row(
        "SELECT sum(m.rows) FROM stage_job JOIN stage_cell USING (stage_key)"
        " JOIN cell_manifest m USING (cell_id, generation) WHERE state = 'queued'"
    )
    assert found.rows_to_train == rows


def test_a_preview_says_why_there_is_no_accuracy(world: Copy) -> None:
    found = foreseen(world, "s1")
    assert (found.accuracy_before, found.accuracy_after) == (None, None)
    assert found.accuracy_note == "the model was declared without an evaluation dataset"


def test_a_preview_of_what_waits_for_its_replacement(measured: World) -> None:
    under(measured, "rebuild_first")
    before = foreseen(measured, "s1")
    assert before.policy == "rebuild_first"
    delete(measured, "s1")
    assert accuracy_served(measured) == before.accuracy_before  # no gap
    found = foreseen(measured, "s2")
    assert found.accuracy_before == before.accuracy_before
    with transaction(measured.pool) as connection:
        connection.execute("UPDATE request_target SET deferred_until = now()")
    steps.plan_targets(measured.context, measured.model_id)
    assert accuracy_served(measured) == before.accuracy_after


# API


def test_a_policy_is_declared_shown_and_changed(api: Api) -> None:
    api.dataset()
    api.model(rebuild={"kind": "spares", "spares": 1})
    assert api.client.get("/v1/models/sentiment").json()["rebuild"] == {"kind": "spares", "spares": 1}
    answer = api.client.patch("/v1/models/sentiment", json={"rebuild": {"kind": "by_deadline"}})
    assert answer.status_code == 200, answer.text
    shown = answer.json()
    assert shown["rebuild"] == {"kind": "by_deadline"}
    assert (shown["rebuild_at"], shown["rebuild_due"], shown["deferring"]) == (None, None, False)
    assert api.scalar("SELECT body -> 'policy' ->> 'kind' FROM event_pending WHERE kind = 'model.policy_changed'") == (
        "by_deadline"
    )
    assert api.client.patch("/v1/models/nothing", json={"rebuild": {}}).status_code == 404
    reader = api.with_scopes(Scope.DELETION_READ)
    assert reader.patch("/v1/models/sentiment", json={"rebuild": {}}).status_code == 403
    api.client.post("/v1/models/sentiment/rebuild")
    assert api.scalar("SELECT rebuild_forced FROM model") is True


@pytest.mark.parametrize(
    ("rebuild", "field"),
    [
        ({"kind": "never"}, "rebuild.kind"),
        ({"kind": "now", "spares": 1}, "rebuild.spares"),
        ({"kind": "spares", "spares": 2}, "rebuild.spares"),
        ({"kind": "min_depth"}, "rebuild.min_depth"),
        ({"kind": "min_depth", "min_depth": 3}, "rebuild.min_depth"),
        ({"kind": "min_depth", "min_depth": 1.5}, "rebuild.min_depth"),
        ({"wait": True}, "rebuild.(unknown field)"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused(api: Api, rebuild: dict[str, Any], field: str) -> None:
    api.dataset()
    api.model()
    answer = api.client.patch("/v1/models/sentiment", json={"rebuild": rebuild})
    assert answer.status_code == 422
    assert field in answer.text
    assert api.scalar("SELECT rebuild_policy ->> 'kind' FROM model") == "now"
