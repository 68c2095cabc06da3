"""From exact sums to weights, and from weights to answers: the same lines for what is served and what is previewed.

Here alone are numbers rounded, so here alone the order of operations counts. Matrix libraries choose it by their number
of threads and by a product's shape (facts/training.md, sections 1 and 3); both are therefore held fixed.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from threadpoolctl import ThreadpoolController

from shards.errors import ShardsError
from shards.logits import Logits
from shards.sums import Features, Grid, Sums

Weights = npt.NDArray[np.float64]
"""(d, outputs), to be multiplied with features as integers."""
LEAST_SHARE = 1e-3
"""A class's score below it counts as this much: a fit's scores are estimates of probabilities, but may be negative."""


def solve(grid: Grid, sums: Sums) -> Weights:
    """Weights of the ridge regression over the summed records: one float64 Cholesky solve at one thread.

    Minimises |X W - Y|^2 + penalty * |W|^2, the bias (last row of W) left out of the second term. Lambda is added here
    and nowhere else. Without records all weights are 0.

    Raises:
        RecipeError: the penalty is too small for so many records, see `Grid.check_penalty`.
        ShardsError: the sums are of no records at all.
    """
    if sums.count == 0:
        return np.zeros(sums.xty.shape, np.float64, order="F")
    grid.check_penalty(sums.count, len(sums.xty))
    pin_threads()
    step = 2.0**-grid.bits
    a = _lower(sums.xtx.astype(np.float64) * step**2, len(sums.xty))
    features = np.arange(len(a) - 1)
    a[features, features] += grid.penalty
    b = np.asfortranarray(sums.xty.astype(np.float64) * (step * 2.0**-grid.target_bits))
    try:
        factor = cho_factor(a, lower=True, overwrite_a=True)
    except LinAlgError:
        raise ShardsError("no records have such sums: restore the cells' artefacts or train them again") from None
    return cho_solve(factor, b, overwrite_b=True) * step


def answers(grid: Grid, weights: Weights, features: Features) -> Logits:
    """Logits (inputs, outputs); the bits of an answer depend on its own features and the weights alone.

    A regression's are its targets in spreads. Of classes they are logarithms of the scores: least squares on one-hot
    targets estimates the classes' probabilities, so that a softmax gives these back.
    """
    pin_threads()
    found = np.empty((len(features), weights.shape[1]), np.float32)
    for place, row in enumerate(features):  # one by one: a product of several rows rounds by how many there are
        scores = row.astype(np.float64) @ weights
        found[place] = scores if grid.target_bits else np.log(np.maximum(scores, LEAST_SHARE))
    return found


def pin_threads() -> None:
    """Hold NumPy's and SciPy's matrix libraries at one thread from now on, in the whole process.

    Nobody's number is restored afterwards: another thread of the process may be at its own solve.
    """
    for library in _libraries():
        if library.num_threads != 1:
            library.set_num_threads(1)


@lru_cache(maxsize=1)
def _libraries() -> list[Any]:
    return ThreadpoolController().select(user_api="blas").lib_controllers


def _lower(packed: npt.NDArray[np.float64], wide: int) -> npt.NDArray[np.float64]:
    """Lower triangle, in the column order of Fortran, of the symmetric matrix (d, d) that was packed."""
    square = np.zeros((wide, wide))
    at = 0
    for index in range(wide):
        square[index, index:] = packed[at : at + wide - index]
        at += wide - index
    return square.T
