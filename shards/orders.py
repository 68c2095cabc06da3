"""Slice orders of a shard (S3T's sequences); `B` of them survive more deletions than one."""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from fractions import Fraction
from functools import lru_cache

from shards.errors import RecipeError

Order = tuple[int, ...]

DELETIONS = 100
"""How many deletions ahead `weighted` looks: S3T's default."""
_GRID = 2**32
"""Rates become whole shares of this: sums are then exact, and the same on every platform."""


def orders_for(
    slices: int, budget: int, rates: Sequence[float] = (), last: AbstractSet[int] = frozenset()
) -> tuple[Order, ...]:
    """A recipe's orders: by the deletion prior where there is one, else rotations, and past `slices` recursive ones.

    Raises:
        RecipeError: rates that are no prior, or more orders than there are; the message names the field.
    """
    if rates:
        if len(rates) != slices:
            raise RecipeError(f"prior: there are rates for {len(rates)} slices, but slices is {slices}")
        return weighted(rates, budget, last)
    if last:
        raise RecipeError("prior: slices that expire need rates, as all others do")
    return cyclic(slices, budget) if budget <= slices else recursive(slices, budget)


def cyclic(slices: int, budget: int) -> tuple[Order, ...]:
    """The first `budget` rotations of 0..slices-1 (S3T, Algorithm 1): distinct first slices, a Latin rectangle.

    Raises:
        RecipeError: more orders than rotations exist.
    """
    if not 1 <= budget <= slices:
        raise RecipeError(f"orders must lie between 1 and slices ({slices}), not {budget}")
    return tuple(tuple((start + step) % slices for step in range(slices)) for start in range(budget))


def recursive(slices: int, budget: int) -> tuple[Order, ...]:
    """`budget` distinct orders, up to all L!: the rotations, then those with their suffixes rotated too.

    Every whole block of L orders is a Latin square, and the first L(L-1) orders begin with each pair of slices once.

    Raises:
        RecipeError: more than L! orders.
    """
    if slices < 1:
        raise RecipeError(f"slices must be at least 1, not {slices}")
    _check_budget(budget, math.factorial(slices), f"slices ({slices}) have")
    rotations = cyclic(slices, slices)
    return tuple(_rotated(rotations, index) for index in range(budget))


def weighted(rates: Sequence[float], budget: int, last: AbstractSet[int] = frozenset()) -> tuple[Order, ...]:
    """Orders for slices that lose records at different rates; the first begins with the slice of the lowest rate.

    S3T's bipartite matching selection: position by position, each slice goes to one of the partial orders such that
    the sum of expected surviving prefix lengths after `DELETIONS` deletions is the largest; the length is the sum over
    n of (1 - share of the first n slices) ** DELETIONS. The slices in `last`, whose records have a known date, go to
    the end of every order, arranged in the same way. The first orders, one for each slice that is not in `last`, are
    a Latin square of those slices; further ones rotate suffixes as `recursive` does. Equal rates give `recursive`.
    Ties go to the lower rate, then to the lower index.

    Args:
        rates: deletions per slice, in any one unit.
        budget: how many orders.
        last: indices of slices.

    Raises:
        RecipeError: a rate that is no finite number of at least 0, rates that are all 0, or more orders than there are.
    """
    exact = _checked(rates)
    if not last <= set(range(len(exact))):
        raise RecipeError(f"prior: slices that expire must lie between 0 and {len(exact) - 1}")
    heads, tails = math.factorial(len(exact) - len(last)), math.factorial(len(last))
    where = f"slices ({len(exact)}, {len(last)} of them expiring) have" if last else f"slices ({len(exact)}) have"
    _check_budget(budget, heads * tails, where)
    free, expiring = _weighted(tuple(exact), frozenset(last))
    return tuple(
        _rotated(free, index % heads) + _rotated(expiring, (index % heads + index // heads) % tails)
        for index in range(budget)
    )


def _check_budget(budget: int, most: int, where: str) -> None:
    if budget < 1:
        raise RecipeError(f"orders must be at least 1, not {budget}")
    if budget > most:
        raise RecipeError(f"orders: {where} no more than {most} distinct orders, not {budget}: lower orders")


def _checked(rates: Sequence[object]) -> list[Fraction]:
    if not rates:
        raise RecipeError("prior: there is no rate: give each class one, or leave prior out")
    exact: list[Fraction] = []
    for index, rate in enumerate(rates):
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not math.isfinite(rate) or rate < 0:
            raise RecipeError(f"prior: rate of slice {index} must be a finite number of at least 0, not {rate!r}")
        exact.append(Fraction(rate))
    if not any(exact):
        raise RecipeError("prior: rate is 0 everywhere: give at least one class a positive one, or leave prior out")
    return exact


@lru_cache(maxsize=64)
def _weighted(rates: tuple[Fraction, ...], last: frozenset[int]) -> tuple[tuple[Order, ...], tuple[Order, ...]]:
    """Latin squares of the slices that are free, and of those that go last."""
    total = sum(rates)
    shares = [round(rate / total * _GRID) for rate in rates]
    ranked = sorted(range(len(rates)), key=lambda index: (rates[index], index))
    free, expiring = [i for i in ranked if i not in last], [i for i in ranked if i in last]
    left = sum(shares[index] for index in expiring)
    return _latin(free, shares, left), _latin(expiring, shares, 0)


def _latin(slices: Sequence[int], shares: Sequence[int], left: int) -> tuple[Order, ...]:
    """A Latin square of `slices`, which are sorted by rate; order i begins with the i-th.

    `left` is the share of deletions that hits what comes after them.
    """
    from shards.matching import best_matching  # noqa: PLC0415 - scipy costs 0.3 s, and most recipes have no prior

    size = len(slices)
    if len({shares[index] for index in slices}) <= 1:
        return tuple(tuple(slices[place] for place in order) for order in cyclic(size, size)) if size else ()
    alive = left + sum(shares[index] for index in slices)
    orders = [[index] for index in range(size)]  # places in `slices`
    surviving = [alive - shares[index] for index in slices]
    for _ in range(size - 1):
        scores = [
            [None if place in order else (surviving[i] - shares[slices[place]]) ** DELETIONS for place in range(size)]
            for i, order in enumerate(orders)
        ]
        for i, place in enumerate(best_matching(scores)):
            orders[i].append(place)
            surviving[i] -= shares[slices[place]]
    return tuple(tuple(slices[place] for place in order) for order in orders)


def _rotated(square: Sequence[Order], index: int) -> Order:
    """The order with this index among all permutations: a row of the square, its suffixes rotated.

    The digits of the index in the mixed radix n, n - 1, .., 1 name the row and how far each suffix is rotated, so
    orders are made one by one, and no two indices give the same.
    """
    if not square:
        return ()
    index, row = divmod(index, len(square))
    order = list(square[row])
    for start in range(1, len(order)):
        if not index:
            break
        index, turn = divmod(index, len(order) - start)
        order[start:] = order[start + turn :] + order[start : start + turn]
    return tuple(order)
