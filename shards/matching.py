"""The best assignment of columns to rows, decided by exact whole numbers alone.

A solver's choice among equally good assignments may change from release to release, and a recipe must mean the same
orders for ever. So scipy finds one best assignment, and the first of all best ones, row by row, is derived from it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

_BITS = 40
"""Of a score that count at once: sums of 64 such stay exact in float64."""

Mask = NDArray[np.bool_]


def best_matching(scores: Sequence[Sequence[int | None]]) -> list[int]:
    """The column of each row such that the sum of scores is the largest; None forbids a pair.

    Scores may be of any size: they are compared to 40 bits of the largest one, then, among what that leaves equal,
    the smaller ones in the same way. Of equal assignments it is the one whose first row has the lowest column, and so
    on. `scores` is square, and must allow some assignment.
    """
    rest = [[score or 0 for score in row] for row in scores]
    allowed = np.array([[score is not None for score in row] for row in scores])
    while (top := max(score for row in rest for score in row)) and allowed.sum() > len(rest):
        shift = max(0, top.bit_length() - _BITS)
        level = np.array([[score >> shift for score in row] for row in rest], dtype=np.int64)
        allowed &= _tight(level, allowed)
        rest = [
            [0 if seen or not may else score for score, seen, may in zip(*row, strict=True)]
            for row in zip(rest, level.tolist(), allowed.tolist(), strict=True)
        ]
    return _first(allowed)


def _solve(benefit: NDArray[np.float64]) -> NDArray[np.intp]:
    rows, columns = linear_sum_assignment(benefit, maximize=True)
    return columns[np.argsort(rows)]


def _tight(level: NDArray[np.int64], allowed: Mask) -> Mask:
    """The pairs such that every assignment made of them is a best one, and no other is.

    Row i giving up its column for row k's costs loss[i, k]; a best assignment leaves no cycle of negative loss, so
    shortest distances exist, and equally good assignments use shortest paths alone (linear programming duality).
    """
    columns = _solve(np.where(allowed, level, -np.inf))
    own = level[np.arange(len(level)), columns]
    loss = np.where(allowed, own[:, None] - level, np.iinfo(np.int64).max // 4)[:, columns]
    distance = np.zeros(len(level), dtype=np.int64)
    while (closer := np.minimum(distance, (distance[:, None] + loss).min(axis=0))).tolist() != distance.tolist():
        distance = closer
    tight = np.zeros_like(allowed)
    tight[:, columns] = distance[:, None] + loss == distance
    return tight


def _first(allowed: Mask) -> list[int]:
    """Of all assignments that are allowed the one whose first row has the lowest column, and so on."""
    columns = _solve(np.where(allowed, 0.0, -np.inf)).tolist()
    size = len(columns)
    for row in range(size):
        takes = allowed[:, columns]  # takes[i, k]: row i may have the column that row k has
        through = {row: row}
        frontier = [row]
        while frontier:  # rows, none of them decided yet, that can move on if this row's column becomes free
            found = [
                (int(giver), taken)
                for taken in frontier
                for giver in np.flatnonzero(takes[:, taken])
                if giver > row and int(giver) not in through
            ]
            frontier = [giver for giver, taken in found if through.setdefault(giver, taken) == taken]
        wanted = min((row_of for row_of in through if takes[row, row_of]), key=lambda k: columns[k])
        before, step = list(columns), wanted
        columns[row] = before[wanted]
        while step != row:
            columns[step] = before[through[step]]
            step = through[step]
    return columns
