"""Closed forms of capacity against published values, algebra and simulation (facts/exact-unlearning.md, 5)."""

import math
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import World, recipe, sisa_deletion

from shards import capacity
from shards.capacity import Outlook
from shards.chains import Grid, Holding
from shards.scenario import Scenario
from shards.trials import lifetimes
from shards.work import StageCost, stage_work


def outlook(world: World, weights: dict[tuple[int, int], float] | None = None, per_day: float | None = None) -> Outlook:
    shards = range(world.recipe.shards)
    rows = {s: {p: n for (shard, p), n in world.rows.items() if shard == s} for s in shards}
    return capacity.outlook(
        Grid.of(world.recipe),
        {s: Holding(frozenset(each.prefix for each in world.live.values() if each.shard == s)) for s in shards},
        {s: lambda prefix, s=s: stage_work(world.recipe, prefix, rows[s]) for s in shards},
        weights or dict.fromkeys(world.rows, 1.0),
        per_day,
    )


@pytest.mark.parametrize(
    ("slices", "orders", "expected"), [(4, 1, 45.67), (4, 4, 71.95), (5, 3, 82.96), (6, 1, 68.50), (6, 6, 119.85)]
)
def test_all_dead_is_the_published_coupon_collector(slices: int, orders: int, expected: float) -> None:
    assert capacity.all_dead_uniform(5, slices, orders) == pytest.approx(expected, abs=0.005)
    assert capacity.all_dead(capacity.uniform(5, slices, orders)) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("slices", "orders"), [(4, 1), (4, 4), (6, 3), (6, 6), (6, 8)])
def test_first_and_all_dead_are_what_simulation_finds(slices: int, orders: int) -> None:
    scenario = Scenario(
        users=10**6, per_day=1, rows=100, shards=5, slices=slices, orders=orders, histories=1500, seed=slices + orders
    )
    found = lifetimes(scenario)
    firsts = capacity.uniform(5, slices, orders)
    for times, expected in (
        (found.first_dead, capacity.first_dead(firsts)),
        (found.all_dead, capacity.all_dead_uniform(5, slices, orders)),
    ):
        assert abs(times.mean() - expected) < 3 * times.std() / math.sqrt(len(times))


def test_orders_beyond_the_slices_add_no_lifetime() -> None:
    assert capacity.all_dead_uniform(3, 3, 6) == capacity.all_dead_uniform(3, 3, 3)


def test_sisa_gets_credit_for_its_slices() -> None:
    """Error 11 of the published code: SISA died at any hit, m * H(m) = 11.4, so S3T looked 10 times better."""
    scenario = Scenario(users=10**6, per_day=1, rows=100, shards=5, slices=6, orders=6, histories=800)
    sisa = lifetimes(scenario, "sisa").all_dead.mean()
    s3t = lifetimes(scenario).all_dead.mean()
    assert sisa == pytest.approx(5 * 6 * 137 / 60, rel=0.1)
    assert s3t / sisa == pytest.approx(1.75, rel=0.12)


def test_one_shard_with_one_order_dies_at_the_hit_of_its_first_slice() -> None:
    assert capacity.first_dead([[0.25]]) == pytest.approx(4)
    assert capacity.all_dead([[0.25]]) == pytest.approx(4)
    assert capacity.until_all_hit([(2,)], [0.0, 0.0, 0.25]) == 4


rates = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)


@given(rates, st.sets(st.permutations(range(3)).map(lambda order: tuple(order[:2])), min_size=1))
def test_depth_lasts_as_long_as_an_exhaustive_race_says(rates: list[float], prefixes: set[tuple[int, ...]]) -> None:
    """Against first-step analysis over the sets of slices that were hit."""

    def rest(hit: frozenset[int]) -> float:
        if all(hit & set(prefix) for prefix in prefixes):
            return 0.0
        left = [index for index in range(3) if index not in hit]
        total = sum(rates[index] for index in left)
        return 1 / total + sum(rates[index] / total * rest(hit | {index}) for index in left)

    assert capacity.until_all_hit(prefixes, rates) == pytest.approx(rest(frozenset()))


def test_prefixes_of_the_same_slices_count_once() -> None:
    """All 60 prefixes of three of five slices: the last is hit when the third slice is."""
    prefixes = list(permutations(range(5), 3))
    assert capacity.until_all_hit(prefixes, [0.2] * 5) == pytest.approx(5 / 5 + 5 / 4 + 5 / 3)


@given(st.lists(st.lists(st.floats(0.05, 1), max_size=3), min_size=1, max_size=3))
def test_the_first_dead_is_never_later_than_the_last(firsts: list[list[float]]) -> None:
    first, last = capacity.first_dead(firsts), capacity.all_dead(firsts)
    assert 0 <= first <= last + 1e-9
    assert (first == 0) == (not all(firsts))
    alone = [capacity.all_dead([shard]) for shard in firsts]
    assert max(alone) <= last + 1e-6
    assert first <= min(alone) + 1e-6


def test_a_cell_that_no_deletion_hits_lives_for_ever() -> None:
    assert capacity.first_dead([[0.5], [0.0, 0.5]]) == pytest.approx(2)
    assert capacity.first_dead([[0.0]]) == capacity.all_dead([[0.5], [0.0]]) == math.inf
    assert capacity.until_all_hit([(0,)], [0.0]) == math.inf
    assert capacity.until_all_hit([(0, 1)], [0.0, 0.5]) == 2


def test_a_healthy_model() -> None:
    world = World(recipe(5, 4, 4))
    world.train()
    found = outlook(world, per_day=10.0)
    assert found.work == 0
    assert found.full_retrain == sum(4 * 3 * 10 * depth * (2 * depth + 1) for depth in range(1, 5)) * 5
    assert found.all_dead == pytest.approx(capacity.all_dead_uniform(5, 4, 4))
    for shard in found.shards:
        assert (shard.depth, shard.clean_orders, shard.full_orders) == (4, 4, 4)
        assert shard.until_loss == pytest.approx(5)  # any of the shard's four of twenty cells
        assert shard.until_dead == pytest.approx(20 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
        assert shard.days_until_loss == pytest.approx(0.5)


def test_a_shard_that_lost_some() -> None:
    world = World(recipe(2, 3, 3))
    world.train()
    world.delete((0, 2))  # left: (0), (0, 1) and (1)
    hit, whole = outlook(world).shards
    assert (hit.depth, hit.clean_orders, hit.full_orders, hit.days_until_dead) == (2, 2, 0, None)
    assert hit.until_loss == pytest.approx(3)  # slice 0 or 1, of six
    assert hit.until_dead == pytest.approx(6 * (1 + 1 / 2))
    assert hit.work == sum(stage.depth * 10 * 3 * (2 * stage.depth + 1) for stage in world.plan().stages)
    assert whole.work == 0


def test_a_dead_shard_and_a_model_without_any() -> None:
    world = World(recipe(2, 2))
    assert (outlook(world).first_dead, outlook(world).all_dead) == (0, 0)
    world.train()
    world.delete((1, 0))
    found = outlook(world)
    assert (found.shards[1].depth, found.shards[1].until_loss, found.shards[1].until_dead) == (0, 0, 0)
    assert found.first_dead == 0
    assert found.all_dead == pytest.approx(4)
    assert found.shards[1].work == found.full_retrain / 2


def test_deletions_fall_where_the_weights_say() -> None:
    world = World(recipe(1, 2))
    world.train()
    found = outlook(world, {(0, 0): 1.0, (0, 1): 3.0}).shards[0]
    assert found.until_dead == pytest.approx(4)
    assert found.until_loss == pytest.approx(1)
    empty = outlook(world, {(0, 0): 0.0, (0, 1): 0.0}).shards[0]
    assert empty.until_dead == pytest.approx(2)


def test_cells_of_ridge_serve_together() -> None:
    world = World(recipe(1, 3, engine="ridge"))
    world.train()
    world.delete((0, 1))
    found = outlook(world).shards[0]
    assert (found.depth, found.clean_orders, found.work) == (2, 2, 10)
    assert found.until_loss == pytest.approx(3 / 2)
    assert found.until_dead == pytest.approx(3 * (1 + 1 / 2))


@pytest.mark.parametrize("slices", [1, 3, 8])
def test_sisas_expected_work_is_its_mean_over_the_hit_slice(slices: int) -> None:
    sisa = recipe(1, slices, engine="sisa", epochs=5)
    rows = dict.fromkeys(range(slices), 10)
    stages = [stage_work(sisa, tuple(range(depth)), rows, 12) for depth in range(1, slices + 1)]
    mean = sum(sum(stages[hit:]) for hit in range(slices)) / slices
    assert sisa_deletion(10 * slices, slices, 5, 12) == pytest.approx(mean)
    weights = {(0, index): 1.0 for index in range(slices)}
    lost = capacity.expected_loss(Grid.of(sisa).nodes, {0: StageCost(sisa, rows, 12)}, weights)
    assert lost == pytest.approx(mean)


def test_more_shards_and_more_orders_last_longer() -> None:
    by_orders: list[Any] = [capacity.first_dead(capacity.uniform(4, 6, orders)) for orders in range(1, 7)]
    by_shards = [capacity.all_dead(capacity.uniform(shards, 3, 2)) for shards in (1, 4, 16, 256)]
    for values in (by_orders, by_shards):
        assert all(a < b for a, b in pairwise(values))
    assert np.isfinite(by_shards[-1])
