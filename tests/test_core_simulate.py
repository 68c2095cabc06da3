"""The simulation: the planner's own decisions, as tables; and what its curves must show."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import POLICIES, World, recipe, sisa_deletion

from shards.automaton import Automaton
from shards.chains import Grid
from shards.errors import RecipeError
from shards.rebuild import Policy
from shards.scenario import Curve, Scenario, Strategy, strategies
from shards.simulate import _deletions, simulate
from shards.trials import steady
from shards.work import stage_work


def scenario(**more: Any) -> Scenario:
    fields = {"users": 10**6, "per_day": 5, "rows": 12_000, "shards": 4, "slices": 3, "orders": 2, "histories": 60}
    return Scenario(**{**fields, **more})


def by_name(**more: Any) -> dict[str, Curve]:
    return {curve.name: curve for curve in simulate(scenario(**more))}


@given(
    st.sampled_from(["s3t", "s3t", "sisa", "ridge"]),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from(POLICIES),
    st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=12),
)
def test_the_table_is_the_planner(
    engine: str, slices: int, orders: int, policy: dict[str, Any], story: list[int | None]
) -> None:
    """A random story of hits and rebuilds, told to both."""
    orders = min(orders, [1, 1, 2, 6, 24][slices]) if engine == "s3t" else 1
    world = World(recipe(1, slices, orders, engine))
    world.train()
    rows = dict.fromkeys(range(slices), 10)
    table = Automaton(
        Grid.of(world.recipe), lambda prefix: stage_work(world.recipe, prefix, rows, 12), Policy.from_json(policy)
    )
    states = np.zeros(1, dtype=np.int64)
    for event in story:
        if event is None:
            plan = world.plan(**policy, layers=12)
            world.train(plan.stages)
            states, work = table.rebuild(states)
            assert work[0] == pytest.approx(plan.work)
        else:
            world.delete((0, event % slices))
            states = table.hit(states, np.array([event % slices]))
        assert table.holdings[states[0]].fresh == {stage.prefix for stage in world.live.values()}
        depths = world.assembly().depths
        assert table.depth(states)[0] == (sum(depths) if engine == "ridge" else depths[0])


def test_without_rebuild_depth_only_falls_and_nothing_is_trained() -> None:
    curve = by_name()["S3T, no rebuild"]
    assert all(a >= b for a, b in pairwise(curve.depth))
    assert curve.work[-1] == 0
    assert curve.lag is None


def test_a_grid_of_four_by_three_is_at_a_third_of_its_depth_after_ten_people() -> None:
    """design.md, section 4."""
    curve = simulate(scenario(per_day=10, slices=3, orders=2, days=1, histories=4000), strategies(3)[1:2])[0]
    assert curve.depth[0] == pytest.approx(1 / 3, abs=0.08)


def test_daily_full_depth_costs_what_was_estimated_for_twenty_million_users() -> None:
    """design.md, section 4: 2 to 28 full retrains a month depending on the grid, one batch about 1.0."""
    for shards, slices, low, high in ((4, 3, 27, 30), (200, 4, 1.8, 2.3)):
        found = by_name(users=20_000_000, per_day=17, rows=10**7, shards=shards, slices=slices, orders=2)
        assert low < found["S3T, now"].work[-1] < high
        assert found["S3T, by deadline"].work[-1] <= 1.0
        assert found["S3T, by deadline"].missed == 0


def test_one_batch_a_month_meets_every_due_date_for_a_year() -> None:
    curves = by_name(days=360, full_days=0.5)
    batch, monthly = curves["S3T, by deadline"], curves["S3T, monthly full retrain"]
    assert batch.missed == 0
    assert batch.lag is not None
    assert 25 < batch.lag <= 30
    assert monthly.work[-1] == 12
    assert batch.work[-1] <= 1.05 * monthly.work[-1]


def test_a_training_that_takes_too_long_misses_due_dates() -> None:
    assert by_name(days=60, full_days=40.0)["S3T, by deadline"].missed > 0


def test_rebuild_first_serves_full_depth_for_the_work_of_now() -> None:
    curves = by_name()
    first, now = curves["S3T, rebuild first"], curves["S3T, now"]
    assert first.work == now.work
    assert set(first.depth) == {1.0}
    assert min(now.depth) < 1


def test_all_strategies_see_the_same_deletions() -> None:
    """The first day ends before any rebuild."""
    curves = by_name()
    s3t = [curve.depth[0] for name, curve in curves.items() if name not in {"SISA", "S3T, rebuild first"}]
    assert len(set(s3t)) == 1
    assert by_name() == curves


def test_deletions_while_stages_train_take_them_out_too() -> None:
    slow, quick = by_name(full_days=8.0)["S3T, now"], by_name(full_days=0.01)["S3T, now"]
    assert slow.depth[-1] < quick.depth[-1]


def test_training_serves_when_it_ends_and_no_sooner() -> None:
    """Begun at the end of day 30 it takes five days, however many deletions some history sees meanwhile."""
    curve = by_name(per_day=1, days=36, full_days=5.0)["S3T, monthly full retrain"]
    assert all(a >= b for a, b in pairwise(curve.depth[:34]))
    assert curve.depth[34] > curve.depth[33] + 0.2


def test_a_rebuild_that_trains_nothing_is_none() -> None:
    """Deletions that leave every shard deep enough wait for nothing."""
    few = {"shards": 64, "per_day": 1, "days": 2, "histories": 20}
    curve = by_name(**few)["S3T, minimal depth 1"]
    assert (curve.work[-1], curve.lag) == (0, None)
    assert by_name(**few)["S3T, one order"].lag is not None


def test_a_deletion_waits_for_its_replacement_until_it_is_due_at_most() -> None:
    curve = by_name(days=40, full_days=60.0)["S3T, rebuild first"]
    assert set(curve.depth[:29]) == {1.0}
    assert curve.depth[31] < 0.5


def test_expected_deletions_are_those_that_happen() -> None:
    assert scenario(users=10**8).deletions == pytest.approx(150)
    few = scenario(users=60, per_day=5.0, days=12, shards=1, slices=1, orders=1, histories=4000)
    happened = sum(hits.counts.mean() for hits, _ in zip(_deletions(few), range(few.days), strict=False))
    assert few.deletions == pytest.approx(happened, rel=0.03)


def test_users_who_are_gone_do_not_delete_again() -> None:
    found = by_name(users=3, per_day=50, days=10)["S3T, no rebuild"]
    assert found.depth[-1] > 0.4  # at most three of twelve cells were hit
    assert found.depth[2] == found.depth[-1]


def test_likely_deletions_cost_less_where_they_come_last() -> None:
    even = steady(scenario(slices=4))
    prior = steady(scenario(slices=4, rates=(1.0, 1.0, 1.0, 47.0)))
    assert prior.work < 0.75 * even.work
    assert prior.depth > even.depth


def test_sisa_is_given_the_prior_too() -> None:
    rising = steady(scenario(rates=(1.0, 1.0, 48.0)), "sisa", Policy())
    falling = steady(scenario(rates=(48.0, 1.0, 1.0)), "sisa", Policy())
    assert falling.work == pytest.approx(rising.work, rel=0.05)


def test_spares_cost_more_and_keep_more_depth() -> None:
    found = [steady(scenario(), policy=Policy(kind="spares", spares=spares)) for spares in range(3)]
    for less, more in pairwise(found):
        assert less.work < more.work
        assert less.depth < more.depth
        assert less.least <= more.least
    shallow = steady(scenario(), policy=Policy(kind="spares", spares=2, min_depth=2))
    assert shallow.work < 0.6 * found[2].work  # the deepest stage is the dearest, and a spare can do without
    assert (shallow.least, shallow.depth) == (found[2].least, found[2].depth)


def test_features_that_are_not_kept_are_computed_again() -> None:
    """One slice: its stage reads everything, through all layers below its block."""
    records, layers, epochs = 12_000 / 4, 12, 3
    kept, again = (steady(scenario(slices=1, orders=1, cached=cached)).work for cached in (True, False))
    assert kept == pytest.approx(epochs * records * 3)
    assert again == pytest.approx(kept + records * (layers - 1))


def test_sisas_long_run_is_its_closed_form() -> None:
    layers, epochs = 12, 3
    found = steady(scenario(slices=5, layers=layers, histories=400), "sisa", Policy())
    assert found.work == pytest.approx(sisa_deletion(3000, 5, epochs, layers), rel=0.01)
    assert found.depth == pytest.approx(2 / 5, rel=0.02)  # slices before the hit one


def test_ticks_come_once_a_day_and_strategy() -> None:
    ticks: list[None] = []
    simulate(scenario(days=3, histories=2), strategies(3)[:2], tick=lambda: ticks.append(None))
    assert len(ticks) == 6


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"users": 0}, "users"),
        ({"per_day": 0}, "per_day"),
        ({"per_day": float("nan")}, "per_day"),
        ({"rows": 5}, "rows"),
        ({"slices": 13}, "slices"),
        ({"orders": 7}, "orders"),
        ({"rates": (1.0, 2.0)}, "prior"),
        ({"rates": (1.0, -2.0, 1.0)}, "prior"),
        ({"histories": 0}, "histories"),
        ({"histories": 1000, "per_day": 30_000}, "histories"),
        ({"histories": 1000, "users": 10**7, "per_day": 1e30}, "histories"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        scenario(**fields)


def test_a_strategy_names_its_policy() -> None:
    for slices in (1, 4):
        compared = strategies(slices)
        assert len({strategy.name for strategy in compared}) == len(compared)
        for strategy in compared:
            strategy.policy.check(recipe(1, slices))
    assert Strategy("x").policy == Policy()
