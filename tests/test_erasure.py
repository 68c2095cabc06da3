"""Erasure beside everything else that happens to a cell: writers that are late, other requests, other models."""

from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from world_copies import Copy

from service.evidence.verify import verify
from service.store import cells, datasets, ingest, models, objects
from service.store.artifacts import Artifacts
from service.store.database import transaction
from service.store.declare import declare_model
from service.store.ingest import _ChangedError, _draft, _write
from shards.partition import dataset_key, record_id_of
from workers import steps
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration

DONE = [("completed", "erased")]


def add_model(world: Copy, name: str, *, erase_after: timedelta = timedelta(0)) -> int:
    recipe = type(world.recipe).from_json(world.recipe.to_json() | {"seed": sum(name.encode())})
    with transaction(world.pool) as connection:
        return models.insert_model(
            connection,
            name=name,
            dataset_id=world.dataset.dataset_id,
            evaluation_id=None,
            recipe=recipe,
            erase_after=erase_after,
        )


def train(world: Copy, model_id: int) -> None:
    steps.rebuild_model(world.context, model_id)
    train_queued(world.context)
    steps.publish_model(world.context, model_id)


def verified(world: Copy, request_id: UUID) -> bool:
    rows = world.rows("SELECT envelope FROM certificate WHERE request_id = %s", request_id)
    return bool(rows) and all(
        check.passed
        for (envelope,) in rows
        for check in verify(envelope, world.public_key, artifacts=world.context.artifacts.files.root)
    )


def payload_names(world: Copy) -> set[str]:
    return {name for name in world.context.artifacts.names(older_than=-60) if name.startswith("cells/")}


def test_an_upload_that_read_a_cell_before_its_erasure_writes_nothing_after_it(
    world: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file would bring the payload back, under a row that is younger than the erasure."""
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    (cell_id,) = world.row("SELECT cell_id FROM record r JOIN subject_alias a ON a.subject_id = r.owner_id"
                           " WHERE a.digest = %s LIMIT 1", world.line(1, "s1", "x").owner.digest)  # fmt: skip
    lines = [world.line(number, f"new{number}", f"new{number}") for number in range(1, 40)]
    draft = _draft(world.pool, key, world.dataset, lines)
    (part,) = [part for part in draft.parts if part.cell.cell_id == cell_id]
    assert part.cell.object_name is not None
    read = world.context.artifacts.get(part.cell.object_name)
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    assert world.states(request_id) == DONE
    before = payload_names(world)
    monkeypatch.setattr(Artifacts, "get", lambda _self, _name: read)  # as the upload had read it
    with pytest.raises(_ChangedError):
        _write(world.pool, world.context.artifacts, part, draft)
    assert payload_names(world) == before
    assert world.rows("SELECT 1 FROM artifact WHERE state = 'writing'") == []
    monkeypatch.undo()
    ingest.ingest(world.pool, world.context.artifacts, world.secrets.partition, world.dataset, lines)
    assert verified(world, request_id)


def test_a_writer_that_died_does_not_hold_up_an_erasure(world: Copy) -> None:
    (cell_id,) = world.row("SELECT cell_id FROM record r JOIN subject_alias a ON a.subject_id = r.owner_id"
                           " WHERE a.digest = %s LIMIT 1", world.line(1, "s1", "x").owner.digest)  # fmt: skip
    name = f"cells/{'0' * 64}/{uuid4()}.parquet"
    with transaction(world.pool) as connection:
        objects.insert_writing(connection, name, kind="cell", cell_id=cell_id, digest="0" * 64, size=1)
    world.context.artifacts.put(name, b"a payload")
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    assert world.states(request_id) == DONE
    assert name not in payload_names(world)
    assert verified(world, request_id)


def test_records_that_left_a_cell_at_different_times_are_certified_together(world: Copy) -> None:
    world.add({"twice": ["twice1", "twice2"]})
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    with transaction(world.pool) as connection:
        subject = connection.execute(
            "SELECT subject_id FROM subject_alias WHERE digest = %s", [world.line(1, "twice", "x").owner.digest]
        ).fetchone()
        assert subject is not None
        connection.execute(
            "INSERT INTO hold (hold_id, subject_id, reason_code, created_by) VALUES (%s, %s, 'dispute', %s)",
            [uuid4(), subject[0], world.actor],
        )
    one = world.ask(record_ids=[record_id_of(key, "twice1")], dataset_id=world.dataset.dataset_id)
    steps.plan_targets(world.context, world.model_id)
    world.finish(one)
    assert world.states(one) == [("deactivated", None)]
    train(world, world.model_id)  # the cell's next manifest leaves the sealed record out
    both = world.ask("twice")
    steps.plan_targets(world.context, world.model_id)
    with transaction(world.pool) as connection:
        connection.execute("UPDATE hold SET released_at = now()")
    world.finish(both, one)
    assert (world.states(one), world.states(both)) == (DONE, DONE)
    assert verified(world, one)
    assert verified(world, both)


def test_another_models_time_to_revoke_is_kept(world: Copy) -> None:
    """Payloads are shared: the first model's erasure would take the second's way back."""
    patient = add_model(world, "patient", erase_after=timedelta(days=30))
    request_id = world.ask("s1")
    for model_id in (world.model_id, patient):
        steps.plan_targets(world.context, model_id)
    world.finish(request_id)
    assert world.states(request_id) == [("deactivated", None)] * 2
    assert world.rows("SELECT 1 FROM tombstone WHERE erased_at IS NOT NULL") == []
    world.as_owner("UPDATE request_target SET deactivated_at = deactivated_at - interval '31 days'")
    world.finish(request_id)
    assert world.states(request_id) == DONE * 2


def test_a_model_declared_after_the_request_is_a_target_too(world: Copy) -> None:
    request_id = world.ask("s1")
    late = add_model(world, "late")
    train(world, late)
    assert world.row("SELECT version FROM model WHERE model_id = %s", late) == (1,)
    steps.plan_targets(world.context, world.model_id)
    assert world.states(request_id) == [("deactivating", None), ("received", None)]
    steps.plan_targets(world.context, late)
    world.finish(request_id)
    assert world.states(request_id) == DONE * 2
    assert world.row("SELECT floor FROM model WHERE model_id = %s", late) == (2,)
    world.no_trace_of(request_id)


def test_a_model_declared_after_a_request_owes_what_the_dataset_still_holds(world: Copy) -> None:
    """A dataset without a model keeps the records; the first model on it must honour the request before it serves."""
    with transaction(world.pool) as connection:
        other = datasets.insert_dataset(
            connection, name="other", shards=2, slices=2, classes=["no", "yes"], deletable=True, subject_row_cap=9
        )
    world.dataset = other
    world.add({"s1": ["other1"], "s2": ["other2"]})
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    assert world.shown(request_id) == ("completed", "erased")
    recipe = type(world.recipe).from_json(world.recipe.to_json() | {"seed": 77})
    with transaction(world.pool) as connection:
        late = declare_model(
            connection,
            name="other",
            dataset_id=other.dataset_id,
            evaluation_id=None,
            recipe=recipe,
            erase_after=timedelta(0),
        ).model_id
    assert world.shown(request_id) == ("received", None)
    steps.plan_targets(world.context, late)
    world.finish(request_id)
    assert world.shown(request_id) == ("completed", "erased")
    assert world.active("s1") == 0
    assert world.active("s2") > 0


def test_somebody_known_from_another_dataset_is_not_trained_on_later(world: Copy) -> None:
    """The model holds nothing of theirs now, and they have said that it shall not."""
    first = world.dataset
    with transaction(world.pool) as connection:
        world.dataset = datasets.insert_dataset(
            connection, name="other", shards=2, slices=2, classes=["no", "yes"], deletable=True, subject_row_cap=9
        )
    world.add({"elsewhere": ["else1"]})
    request_id = world.ask("elsewhere")
    steps.plan_targets(world.context, world.model_id)
    assert world.shown(request_id) == ("completed", "no_match")
    world.dataset = first
    done = world.add({"elsewhere": ["else2"], "somebody": ["some1"]})
    assert (done.accepted, done.skipped) == (1, 1)


def test_weights_in_reserve_leave_memory_by_a_version_of_their_own(world: Copy) -> None:
    """A stage that is trained but not served is in replicas' memory: its deletion needs their answer as well."""
    steps.plan_targets(world.context, world.model_id)
    for subject in ("s1", "s2", "s3", "s4", "s5", "s6"):
        with transaction(world.pool) as connection:
            version = models.get_model_by_id(connection, world.model_id).version
        live = world.row("SELECT count(*) FROM artifact WHERE kind = 'stage' AND state = 'live'")[0]
        request_id = world.ask(subject)
        steps.plan_targets(world.context, world.model_id)
        (plan,) = world.row("SELECT plan -> 'stages' FROM request_target WHERE request_id = %s", request_id)
        raised = world.row("SELECT version FROM request_target WHERE request_id = %s", request_id)[0]
        assert (raised == version + 1) == bool(plan), (plan, live)
        world.finish(request_id)
        assert world.states(request_id) == DONE


def test_a_cell_is_shared_only_as_it_was_read(world: Copy) -> None:
    with transaction(world.pool) as connection:
        cell = cells.list_cells(connection, world.dataset.dataset_id)[0]
        assert cells.share_unchanged(connection, cell)
    with transaction(world.pool) as connection:
        (locked,) = cells.lock_cells(connection, [cell.cell_id])
        cells.advance(connection, locked, object_name=locked.object_name)
    with transaction(world.pool) as connection:
        assert not cells.share_unchanged(connection, cell)
