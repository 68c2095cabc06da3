"""The rebuild planner: what it plans keeps the policy's promise, trains nothing twice, and costs least."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import NOW, POLICIES, World, recipe

from shards.errors import RecipeError
from shards.plan import ancestry, canonical, missing
from shards.rebuild import MARGIN, SAFETY, Policy
from shards.stages import Stage, chain
from shards.work import stage_features, stage_work


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """A model after some deletions, rebuilds by any policy, and ingestions."""
    engine = draw(st.sampled_from(["s3t", "s3t", "s3t", "sisa", "ridge"]))
    slices = draw(st.integers(1, 4))
    shards = draw(st.integers(1, 3))
    world = World(recipe(shards, slices, draw(st.integers(1, slices)) if engine == "s3t" else 1, engine))
    for cell in world.rows:
        world.rows[cell] = draw(st.integers(0, 12))
    cells = st.lists(st.sampled_from(sorted(world.rows)), max_size=3)
    for _ in range(draw(st.integers(0, 3))):
        plan = world.plan(**draw(st.sampled_from(POLICIES)))
        world.train(plan.stages[: draw(st.integers(0, len(plan.stages)))])
        world.delete(*draw(cells))
        world.grow(*draw(cells))
    return world


@given(worlds(), st.sampled_from(POLICIES))
def test_nothing_live_is_trained_and_parents_come_first(world: World, policy: dict[str, Any]) -> None:
    plan = world.plan(**policy)
    known = set(world.live)
    for stage in plan.stages:
        assert stage.key not in known
        assert stage.parent is None or stage.parent in known
        assert stage.roots == tuple(world.roots[stage.shard][piece] for piece in stage.prefix)
        known.add(stage.key)
    assert (plan.start is None) == (not plan.stages)
    assert plan.work == pytest.approx(
        sum(
            stage_work(world.recipe, each.prefix, {p: n for (s, p), n in world.rows.items() if s == each.shard})
            for each in plan.stages
        )
    )


@given(worlds(), st.sampled_from(["now", "by_deadline", "rebuild_first"]))
def test_a_whole_rebuild_is_what_a_training_from_nothing_lacks(world: World, kind: str) -> None:
    plan = world.plan(kind)
    wanted = missing(world.recipe, world.roots, world.live.keys())
    if plan.stages or kind != "by_deadline":
        assert set(plan.stages) == set(wanted)
        world.train(plan.stages)
        assert canonical(world.assembly(), world.recipe, world.roots)
    else:  # what is lacking are new records alone
        before = world.assembly().depths
        world.train(wanted)
        assert world.assembly().depths == before


@given(worlds(), st.integers(0, 3), st.integers(0, 4))
def test_spares_are_there_after_the_rebuild(world: World, spares: int, depth: int) -> None:
    slices = world.recipe.slices
    spares, depth = min(spares, slices - 1), min(depth, slices)
    world.train(world.plan("spares", spares=spares, min_depth=depth).stages)
    assert world.plan("spares", spares=spares, min_depth=depth).stages == ()
    if world.recipe.engine == "ridge":
        return
    assert set(world.assembly().depths) == {slices}
    for shard in range(world.recipe.shards):
        reaches = world.reaches(shard).values()
        assert max(reaches) == slices
        if world.recipe.engine == "s3t":
            assert sum(reach >= (depth or slices) for reach in reaches) > spares


@given(worlds(), st.integers(1, 4))
def test_min_depth_trains_the_shards_below_it_alone(world: World, depth: int) -> None:
    if world.recipe.engine == "ridge":
        return
    depth = min(depth, world.recipe.slices)
    before = world.assembly().depths
    reaches = [world.reaches(shard, fresh=True) for shard in range(world.recipe.shards)]
    plan = world.plan("min_depth", min_depth=depth)
    world.train(plan.stages)
    low = {shard for shard, served in enumerate(before) if served < depth}
    assert bool(plan.stages) == bool(low)
    for shard, served in enumerate(world.assembly().depths):
        fresh = max(reaches[shard].values(), default=0) == before[shard]
        assert served == (before[shard] if shard not in low and (fresh or not low) else world.recipe.slices)


@given(worlds(), st.sampled_from(POLICIES), st.integers(0, 20))
def test_what_is_queued_is_not_planned_again(world: World, policy: dict[str, Any], done: int) -> None:
    plan = world.plan(**policy)
    world.queued = {stage.key for stage in plan.stages}
    assert world.plan(**policy).stages == ()
    world.train(plan.stages[:done])
    assert world.plan(**policy).stages == ()


@given(worlds())
def test_depth_is_restored_before_new_records_are_taken_in(world: World) -> None:
    """A stage takes in new records alone where it, and all planned on it, already serve on older manifests."""
    served = {(stage.shard, stage.prefix) for stage in world.live.values() if ancestry(stage, world.live)}
    stages = world.plan().stages

    def refreshes(stage: Stage) -> bool:
        depth = stage.depth
        above = [each for each in stages if (each.shard, each.prefix[:depth]) == (stage.shard, stage.prefix)]
        return all((each.shard, each.prefix) in served for each in above)

    kinds = [refreshes(stage) for stage in stages]
    assert kinds == sorted(kinds)


def test_stale_stages_wait_for_a_batch_and_come_behind() -> None:
    world = World(recipe(2, 2))
    world.train()
    world.grow((0, 0))
    assert world.assembly().depths == (2, 2)
    for kind, fields in (("by_deadline", {}), ("spares", {}), ("min_depth", {"min_depth": 2})):
        assert world.plan(kind, **fields).stages == (), kind
    assert [stage.prefix for stage in world.plan("now").stages] == [(0,), (0, 1)]
    world.delete((1, 1))
    for kind, fields in (("now", {}), ("by_deadline", {}), ("spares", {}), ("min_depth", {"min_depth": 2})):
        found = world.plan(kind, **fields).stages
        assert [(stage.shard, stage.prefix) for stage in found] == [(1, (0, 1)), (0, (0,)), (0, (0, 1))], kind


def test_the_longest_clean_prefix_is_carried_on() -> None:
    world = World(recipe(1, 3, 3))
    world.train()
    world.delete((0, 2))  # (0, 1, 2) keeps two stages, (1, 2, 0) one, (2, 0, 1) none
    assert [stage.prefix for stage in world.plan("spares").stages] == [(0, 1, 2)]


def test_a_new_order_is_trained_where_it_is_cheaper_or_no_other_is_left() -> None:
    world = World(recipe(1, 3, 1), rows={(0, 0): 100, (0, 1): 1, (0, 2): 1})
    assert [stage.prefix for stage in world.plan("spares").stages] == [(1,), (1, 2), (1, 2, 0)]
    world = World(recipe(1, 3, 1))
    world.train()
    found = world.plan("spares", spares=2).stages
    assert [stage.prefix for stage in found if stage.depth == 3] == [(1, 2, 0), (2, 0, 1)]


def test_slices_that_were_hit_or_will_be_go_last() -> None:
    world = World(recipe(1, 4, 1), rows={(0, 0): 100})
    world.train(chain(world.recipe.digest, 0, (1, 2, 3), world.roots[0]))
    world.delete((0, 2))  # (1,) is left; 3 fell with its chain, so nothing says that it was not hit
    assert world.plan("spares").stages[-1].prefix == (1, 2, 3, 0)
    prior = [{"name": "churns", "rate": 9.0, "slices": 1}, {"name": "stays", "rate": 0.1, "slices": 2}]
    world = World(recipe(1, 3, 1, prior=prior), rows={(0, 0): 100})
    assert world.plan("spares").stages[-1].prefix == (1, 2, 0)


def test_sisa_and_ridge_train_their_own_orders_alone() -> None:
    world = World(recipe(1, 3, engine="sisa"), rows={(0, 0): 100})
    assert world.plan("spares", spares=2).stages[-1].prefix == (0, 1, 2)
    world = World(recipe(1, 3, engine="ridge"))
    assert [stage.prefix for stage in world.plan("spares").stages] == [(0,), (1,), (2,)]


def test_a_batch_starts_at_the_last_moment_that_is_safe() -> None:
    world = World(recipe(2, 2))
    world.train()
    world.delete((0, 1))
    due, pace = NOW + 30 * 86_400, 2.0
    everything = sum(stage_work(world.recipe, prefix, {0: 10, 1: 10}) for prefix in ((0,), (0, 1))) * 2
    plan = world.plan("by_deadline", due=due, seconds_per_work=pace)
    assert plan.start == plan.last_safe_start == due - everything * pace * SAFETY - MARGIN
    assert plan.start + plan.work * pace < due
    first = world.plan("rebuild_first", due=due, seconds_per_work=pace)
    assert (first.start, first.last_safe_start, first.stages) == (NOW, plan.start, plan.stages)


@pytest.mark.parametrize(("due", "pace"), [(None, 1.0), (NOW + 1e9, None), (NOW + 1.0, 1.0)])
def test_a_batch_starts_at_once_where_waiting_is_not_known_to_be_safe(due: float | None, pace: float | None) -> None:
    world = World(recipe(1, 2))
    assert world.plan("by_deadline", due=due, seconds_per_work=pace).start == NOW


def test_work_counts_passes_through_layers() -> None:
    rows = {0: 5, 1: 7}
    s3t = recipe(1, 2, epochs=3, layers_per_slice=2)
    assert stage_work(s3t, (0,), rows, 12) == 3 * 5 * (2 + 2 + 2)  # its two layers: forward and both gradients
    assert stage_work(s3t, (0, 1), rows, 12) == 3 * 12 * (4 + 4 + 2)  # two frozen above: no weights' gradient
    assert stage_features(s3t, (0, 1), rows, 12) == 12 * 8
    sisa = recipe(1, 2, engine="sisa", epochs=3)
    assert stage_work(sisa, (1, 0), rows, 12) == 2 * 3 / 3 * 12 * 3 * 12
    assert stage_work(recipe(1, 2, engine="ridge"), (1,), rows, 12) == 7 * 12


def test_sisas_stages_cost_together_what_plain_training_does() -> None:
    sisa = recipe(1, 4, engine="sisa", epochs=5)
    chain_ = [stage_work(sisa, tuple(range(depth)), dict.fromkeys(range(4), 10)) for depth in range(1, 5)]
    assert sum(chain_) == pytest.approx(5 * 40 * 3)


def test_sisa_gets_credit_for_its_slices() -> None:
    """Error 11 of the published code: a hit on any slice killed the whole shard, so SISA looked 6 times worse."""
    world = World(recipe(2, 4, engine="sisa"))
    world.train()
    world.delete((0, 2))
    assert world.assembly().depths == (2, 4)
    assert [stage.prefix for stage in world.plan().stages] == [(0, 1, 2), (0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"kind": "later"}, "kind"),
        ({"spares": 1}, "spares"),
        ({"kind": "spares", "spares": -1}, "spares"),
        ({"kind": "spares", "spares": "2"}, "spares"),
        ({"kind": "spares", "spares": True}, "spares"),
        ({"kind": "min_depth"}, "min_depth"),
        ({"kind": "now", "min_depth": 1}, "min_depth"),
        ({"kind": "now", "depth": 1}, "depth"),
    ],
)
def test_a_policy_that_means_nothing_is_refused_by_field(body: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=f"policy.*{named}"):
        Policy.from_json(body)


@pytest.mark.parametrize("body", POLICIES)
def test_a_policy_survives_json(body: dict[str, Any]) -> None:
    policy = Policy.from_json(body)
    assert Policy.from_json(policy.to_json()) == policy


def test_a_policy_that_the_grid_cannot_keep_is_refused() -> None:
    Policy(kind="spares", spares=2).check(recipe(1, 3))
    for policy in (Policy(kind="spares", spares=3), Policy(kind="min_depth", min_depth=4)):
        with pytest.raises(RecipeError, match="policy"):
            policy.check(recipe(1, 3))
    with pytest.raises(RecipeError, match="spares"):
        Policy(kind="spares", spares=1).check(recipe(1, 3, engine="sisa"))
