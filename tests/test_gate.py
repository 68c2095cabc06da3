"""The gate: what was rebuilt serves only within its bounds; no deactivation waits for it, or serves what it keeps."""

from collections.abc import Callable

import numpy as np
import pytest
from planned import recipe as toy_recipe
from releases import (
    PASSING,
    REFUSING,
    build,
    delete,
    depth,
    evaluated,
    model_of,
    nothing_tainted_serves,
    release,
    served,
    set_canary,
    set_gate,
    trials,
)
from test_planner import in_cells
from test_policies import accuracy_served
from tiny import tiny_record
from world_copies import Bells, Copy

from service.domain.errors import ConflictError
from service.domain.release import Canary, Gate
from service.domain.requests import Kind
from service.store import gates, lifts, models, overrides, policies, preview, publish, work
from service.store.artifacts import ArtifactMissingError
from service.store.database import transaction
from service.store.gates import Score
from shards.logits import Logits
from shards.rebuild import Policy
from shards.recipe import Scale
from workers import gate, steps
from workers.barrier import Barrier
from workers.context import Context
from workers.relay import Relay

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _no_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SPACING_SECONDS", 0)


@pytest.fixture
def gated(world: Copy) -> Copy:
    """Version 1 at full depth; every model answers half of the evaluation set correctly."""
    evaluated(world)
    return world


def override(world: Copy) -> int:
    with transaction(world.pool) as connection:
        return overrides.override(connection, "tiny", actor=world.actor, reason_code="looked_at")


def test_what_keeps_the_bounds_serves_and_its_score_is_that_of_the_serving_code(world: Copy) -> None:
    evaluated(world, contradictions=False)
    set_gate(world, Gate(within=100, at_least=0.0))
    base = accuracy_served(world)
    delete(world, "s1")
    shallow = accuracy_served(world)
    build(world)
    assert (world.bounds()[0], depth(world)) == (2, 3)  # built, and not served yet
    assert trials(world) == [("evaluating", None)]
    assert gate.evaluate_model(world.context, world.model_id) == 3
    assert depth(world) == 4
    assert world.row("SELECT canonical, cause FROM model_version WHERE version = 3") == (True, "rebuild")
    ((state, score),) = trials(world)
    assert (state, score) == ("admitted", accuracy_served(world))
    (event,) = world.events("version.gated")
    expected = {"verdict": "passed", "score": score, "base_score": shallow, "rows": 40, "error": None}
    assert expected.items() <= event.items()
    assert base is not None
    assert world.row("SELECT count(*) FROM stage WHERE gated") == (0,)
    assert gate.evaluate_model(world.context, world.model_id) is None  # twice changes nothing
    assert world.bounds()[0] == 3


def test_what_is_refused_never_serves_by_itself_and_stands_in_no_deletions_way(gated: Copy) -> None:
    set_gate(gated, REFUSING)
    first, later, *others = [in_cells(gated)[cell] for cell in sorted(in_cells(gated))]
    delete(gated, first)
    two = served(gated).digest
    assert release(gated) is None
    assert trials(gated) == [("refused", 0.5)]
    assert (gated.bounds()[0], served(gated).digest) == (2, two)
    assert not model_of(gated).building  # nothing is tried again and again
    with transaction(gated.pool) as connection:
        models.mark_unpublished(connection, gated.model_id)
    assert release(gated) is None
    assert trials(gated) == [("refused", 0.5)]
    assert len(gated.events("version.gated")) == 1
    keys = {key for (key,) in gated.rows("SELECT stage_key FROM stage WHERE gated")}
    longed_for = 0
    for subject in [*others, later]:  # the other shard first: until nothing is left that was let in
        delete(gated, subject)
        nothing_tainted_serves(gated)
        assert keys.isdisjoint(member.stage for member in served(gated).members if member)
        with transaction(gated.pool) as connection:
            best = publish.candidate(connection, model_of(gated), gated=True).assembly
        longed_for += not keys.isdisjoint(member.stage for member in best.members if member)
    assert longed_for  # there was something clean and better that the gate had refused


def scored(scores: list[float]) -> Callable[..., Score]:
    """Verdicts one after the other; what serves always scores 0.5."""
    return lambda *_: Score(scores.pop(0), 0.5, 40)


def gated_keys(world: Copy) -> set[str]:
    return {key for (key,) in world.rows("SELECT stage_key FROM stage WHERE gated")}


def test_what_was_refused_is_not_let_in_beside_the_next_that_passes(
    gated: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would serve at once when that one is tainted, or when a lift brings it back."""
    monkeypatch.setattr(gate, "measure", scored([0.4, 0.6]))
    set_gate(gated, PASSING)
    first, second, *_ = [in_cells(gated)[cell] for cell in sorted(in_cells(gated))]
    delete(gated, first)
    assert release(gated) is None
    refused = gated_keys(gated)
    restriction = gated.ask(second, kind=Kind.RESTRICT)
    steps.plan_targets(gated.context, gated.model_id)
    Barrier(gated.pool, margin=0.05).look()
    passed = release(gated)
    assert passed == model_of(gated).version
    let_in = served(gated).digest
    with transaction(gated.pool) as connection:
        lifts.lift(connection, restriction, actor=gated.actor, reason_code="withdrawn")
        best = publish.candidate(connection, model_of(gated), gated=True).assembly
    assert not refused.isdisjoint(member.stage for member in best.members if member)  # clean, and the best again
    assert served(gated).digest == let_in
    steps.publish_model(gated.context, gated.model_id)
    assert gated.row("SELECT state FROM gate WHERE assembly = %s", best.digest) == ("evaluating",)


def test_an_operator_may_serve_what_was_refused(gated: Copy) -> None:
    set_gate(gated, REFUSING)
    with pytest.raises(ConflictError, match="nothing to override"):
        override(gated)
    delete(gated, "s1")
    release(gated)
    assert override(gated) == 3
    assert (depth(gated), model_of(gated).floor) == (4, 2)
    nothing_tainted_serves(gated)
    assert gated.events("version.overridden") == [
        {"assembly": served(gated).digest, "actor": gated.actor, "reason_code": "looked_at"}
    ]
    assert trials(gated) == [("admitted", 0.5)]


def test_what_was_refused_and_then_tainted_cannot_be_overridden(gated: Copy) -> None:
    set_gate(gated, REFUSING)
    delete(gated, "s1")
    release(gated)
    delete(gated, "s3")
    with pytest.raises(ConflictError, match="nothing to override"):
        override(gated)
    nothing_tainted_serves(gated)


@pytest.mark.parametrize("bounds", [PASSING, REFUSING])
def test_a_deletion_during_the_evaluation_takes_effect_at_once(
    gated: Copy, monkeypatch: pytest.MonkeyPatch, bounds: Gate
) -> None:
    set_gate(gated, bounds)
    delete(gated, "s1")
    build(gated)
    measure = gate.measure

    def measured(context: Context, task: gate.Task) -> gates.Score:
        found = measure(context, task)
        delete(gated, "s2")  # while the evaluation has its result and has not told it
        return found

    monkeypatch.setattr(gate, "measure", measured)
    assert gate.evaluate_model(gated.context, gated.model_id) is None
    monkeypatch.undo()
    nothing_tainted_serves(gated)
    assert gated.bounds()[:2] == (3, 3)
    assert trials(gated) == []  # of an assembly that nobody wants any more there is no verdict
    with transaction(gated.pool) as connection:
        assert work.list_to_publish(connection) == [gated.model_id]
    assert (release(gated) is None) == (bounds is REFUSING)
    nothing_tainted_serves(gated)


def test_a_tombstone_of_another_models_planner_keeps_the_candidate_out(gated: Copy) -> None:
    """The dataset is shared: a record can be out before this model's own planner has raised its floor."""
    set_gate(gated, PASSING)
    delete(gated, "s1")
    build(gated)
    (record_id,) = gated.row(
        "SELECT r.record_id FROM record r JOIN stage_cell sc USING (cell_id) JOIN stage s USING (stage_key)"
        " WHERE s.gated AND NOT EXISTS (SELECT FROM tombstone t WHERE t.record_id = r.record_id) LIMIT 1"
    )
    request_id = gated.ask("nobody")
    with transaction(gated.pool) as connection:
        connection.execute(
            "INSERT INTO tombstone (record_id, dataset_id, cell_id, commitment, added, request_id)"
            " SELECT r.record_id, r.dataset_id, r.cell_id, r.commitment, r.added, %s FROM record r WHERE record_id=%s",
            [request_id, record_id],
        )
    assert gate.evaluate_model(gated.context, gated.model_id) is None
    assert gated.bounds()[0] == 2


def test_points_below_what_serves(gated: Copy) -> None:
    assert Gate(within=2).passes(0.85, 0.87)
    assert not Gate(within=2).passes(0.84, 0.87)
    assert Gate(within=0).passes(0.87, 0.87)
    assert Gate(within=0).passes(0.1, None)
    assert not Gate(within=50, at_least=0.8).passes(0.79, 0.8)
    set_gate(gated, Gate(within=0))  # equal scores are no loss
    delete(gated, "s1")
    assert release(gated) == 3


def test_an_evaluator_that_dies_leaves_a_refusal_and_a_file_that_is_gone_does_too(gated: Copy) -> None:
    set_gate(gated, PASSING)
    delete(gated, "s1")
    build(gated)
    again = "UPDATE gate SET attempted_at = attempted_at - interval '1 day'"
    for _ in range(gated.context.settings.job_attempts):  # each killed after its claim
        with transaction(gated.pool) as connection:
            assert gates.list_to_evaluate(connection) == [gated.model_id]
            assert gates.claim(connection, gated.model_id) is not None
        with transaction(gated.pool) as connection:
            assert gates.list_to_evaluate(connection) == []  # a worker may still be at it
            connection.execute(again)
    assert gate.evaluate_model(gated.context, gated.model_id) is None
    assert gated.rows("SELECT state, error FROM gate") == [("refused", "EvaluatorDied")]
    delete(gated, "s2")
    build(gated)
    for _ in range(gated.context.settings.job_attempts):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(gated.context.artifacts), "get", _gone)
            assert gate.evaluate_model(gated.context, gated.model_id) is None
        with transaction(gated.pool) as connection:
            connection.execute(again)
    assert ("refused", "ArtifactMissingError") in gated.rows("SELECT state, error FROM gate")
    assert override(gated) == gated.bounds()[0]


def _gone(_self: object, _name: str) -> bytes:
    raise ArtifactMissingError("gone")


def test_bounds_that_change_are_a_new_trial_and_none_lets_all_in(gated: Copy) -> None:
    set_gate(gated, REFUSING)
    delete(gated, "s1")
    release(gated)
    set_gate(gated, Gate(at_least=0.7))
    assert release(gated) is None
    assert len(gated.events("version.gated")) == 2
    set_gate(gated, PASSING)
    assert release(gated) == 3
    set_gate(gated, REFUSING)
    delete(gated, "s2")
    build(gated)
    set_gate(gated, None)  # while it is being evaluated
    assert gate.evaluate_model(gated.context, gated.model_id) is None
    steps.publish_model(gated.context, gated.model_id)
    assert depth(gated) == 4
    assert [each["gate"] for each in gated.events("model.gate_changed")][-1] is None


def test_stages_in_training_when_the_gate_is_set_come_to_it(gated: Copy) -> None:
    delete(gated, "s1")
    steps.rebuild_model(gated.context, gated.model_id)
    set_gate(gated, REFUSING)
    release(gated)
    assert trials(gated) == [("refused", 0.5)]
    assert depth(gated) == 3


def test_the_preview_foresees_what_the_gate_lets_serve(gated: Copy) -> None:
    set_gate(gated, REFUSING)
    delete(gated, "s1")
    release(gated)
    ids = [i for (i,) in gated.rows("SELECT record_id FROM record ORDER BY record_id LIMIT 1")]
    with transaction(gated.pool) as connection:
        foreseen = preview.preview(connection, model_of(gated), ids).preview
    gated.ask(record_ids=ids, dataset_id=gated.dataset.dataset_id)
    steps.plan_targets(gated.context, gated.model_id)
    assert foreseen.depth_after == list(served(gated).depths)


def test_where_nothing_can_be_measured_no_gate_can_be_set(world: Copy) -> None:
    with pytest.raises(ConflictError, match="evaluation dataset"):
        set_gate(world, PASSING)
    evaluated(world)
    with transaction(world.pool) as connection:
        policies.set_policy(connection, "tiny", Policy(kind="rebuild_first"), actor=world.actor)
    for setting in (lambda: set_gate(world, PASSING), lambda: set_canary(world, Canary(10))):
        with pytest.raises(ConflictError, match="rebuild_first"):
            setting()
    with transaction(world.pool) as connection:
        policies.set_policy(connection, "tiny", Policy(), actor=world.actor)
    set_gate(world, PASSING)
    with transaction(world.pool) as connection, pytest.raises(ConflictError, match="rebuild_first"):
        policies.set_policy(connection, "tiny", Policy(kind="rebuild_first"), actor=world.actor)


def test_a_regression_is_measured_in_its_declared_spread() -> None:
    class Constant:
        def answer(self, prepared: object) -> Logits:
            return np.full((len(prepared), 1), 6.0, np.float32)  # type: ignore[arg-type]

    recipe = toy_recipe(1, 1, task="regression", classes=[], scale={"offset": 5.0, "spread": 4.0})
    assert recipe.scale == Scale(offset=5.0, spread=4.0)
    records = tuple(tiny_record(f"r{number}", label=label) for number, label in enumerate(("6.0", "4.0", "8.0", "6")))
    assert gate.score_of(recipe, Constant(), list(records), records) == 1 - 1.0 / 4.0  # type: ignore[arg-type]


def test_the_relay_rings_until_the_verdict(gated: Copy) -> None:
    set_gate(gated, PASSING)
    delete(gated, "s1")
    build(gated)
    bells = Bells()
    Relay(gated.pool, bells).look()  # type: ignore[arg-type]
    assert ("model.gate", (gated.model_id,)) in bells.rung
    assert gated.context.bell.rung[-1] == ("model.gate", (gated.model_id,))  # type: ignore[attr-defined]
    gate.evaluate_model(gated.context, gated.model_id)
    bells = Bells()
    Relay(gated.pool, bells).look()  # type: ignore[arg-type]
    assert ("model.gate", (gated.model_id,)) not in bells.rung


def test_nothing_waits_for_the_barrier_of_a_gate(gated: Copy) -> None:
    """Publications of the gate raise no floor: there is nothing to clear."""
    set_gate(gated, PASSING)
    delete(gated, "s1")
    floor = model_of(gated).floor
    release(gated)
    assert model_of(gated).floor == floor
    assert Barrier(gated.pool, margin=0.05).look() is not None
