"""When engine `sisa` shows which record to its model: SISA's rule for epochs, exactly, as a function of the records."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from uuid import UUID

from shards.engine.determinism import epoch_order
from shards.recipe import Recipe


def stage_epochs(recipe: Recipe) -> Fraction:
    """Passes of each stage over its records: 2e'/(L+1), so that L stages on 1/L, 2/L, .. L/L of a shard add up to e'.

    arXiv 1912.03817, section IV. An exact fraction: the published code takes differences of rounded numbers, and
    whole stages lose all their epochs (facts/exact-unlearning.md 4.25).
    """
    return Fraction(2 * recipe.epochs, recipe.slices + 1)


def epochs(seed: int, records: Iterable[UUID], passes: Fraction) -> Iterator[list[UUID]]:
    """The records of each epoch in their order: whole epochs, then the first part of one more where `passes` has one.

    Of n records the last epoch shows the first ceil(n * fraction) of its keyed order. Taking a record out changes
    nothing about the order of the others.
    """
    ids = list(records)
    whole, rest = divmod(passes, 1)
    for epoch in range(whole):
        yield epoch_order(seed, epoch, ids)
    if shown := math.ceil(rest * len(ids)):
        yield epoch_order(seed, whole, ids)[:shown]


def batches(order: list[UUID], size: int) -> Iterator[list[UUID]]:
    """An epoch cut into as few batches of at most `size` as will do, whose sizes differ by one at most.

    A short last batch would count its few records for more, and one of a single record has no variance to normalise
    by.
    """
    count = math.ceil(len(order) / size)
    for index in range(count):
        yield order[len(order) * index // count : len(order) * (index + 1) // count]


def steps(records: int, passes: Fraction, size: int) -> int:
    """Optimizer steps of a stage over so many records."""
    whole, rest = divmod(passes, 1)
    return whole * math.ceil(records / size) + math.ceil(math.ceil(rest * records) / size)
