"""Rolling back: an earlier version serves again under a new number, never one that a deletion has touched."""

import pytest
from releases import build, delete, depth, evaluated, model_of, nothing_tainted_serves, served, set_gate
from test_planner import in_cells
from world_copies import Copy

from service.domain.errors import ConflictError, NotFoundError
from service.domain.release import Gate
from service.domain.requests import Kind
from service.store import lifts, objects, policies, quarantine, rollbacks
from service.store.database import transaction
from service.store.objects import Object
from shards.rebuild import Policy
from workers import steps
from workers.barrier import Barrier

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _no_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SPACING_SECONDS", 0)


def serve(world: Copy, version: int) -> int:
    with transaction(world.pool) as connection:
        return rollbacks.serve(connection, "tiny", version, actor=world.actor, reason_code="regression")


def unpin(world: Copy) -> None:
    with transaction(world.pool) as connection:
        rollbacks.unpin(connection, "tiny", actor=world.actor, reason_code="fixed")
    steps.publish_model(world.context, world.model_id)


@pytest.fixture
def rebuilt(world: Copy) -> Copy:
    """Version 2 deactivated a slice, version 3 has it back: both are clean."""
    delete(world, "s1")
    build(world)
    assert world.bounds()[:2] == (3, 2)
    return world


def test_an_earlier_version_serves_again_under_a_new_number_until_it_is_unpinned(rebuilt: Copy) -> None:
    two, three = served(rebuilt, 2).digest, served(rebuilt, 3).digest
    assert serve(rebuilt, 2) == 4
    assert served(rebuilt).digest == two
    assert rebuilt.bounds()[:2] == (4, 2)  # a rollback raises no floor
    assert model_of(rebuilt).pinned == 4
    assert rebuilt.row("SELECT cause FROM model_version WHERE version = 4") == ("rollback",)
    (event,) = rebuilt.events("version.rolled_back")
    assert event == {"version": 4, "of": 2, "actor": rebuilt.actor, "reason_code": "regression"}
    for _ in range(2):  # no rebuild undoes it
        with transaction(rebuilt.pool) as connection:
            connection.execute("UPDATE model SET building = true")
        assert steps.publish_model(rebuilt.context, rebuilt.model_id) is None
        build(rebuilt)
    assert served(rebuilt).digest == two
    unpin(rebuilt)
    assert (rebuilt.bounds()[0], served(rebuilt).digest) == (5, three)
    assert len(rebuilt.events("version.unpinned")) == 1
    with pytest.raises(ConflictError, match="pinned"):
        unpin(rebuilt)


def test_a_tainted_version_is_refused(rebuilt: Copy) -> None:
    before = rebuilt.bounds()
    with pytest.raises(ConflictError, match="deleted, restricted, quarantined or lost"):
        serve(rebuilt, 1)
    with pytest.raises(NotFoundError):
        serve(rebuilt, 9)
    assert rebuilt.bounds() == before
    assert model_of(rebuilt).pinned is None


def test_so_is_one_whose_deletion_this_model_has_not_planned_yet(rebuilt: Copy) -> None:
    """The dataset is shared: another model's planner may have put the tombstone there."""
    (record_id,) = rebuilt.row(
        "SELECT r.record_id FROM record r JOIN stage_cell sc USING (cell_id) WHERE sc.stage_key = %s"
        " AND NOT EXISTS (SELECT FROM tombstone t WHERE t.record_id = r.record_id) LIMIT 1",
        next(member.stage for member in served(rebuilt, 2).members if member),
    )
    request_id = rebuilt.ask("nobody")
    with transaction(rebuilt.pool) as connection:
        connection.execute(
            "INSERT INTO tombstone (record_id, dataset_id, cell_id, commitment, added, request_id)"
            " SELECT record_id, dataset_id, cell_id, commitment, added, %s FROM record WHERE record_id = %s",
            [request_id, record_id],
        )
    with pytest.raises(ConflictError):
        serve(rebuilt, 2)


def test_so_is_one_with_a_deferred_record_though_it_serves_for_now(rebuilt: Copy) -> None:
    with transaction(rebuilt.pool) as connection:
        policies.set_policy(connection, "tiny", Policy(kind="rebuild_first"), actor=rebuilt.actor)
    rebuilt.ask("s2")
    steps.plan_targets(rebuilt.context, rebuilt.model_id)
    assert model_of(rebuilt).deferring
    with pytest.raises(ConflictError):
        serve(rebuilt, 3)


def test_so_is_a_quarantined_or_lost_one(rebuilt: Copy) -> None:
    stage = next(member for member in served(rebuilt, 2).members if member)
    (name,) = rebuilt.row("SELECT object_name FROM artifact WHERE kind = 'stage' AND digest = %s", stage.artifacts[0])
    with transaction(rebuilt.pool) as connection:
        objects.mark_lost(connection, Object(name, stage.artifacts[0], stage.stage, None))
    with pytest.raises(ConflictError):
        serve(rebuilt, 2)
    other = [member for member in served(rebuilt, 3).members if member][-1]
    with transaction(rebuilt.pool) as connection:
        quarantine.quarantine(connection, rebuilt.model_id, other.stage, other.artifacts[-1])
    with pytest.raises(ConflictError):
        serve(rebuilt, 3)


def test_a_deletion_takes_the_best_that_is_clean_and_rebuilds_go_on(rebuilt: Copy) -> None:
    by_cell = in_cells(rebuilt)
    serve(rebuilt, 3)
    for subject in list(by_cell.values())[:2]:
        delete(rebuilt, subject)
        nothing_tainted_serves(rebuilt)
    build(rebuilt)  # what was pinned is gone for good: the pin is in nobody's way
    assert depth(rebuilt) == 4
    nothing_tainted_serves(rebuilt)


def test_a_deletion_that_does_not_touch_it_leaves_it(rebuilt: Copy) -> None:
    """Version 2 lacks a slice; the subjects of that slice can go without touching it."""
    two = served(rebuilt, 2)
    serve(rebuilt, 2)
    read = {
        cell
        for (cell,) in rebuilt.rows(
            "SELECT cell_id FROM stage_cell WHERE stage_key = ANY(%s)", [m.stage for m in two.members if m]
        )
    }
    untouched = next(subject for cell, subject in in_cells(rebuilt).items() if cell not in read)
    delete(rebuilt, untouched)
    assert served(rebuilt).digest == two.digest
    nothing_tainted_serves(rebuilt)


def test_a_lift_brings_the_pinned_one_back(rebuilt: Copy) -> None:
    serve(rebuilt, 3)
    pinned = served(rebuilt).digest
    request_id = rebuilt.ask("s2", kind=Kind.RESTRICT)
    steps.plan_targets(rebuilt.context, rebuilt.model_id)
    Barrier(rebuilt.pool, margin=0.05).look()
    assert served(rebuilt).digest != pinned
    with transaction(rebuilt.pool) as connection:
        lifts.lift(connection, request_id, actor=rebuilt.actor, reason_code="withdrawn")
    assert served(rebuilt).digest == pinned


def test_what_is_unpinned_goes_through_the_gate(rebuilt: Copy) -> None:
    evaluated(rebuilt)
    serve(rebuilt, 2)
    set_gate(rebuilt, Gate(at_least=0.6))
    delete(rebuilt, "s3")
    build(rebuilt)
    unpin(rebuilt)
    assert rebuilt.row("SELECT state FROM gate") == ("evaluating",)
