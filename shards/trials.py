"""Trials of one model: what a deletion costs in the long run, and how many a model without rebuild stands."""

from dataclasses import dataclass

import numpy as np

from shards.automaton import Amounts, Numbers
from shards.rebuild import Policy
from shards.scenario import Engine, Scenario


@dataclass(frozen=True, slots=True)
class Steady:
    """What one deletion costs in the long run, each being rebuilt before the next comes."""

    work: float
    """Mean work of the rebuild, in passes of one record through one layer."""
    depth: float
    """Mean share of the slices that the hit shard serves until it is rebuilt."""
    least: float
    """The least of these shares."""


def steady(
    scenario: Scenario,
    engine: Engine = "s3t",
    policy: Policy | None = None,
    deletions: int = 200,
    settle: int = 50,
) -> Steady:
    """Simulate one shard, deletion by deletion; the first `settle` are left out of the means."""
    shard = scenario.automaton(engine, policy or Policy(kind="spares"))
    random = np.random.default_rng(scenario.seed)
    states: Numbers = np.zeros(scenario.histories, dtype=np.int64)
    works: list[Amounts] = []
    depths: list[Numbers] = []
    for _ in range(settle + deletions):
        slices = random.choice(scenario.slices, size=scenario.histories, p=scenario.chances)
        left = shard.hit(states, slices)
        states, work = shard.rebuild(left)
        works.append(work)
        depths.append(shard.depth(left))
    served = np.stack(depths[settle:]) / scenario.slices
    return Steady(float(np.mean(works[settle:])), float(served.mean()), float(served.min()))


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """Deletions until the first shard was dead, and until all were, by history; no rebuild."""

    first_dead: Numbers
    all_dead: Numbers


def lifetimes(scenario: Scenario, engine: Engine = "s3t") -> Lifetimes:
    """Delete until every shard of every history is dead. Requests repeat: the closed forms' assumption."""
    shard = scenario.automaton(engine)
    random = np.random.default_rng(scenario.seed)
    histories = np.arange(scenario.histories)
    states: Numbers = np.zeros((scenario.histories, scenario.shards), dtype=np.int64)
    first, last = (np.zeros(scenario.histories, dtype=np.int64) for _ in range(2))
    number = 0
    while not last.all():
        number += 1
        shards = random.integers(scenario.shards, size=scenario.histories)
        slices = random.choice(scenario.slices, size=scenario.histories, p=scenario.chances)
        states[histories, shards] = shard.hit(states[histories, shards], slices)
        dead = shard.depth(states) == 0
        first[(first == 0) & dead.any(axis=1)] = number
        last[(last == 0) & dead.all(axis=1)] = number
    return Lifetimes(first, last)
