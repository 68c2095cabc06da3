"""Slice orders of a shard (S3T's sequences); `B` of them survive more deletions than one."""

from shards.errors import RecipeError


def cyclic(slices: int, budget: int) -> tuple[tuple[int, ...], ...]:
    """The first `budget` rotations of 0..slices-1 (S3T, Algorithm 1): distinct first slices, a Latin rectangle.

    Raises:
        RecipeError: more orders than rotations exist.
    """
    if not 1 <= budget <= slices:
        raise RecipeError(f"orders must lie between 1 and slices ({slices}), not {budget}")
    return tuple(tuple((start + step) % slices for step in range(slices)) for start in range(budget))
