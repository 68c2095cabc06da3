"""The planner as a table: what a shard has is a number, a deletion and a rebuild are look-ups.

A shard passes through few different holdings, so each is worked out once, by the planner's own code, and thousands of
histories are then arrays of numbers. Records come in equal numbers to every cell, and none are added.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shards.chains import Cost, Grid, Holding
from shards.rebuild import Policy, wanted

Numbers = npt.NDArray[np.int64]
Amounts = npt.NDArray[np.float64]
_UNKNOWN = -1


@dataclass
class Automaton:
    """Holdings of one shard, found as they are met; number 0 is full health."""

    grid: Grid
    cost: Cost
    policy: Policy
    """How a rebuild goes; `when` is the simulation's business."""
    holdings: list[Holding] = field(init=False)
    _numbers: dict[frozenset[tuple[int, ...]], int] = field(init=False)
    _hit: Numbers = field(init=False)
    _rebuilt: Numbers = field(init=False)
    _work: Amounts = field(init=False)
    _depth: Numbers = field(init=False)

    def __post_init__(self) -> None:
        self.holdings, self._numbers = [], {}
        self._hit = np.full((0, self.grid.slices), _UNKNOWN)
        self._rebuilt, self._depth = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self._work = np.zeros(0)
        self.number(Holding(frozenset(self.grid.nodes)))

    @property
    def whole(self) -> float:
        """Work of training the recipe's own orders of one shard from nothing."""
        return sum(map(self.cost, self.grid.nodes))

    def number(self, holding: Holding) -> int:
        """The number of a holding, met before or not."""
        found = self._numbers.get(holding.fresh)
        if found is None:
            found = self._numbers[holding.fresh] = len(self.holdings)
            self.holdings.append(holding)
            depth = len(holding.reach()) if self.grid.cells else holding.depth
            self._hit = np.vstack([self._hit, np.full((1, self.grid.slices), _UNKNOWN)])
            self._rebuilt = np.append(self._rebuilt, _UNKNOWN)
            self._work = np.append(self._work, 0.0)
            self._depth = np.append(self._depth, depth)
        return found

    def depth(self, states: Numbers) -> Numbers:
        """Slices that serve; any shape."""
        return self._depth[states]

    def hit(self, states: Numbers, slices: Numbers) -> Numbers:
        """What is left after a deletion from a slice; any shape, both the same."""
        found = self._hit[states, slices]
        if (found == _UNKNOWN).any():
            for state, index in {(int(s), int(i)) for s, i in zip(states.ravel(), slices.ravel(), strict=True)}:
                if self._hit[state, index] == _UNKNOWN:
                    left = frozenset(prefix for prefix in self.holdings[state].fresh if index not in prefix)
                    number = self.number(Holding(left))
                    self._hit[state, index] = number
            found = self._hit[states, slices]
        return found

    def rebuild(self, states: Numbers) -> tuple[Numbers, Amounts]:
        """What the policy's rebuild leads to, and its work; any shape."""
        found = self._rebuilt[states]
        if (found == _UNKNOWN).any():
            for state in {int(each) for each in states.ravel()}:
                if self._rebuilt[state] == _UNKNOWN:
                    holding = self.holdings[state]
                    stages, _ = wanted(self.policy, self.grid, holding, self.cost)
                    number = self.number(Holding(holding.fresh | frozenset(stages)))
                    self._rebuilt[state], self._work[state] = number, sum(map(self.cost, stages))
            found = self._rebuilt[states]
        return found, self._work[states]
