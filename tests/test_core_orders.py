"""Slice orders: distinct, permutations, Latin where claimed, never capped, and the same for ever."""

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shards.errors import RecipeError
from shards.matching import best_matching
from shards.orders import DELETIONS, cyclic, orders_for, recursive, weighted

RATES = st.lists(st.floats(0, 1e9), min_size=1, max_size=7).filter(any)
Orders = Sequence[tuple[int, ...]]


def latin(orders: Orders) -> bool:
    """No symbol twice in a row, nor at a position of several."""
    columns = zip(*orders, strict=True)
    return all(len(set(order)) == len(order) for order in orders) and all(len(set(c)) == len(orders) for c in columns)


def whole(orders: Orders, slices: int, budget: int) -> bool:
    """As many as asked for, all distinct, each a permutation."""
    permutation = tuple(range(slices))
    return len(orders) == len(set(orders)) == budget and all(tuple(sorted(order)) == permutation for order in orders)


@given(st.integers(1, 7), st.data())
def test_recursive_orders_are_distinct_begin_with_the_rotations_and_come_in_latin_squares(
    slices: int, data: st.DataObject
) -> None:
    budget = data.draw(st.integers(1, min(math.factorial(slices), 150)))
    orders = recursive(slices, budget)
    assert whole(orders, slices, budget)
    assert orders[:slices] == cyclic(slices, slices)[:budget]
    for start in range(0, budget - slices + 1, slices):
        assert latin(orders[start : start + slices])
    pairs = orders[: slices * (slices - 1)]
    assert len({order[:2] for order in pairs}) == len(pairs)
    assert orders == recursive(slices, math.factorial(slices))[:budget]


@pytest.mark.parametrize("slices", range(1, 8))
def test_a_budget_above_the_slices_is_not_capped(slices: int) -> None:
    """The published `get_budgeted_models` cuts [:budget] from L rotations (exact-unlearning.md 4.12)."""
    every = math.factorial(slices)
    assert whole(recursive(slices, every), slices, every)
    assert set(recursive(slices, every)) == set(itertools.permutations(range(slices)))
    assert whole(weighted([2.0**index for index in range(slices)], every), slices, every)
    for make in (recursive, lambda n, b: weighted([1.0] + [2.0] * (n - 1), b)):
        with pytest.raises(RecipeError, match=rf"orders: .*no more than {every} distinct orders, not {every + 1}"):
            make(slices, every + 1)


def test_as_many_orders_as_the_budget_and_not_every_one_there_is() -> None:
    """The published inference falls through to all L! where the budget exceeds L (exact-unlearning.md 4.13)."""
    assert len(recursive(4, 5)) == 5
    assert whole(recursive(64, 200), 64, 200)  # 64! would never end
    assert whole(weighted([float(index % 5 + 1) for index in range(64)], 70), 64, 70)


@pytest.mark.parametrize("budget", [0, -1])
def test_no_order_at_all_is_refused(budget: int) -> None:
    for make in (lambda: recursive(3, budget), lambda: weighted([1, 2, 3], budget), lambda: orders_for(3, budget)):
        with pytest.raises(RecipeError, match="orders must"):
            make()


def test_the_papers_example() -> None:
    """Probabilities .4 .3 .2 .1 give 0123 1032 2301 3210; here the least likely comes first."""
    assert weighted([0.4, 0.3, 0.2, 0.1], 4) == ((3, 2, 1, 0), (2, 3, 0, 1), (1, 0, 3, 2), (0, 1, 2, 3))
    assert weighted([0.4, 0.3, 0.2, 0.1], 2) == ((3, 2, 1, 0), (2, 3, 0, 1))


@given(RATES, st.data())
def test_weighted_orders_are_a_latin_square_that_begins_with_low_rates(rates: list[float], data: st.DataObject) -> None:
    slices = len(rates)
    square = weighted(rates, slices)
    assert whole(square, slices, slices)
    assert latin(square)
    assert [order[0] for order in square] == sorted(range(slices), key=lambda index: (rates[index], index))
    budget = data.draw(st.integers(1, min(math.factorial(slices), 60)))
    orders = weighted(rates, budget)
    assert whole(orders, slices, budget)
    assert orders[:slices] == square[:budget]


@given(RATES, st.data())
def test_known_dates_go_last(rates: list[float], data: st.DataObject) -> None:
    slices = len(rates)
    last = data.draw(st.sets(st.integers(0, slices - 1)))
    free = slices - len(last)
    most = math.factorial(free) * math.factorial(len(last))
    budget = data.draw(st.integers(1, min(most, 60)))
    orders = weighted(rates, budget, frozenset(last))
    assert whole(orders, slices, budget)
    assert all(set(order[free:]) == last for order in orders)
    assert latin([order[:free] for order in orders[:free]])
    with pytest.raises(RecipeError, match=f"no more than {most} distinct orders"):
        weighted(rates, most + 1, frozenset(last))


@given(RATES, st.integers(-8, 8))
def test_the_unit_of_the_rates_decides_nothing(rates: list[float], power: int) -> None:
    assume(all(rate == 0 or rate > 1e-300 for rate in rates))
    assert weighted([rate * 2.0**power for rate in rates], len(rates)) == weighted(rates, len(rates))


def test_equal_rates_are_the_uniform_prior() -> None:
    assert weighted([0.3] * 4, 9) == recursive(4, 9)
    assert weighted([1, 1, 1], 2) == cyclic(3, 2)


def test_which_orders_a_recipe_gets() -> None:
    assert orders_for(4, 3) == cyclic(4, 3)
    assert orders_for(4, 7) == recursive(4, 7)
    assert orders_for(3, 3, (3.0, 1.0, 2.0)) == weighted([3, 1, 2], 3)
    assert orders_for(3, 2, (3.0, 1.0, 2.0), frozenset({1})) == weighted([3, 1, 2], 2, {1})
    with pytest.raises(RecipeError, match="rates for 2 slices, but slices is 3"):
        orders_for(3, 2, (3.0, 1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, -1e-9, True, False, "1", None])
def test_a_prior_that_is_no_number_is_refused(bad: object) -> None:
    for make in (lambda rates: weighted(rates, 2), lambda rates: orders_for(2, 2, rates)):
        with pytest.raises(RecipeError, match=r"prior: rate of slice 1 must be a finite number of at least 0"):
            make((1.0, bad))


def test_a_prior_that_says_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="prior: rate is 0 everywhere"):
        weighted([0.0, 0], 1)
    with pytest.raises(RecipeError, match="prior: there is no rate"):
        weighted([], 1)
    with pytest.raises(RecipeError, match="prior: slices that expire"):
        weighted([1.0, 2.0], 1, {2})


def test_rates_far_apart_neither_overflow_nor_vanish() -> None:
    """At probability .4 .3 .2 .1 the published scores lie near 1e-23; here the steps are of 1e300."""
    assert weighted([1e308, 1e308, 1e-308, 5e-324], 4)[0] == (3, 2, 0, 1)
    assert latin(weighted([10.0**power for power in range(-300, 300, 20)], 30))


def test_orders_are_the_same_in_every_process() -> None:
    rates = [3.0, 1, 1, 2.5, 7, 7, 1, 0.1]
    code = f"from shards.orders import weighted; print(weighted({rates}, 20, {{4, 1}}))"
    seeds = ("0", "1")
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in seeds
    ]
    assert printed == [str(weighted(rates, 20, {4, 1}))] * 2


def test_these_orders_stand_for_ever() -> None:
    """A recipe's digest names its orders: a change here would give old recipes other models."""
    assert recursive(4, 8)[4:] == ((0, 2, 3, 1), (1, 3, 0, 2), (2, 0, 1, 3), (3, 1, 2, 0))
    assert weighted([1, 1, 4, 4, 20, 20], 8, {5}) == (
        (0, 1, 2, 3, 4, 5),
        (1, 0, 3, 4, 2, 5),
        (2, 3, 4, 1, 0, 5),
        (3, 4, 0, 2, 1, 5),
        (4, 2, 1, 0, 3, 5),
        (0, 2, 3, 4, 1, 5),
        (1, 3, 4, 2, 0, 5),
        (2, 4, 1, 0, 3, 5),
    )


def expected_length(order: Sequence[int], rates: Sequence[float], deletions: int) -> float:
    """Of the prefix that no deletion has hit."""
    total = sum(rates)
    sums = itertools.accumulate(rates[index] / total for index in order)
    return math.fsum(max(0.0, 1 - sum_) ** deletions for sum_ in sums)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=6))
def test_weighted_orders_keep_longer_prefixes_than_rotations(rates: list[float]) -> None:
    def longest(orders: Orders) -> float:
        return max(expected_length(order, rates, DELETIONS) for order in orders)

    slices = len(rates)
    for budget in (1, slices):
        assert longest(weighted(rates, budget)) >= longest(cyclic(slices, budget)) * (1 - 1e-6)


MATRICES = st.integers(1, 5).flatmap(
    lambda size: st.lists(
        st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=size, max_size=size), min_size=size, max_size=size
    )
)


@settings(max_examples=300)
@given(MATRICES, st.sampled_from([1, 2**30, 2**500]))
def test_the_matching_is_the_first_of_the_best(scores: list[list[int | None]], unit: int) -> None:
    size = len(scores)
    every = [
        columns
        for columns in itertools.permutations(range(size))
        if all(scores[row][column] is not None for row, column in enumerate(columns))
    ]
    assume(every)
    best = max(
        every, key=lambda columns: (sum(scores[r][c] or 0 for r, c in enumerate(columns)), [-c for c in columns])
    )
    large = [[None if score is None else score * unit for score in row] for row in scores]
    assert best_matching(large) == list(best)


def test_small_scores_count_where_the_large_ones_are_equal() -> None:
    huge = 2**3000
    assert best_matching([[huge, 0, 0], [0, 1, 2], [0, 5, 1]]) == [0, 2, 1]
    assert best_matching([[huge, huge, 0], [huge, huge, 0], [3, 4, 1]]) == [0, 1, 2]
