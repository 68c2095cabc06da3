"""Sums are exact, free of order and of what was taken out again; the solve has the same bits everywhere."""

import hashlib
import itertools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import RecipeError, ShardsError
from shards.recipe import Backbone, Recipe, Ridge, Scale
from shards.solver import answers, pin_threads, solve
from shards.sums import FLOAT_EXACT, INTEGER_EXACT, Features, Grid, Sums, Targets, nothing, pack, sums_of, total

GRID = Grid(bits=4, clip=8.0, penalty=3.0, target_bits=0)


def made(grid: Grid, rows: int, wide: int = 5, outputs: int = 3, seed: int = 0) -> tuple[Features, Targets]:
    numbers = np.random.default_rng(seed)
    pools = numbers.normal(scale=3.0, size=(rows, wide)).astype(np.float32)
    targets = np.eye(outputs, dtype=np.int32)[numbers.integers(0, outputs, rows)]
    return grid.features(pools), targets


def exact(features: Features, other: np.ndarray) -> list[list[int]]:
    """The products in Python's unbounded integers."""
    left, right = features.astype(object), other.astype(object)
    return (left.T @ right).tolist() if len(features) else [[0] * other.shape[1] for _ in range(features.shape[1])]


def check_exact(grid: Grid, features: Features, targets: Targets) -> Sums:
    found = sums_of(grid, features, targets)
    assert found.xtx.dtype == found.xty.dtype == np.int64
    assert found.xtx.tolist() == pack(np.array(exact(features, features), dtype=object)).tolist()
    assert found.xty.tolist() == exact(features, targets)
    return found


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sums_are_exact_on_any_grid(data: st.DataObject) -> None:
    bits = data.draw(st.integers(0, 20))
    clip = data.draw(st.sampled_from([0.001, 1.0, 3.7, 16.0, 1024.0]))
    grid = Grid(bits, clip, 1.0, 0)
    rows = data.draw(st.integers(0, min(12, (INTEGER_EXACT - 1) // grid.limit**2)))
    seed = data.draw(st.integers(0, 2**32))
    numbers = np.random.default_rng(seed)
    extreme = numbers.choice([-1.0, -0.5, 0.5, 1.0], size=(rows, 4)) * clip * data.draw(st.sampled_from([1.0, 2.0]))
    features = grid.features(extreme.astype(np.float32))
    assert not features.size or np.abs(features.astype(np.int64)).max() <= grid.limit
    check_exact(grid, features, np.eye(2, dtype=np.int32)[numbers.integers(0, 2, rows)])


def test_a_sum_that_float64_could_not_hold_is_exact() -> None:
    """limit^2 * rows lies beyond 2^53: a single float64 product over all rows would drop the last bits."""
    grid = Grid(bits=20, clip=16.0, penalty=1.0, target_bits=0)
    rows = FLOAT_EXACT // grid.limit**2 + 70
    features = np.full((rows, 3), grid.limit, np.int32)
    features[:, 1] = grid.limit - 1
    features[-1, 1] = 1
    found = check_exact(grid, features, np.ones((rows, 2), np.int32))
    assert int(found.xtx.max()) > FLOAT_EXACT
    naive = features.astype(np.float64).T @ features.astype(np.float64)
    assert naive.astype(object).astype(int).tolist() != exact(features, features)


@pytest.mark.parametrize("bits", [16, 17, 20])
def test_one_product_beyond_float64_is_exact(bits: int) -> None:
    grid = Grid(bits=bits, clip=1024.0, penalty=1.0, target_bits=0)
    rows = min(9, (INTEGER_EXACT - 1) // grid.limit**2)
    features = np.array([[grid.limit - row, row - grid.limit, 2**bits] for row in range(rows)], np.int32)
    check_exact(grid, features, np.eye(2, dtype=np.int32)[[row % 2 for row in range(rows)]])


def test_overflow_is_refused_before_anything_is_computed() -> None:
    grid = Grid(bits=20, clip=1024.0, penalty=1.0, target_bits=0)
    assert grid.limit == 2**30
    grid.check(7)
    with pytest.raises(RecipeError, match=r"lower ridge.bits or ridge.clip, or make smaller cells"):
        grid.check(8)
    untouchable: Any = type("NoNumbers", (), {"__len__": lambda _: 8})()
    with pytest.raises(RecipeError, match="overflow"):
        sums_of(grid, untouchable, untouchable)
    features = np.full((4, 2), grid.limit, np.int32)
    four = sums_of(grid, features, np.ones((4, 1), np.int32))
    with pytest.raises(RecipeError, match="overflow"):
        four.add(four, grid)
    with pytest.raises(RecipeError, match="overflow"):
        total(grid, [four, four])
    assert int(sums_of(grid, features[:3], np.ones((3, 1), np.int32)).add(four, grid).xtx.max()) == 7 * 2**60


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(12)), st.lists(st.integers(0, 11), max_size=4), st.integers(0, 99))
def test_order_and_grouping_do_not_show(order: list[int], cuts: list[int], seed: int) -> None:
    features, targets = made(GRID, 12, seed=seed)
    whole = sums_of(GRID, features, targets)
    edges = [0, *sorted(cuts), 12]
    parts = [sums_of(GRID, features[order[a:b]], targets[order[a:b]]) for a, b in itertools.pairwise(edges)]
    for sequence in (parts, parts[::-1]):
        assert total(GRID, sequence).same(whole)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 11), unique=True, min_size=1), st.integers(0, 99))
def test_subtracting_equals_never_having_added(gone: list[int], seed: int) -> None:
    features, targets = made(GRID, 12, seed=seed)
    left = [row for row in range(12) if row not in gone]
    never = sums_of(GRID, features[left], targets[left])
    found = sums_of(GRID, features, targets)
    for row in gone:
        found = found.subtract(sums_of(GRID, features[row : row + 1], targets[row : row + 1]))
    assert found.same(never)
    assert solve(GRID, found).tobytes() == solve(GRID, never).tobytes()


def test_what_is_not_in_the_sums_cannot_be_taken_out() -> None:
    features, targets = made(GRID, 4)
    sums = sums_of(GRID, features, targets)
    more = sums_of(GRID, *made(GRID, 5, seed=1))
    other = sums_of(GRID, *made(GRID, 4, seed=1))
    for wrong in (more, other):
        with pytest.raises(ShardsError, match="not among the summed ones"):
            sums.subtract(wrong)
    with pytest.raises(ShardsError, match="one recipe"):
        sums.add(sums_of(GRID, *made(GRID, 4, wide=6)), GRID)
    with pytest.raises(ShardsError, match="beyond the grid"):
        sums_of(GRID, features * 100, targets)
    with pytest.raises(ShardsError, match="give both"):
        sums_of(GRID, features, targets[:2])
    with pytest.raises(ShardsError, match="no cell"):
        total(GRID, [])


def test_features_are_cut_rounded_and_refused() -> None:
    found = GRID.features(np.array([[0.03, 1 / 32, 3 / 32, -99.0, 99.0]], np.float32))
    assert found.tolist() == [[0, 0, 2, -128, 128, 16]]
    assert found.dtype == np.int32
    for bad in (np.nan, np.inf):
        with pytest.raises(ShardsError, match="not finite"):
            GRID.features(np.array([[bad]], np.float32))


def test_the_grid_is_the_recipes() -> None:
    backbone = Backbone(source="x", digest="0" * 64)
    recipe = Recipe(shards=1, slices=2, engine="ridge", backbone=backbone, classes=("a", "b"))
    assert Grid.of(recipe) == Grid(8, 16.0, 30.0, 0)
    scale = Scale(offset=3.0, spread=2.0)
    own = Ridge(bits=5, clip=2.0, penalty=1.0)
    recipe = Recipe(shards=1, slices=2, engine="ridge", backbone=backbone, task="regression", scale=scale, ridge=own)
    grid = Grid.of(recipe)
    assert grid == Grid(5, 2.0, 1.0, 12)
    assert grid.limit == 2**16
    assert grid.values([0.5, -99.0, 2**-13, 1.0]).tolist() == [[2048], [-(2**16)], [0], [4096]]
    with pytest.raises(ShardsError, match="correct its label"):
        grid.values([float("nan")])
    assert Grid(**grid.to_json()) == grid


def naive(grid: Grid, features: Features, targets: Targets) -> np.ndarray:
    """A refit in plain float64, lambda once, the bias free."""
    x = features / 2.0**grid.bits
    penalty = np.diag([grid.penalty] * (x.shape[1] - 1) + [0.0])
    return np.linalg.solve(x.T @ x + penalty, x.T @ (targets / 2.0**grid.target_bits))


@pytest.mark.parametrize("target_bits", [0, 12])
def test_weights_are_those_of_a_refit(target_bits: int) -> None:
    grid = Grid(4, 8.0, 3.0, target_bits)
    features, targets = made(grid, 200, wide=20)
    if target_bits:
        targets = grid.values(np.random.default_rng(5).normal(size=200).tolist())
    weights = solve(
        grid, total(grid, [sums_of(grid, features[:90], targets[:90]), sums_of(grid, features[90:], targets[90:])])
    )
    assert np.abs(weights * 2**grid.bits - naive(grid, features, targets)).max() < 1e-9
    scores = features @ weights
    given = answers(grid, weights, features)
    if target_bits:
        assert np.abs(given - scores).max() < 1e-5
    else:
        assert np.abs(scores.sum(axis=1) - 1).max() < 1e-9  # as the bias is not penalised
        assert (given.argmax(axis=1) == scores.argmax(axis=1)).all()
        assert np.abs(np.exp(given) - np.maximum(scores, 1e-3)).max() < 1e-5


def test_no_records_no_weights() -> None:
    empty = nothing(GRID, 6, 3)
    assert not solve(GRID, empty).any()
    sums = sums_of(GRID, *made(GRID, 9))
    assert sums.subtract(sums).same(empty)


def test_what_cannot_be_solved_is_refused() -> None:
    loose = Grid(4, 8.0, 1e-12, 0)
    sums = sums_of(loose, *made(loose, 400))
    with pytest.raises(RecipeError, match=r"raise it to 5\.5e-10 or more"):
        solve(loose, sums)
    solve(Grid(4, 8.0, 6e-10, 0), sums)
    with pytest.raises(ShardsError, match="no records have such sums"):
        solve(GRID, Sums(400, -sums.xtx, sums.xty))


def test_an_answer_depends_on_its_own_features_alone() -> None:
    grid = Grid(8, 16.0, 30.0, 0)
    features, targets = made(grid, 64, wide=384, outputs=12)
    weights = solve(grid, sums_of(grid, features, targets))
    together = answers(grid, weights, features)
    for count in (1, 2, 3, 5, 11, 31):
        assert answers(grid, weights, features[-count:]).tobytes() == together[-count:].tobytes()
        assert answers(grid, np.asfortranarray(weights), features[:count][::-1].copy()).tobytes() == (
            together[:count][::-1].tobytes()
        )


PROGRAM = """
import hashlib, sys
import numpy as np
if sys.argv[1] == "torch":
    import torch
    torch.set_num_threads(2)
from test_core_sums import digest_of_a_solve
print(digest_of_a_solve())
"""


def digest_of_a_solve() -> str:
    grid = Grid(8, 16.0, 30.0, 0)
    features, targets = made(grid, 600, wide=512, outputs=24)
    weights = solve(grid, sums_of(grid, features, targets))
    return hashlib.sha256(weights.tobytes(order="C") + answers(grid, weights, features).tobytes()).hexdigest()


@pytest.mark.parametrize(("threads", "torch"), [("1", ""), ("2", ""), ("", ""), ("2", "torch")])
def test_bits_are_the_same_in_other_processes_at_any_thread_setting(threads: str, torch: str) -> None:
    environment = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    if threads:
        environment |= {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-c", PROGRAM, torch]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == digest_of_a_solve(), found.stderr


def test_threads_raised_by_others_are_lowered_again() -> None:
    from threadpoolctl import ThreadpoolController  # noqa: PLC0415

    before = digest_of_a_solve()
    for library in ThreadpoolController().select(user_api="blas").lib_controllers:
        library.set_num_threads(2)
    assert digest_of_a_solve() == before
    pin_threads()
    assert {each["num_threads"] for each in ThreadpoolController().select(user_api="blas").info()} == {1}
