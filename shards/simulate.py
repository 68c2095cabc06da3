"""Simulated histories of a model: served depth and training work under each policy, beside SISA and full retrains.

Deletions come as a Poisson process with a constant chance per user; each hits the cell of its user. The rebuilds are
the planner's own (`shards.automaton`). Training takes time: deletions that come meanwhile take their stages out of
what is being trained as well.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shards.automaton import Amounts, Numbers
from shards.rebuild import last_safe_start
from shards.scenario import MONTH, Curve, Scenario, Strategy, strategies

DAY = 86_400.0


def simulate(
    scenario: Scenario, compared: Sequence[Strategy] = (), tick: Callable[[], None] = lambda: None
) -> tuple[Curve, ...]:
    """Run every strategy, by default the usual ones, on the same histories of deletions.

    `tick` is called once a simulated day and strategy.
    """
    return tuple(_Run(scenario, each).curve(tick) for each in compared or strategies(scenario.slices))


class _Run:
    """All histories of one strategy, side by side. Times are in days; arrays have one row a history."""

    def __init__(self, scenario: Scenario, strategy: Strategy) -> None:
        self.scenario, self.strategy = scenario, strategy
        self.shard = scenario.automaton(strategy.engine, strategy.policy)
        shape = (scenario.histories, scenario.shards)
        self.live: Numbers = np.zeros(shape, dtype=np.int64)
        """What serves, by (history, shard)."""
        self.coming: Numbers = np.zeros(shape, dtype=np.int64)
        """What will, once the training that is under way ends."""
        self.ends: Amounts = np.full(scenario.histories, np.inf)
        self.waiting: Amounts = np.full(scenario.histories, np.inf)
        """When the first deletion came that no training took in."""
        self.taken_in: Amounts = np.full(scenario.histories, np.inf)
        """When the first came that the training under way took in."""
        self.work: Amounts = np.zeros(scenario.histories)
        self.missed: Amounts = np.zeros(scenario.histories)
        self.lags: list[float] = []

    def curve(self, tick: Callable[[], None]) -> Curve:
        depth: list[float] = []
        least: list[float] = []
        work: list[float] = []
        steps = self.scenario.plans_per_day
        deletions = _deletions(self.scenario)
        for day in range(self.scenario.days):
            for step in range(steps):
                start = day + step / steps
                self._delete(start, next(deletions))
                if step == steps - 1:
                    served = self._served(start + 1 / steps)
                    depth.append(float(served.mean()))
                    least.append(float(served.min(axis=1).mean()))
                self._plan(start + 1 / steps)
            work.append(float(self.work.mean()))
            tick()
        return Curve(
            self.strategy.name,
            depth=tuple(depth),
            least=tuple(least),
            work=tuple(work),
            work_error=float(self.work.std() / np.sqrt(len(self.work))),
            lag=float(np.mean(self.lags)) if self.lags else None,
            missed=float(self.missed.mean()),
        )

    def _served(self, now: float) -> Amounts:
        served = self.shard.depth(self.live) / self.scenario.slices
        if self.strategy.policy.kind == "rebuild_first":  # what was trained first serves until its successor is there
            served[np.minimum(self.taken_in, self.waiting) + self.scenario.due_days > now] = 1.0
        return served

    def _delete(self, start: float, hits: "_Hits") -> None:
        histories = np.arange(len(self.live))
        for order in range(hits.most):
            part = np.minimum((order + 0.5) / np.maximum(hits.counts, 1), 1.0)  # no later than the next step begins
            now = start + part / self.scenario.plans_per_day
            self._finish(now)
            there = histories[order < hits.counts]
            shards, slices = hits.shards[there, order], hits.slices[there, order]
            for states in (self.live, self.coming):
                states[there, shards] = self.shard.hit(states[there, shards], slices)
            self.waiting[there] = np.minimum(self.waiting[there], now[there])
        self._finish(np.full(len(self.live), start + 1 / self.scenario.plans_per_day))

    def _finish(self, now: Amounts) -> None:
        done = self.ends <= now
        self.live[done] = self.coming[done]
        self.ends[done] = self.taken_in[done] = np.inf

    def _plan(self, now: float) -> None:
        chosen = np.isinf(self.ends) & self._wants(now)
        if not chosen.any():
            return
        coming, work = self.shard.rebuild(self.live[chosen])
        if self.strategy.way == "monthly":
            coming, work = np.zeros_like(coming), np.full(work.shape, self.shard.whole)
        share = work.sum(axis=1) / self.scenario.full_retrain
        self.coming[chosen] = coming
        self.work[chosen] += share
        self.ends[chosen] = now + share * self.scenario.full_days
        self.taken_in[chosen] = self.waiting[chosen]
        lag = np.where(share > 0, self.ends[chosen] - self.waiting[chosen], -np.inf)  # else nothing had to be trained
        self.lags += lag[np.isfinite(lag)].tolist()
        self.missed[chosen] += lag > self.scenario.due_days
        self.waiting[chosen] = np.inf

    def _wants(self, now: float) -> np.ndarray:
        """Which histories begin a rebuild now, none being under way."""
        if self.strategy.way != "policy":
            due = self.strategy.way == "monthly" and abs(now / MONTH - round(now / MONTH)) < 1e-9
            return np.full(len(self.live), due)
        if self.strategy.policy.kind != "by_deadline":
            return ~np.isinf(self.waiting)
        pace = self.scenario.full_days * DAY / self.scenario.full_retrain
        ahead = last_safe_start(self.scenario.full_retrain, 0.0, pace) or 0.0
        latest = self.waiting + self.scenario.due_days + ahead / DAY
        return latest < now + 1 / self.scenario.plans_per_day  # the next run of the planner would be too late


@dataclass(frozen=True, slots=True)
class _Hits:
    """The deletions of one step: of history h the first `counts[h]` of each row."""

    counts: Numbers
    shards: Numbers
    slices: Numbers

    @property
    def most(self) -> int:
        return int(self.counts.max(initial=0))


def _deletions(scenario: Scenario) -> Iterator[_Hits]:
    """Step after step; the same for every strategy."""
    random = np.random.default_rng(scenario.seed)
    left = np.full(scenario.histories, scenario.users)
    while True:
        expected = scenario.per_day / scenario.plans_per_day * left / scenario.users
        counts = np.minimum(random.poisson(expected), left)
        left = left - counts
        shape = (scenario.histories, int(counts.max(initial=0)))
        shards = random.integers(scenario.shards, size=shape)
        slices = random.choice(scenario.slices, size=shape, p=scenario.chances)
        yield _Hits(counts, shards, slices)
