"""Running out of memory, said in the words of the recipe."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from shards.errors import MemoryShortageError
from shards.recipe import Recipe

_FIELDS = {
    "s3t": "batch_size, max_tokens, layers_per_slice or lora.rank (precision bfloat16 takes half)",
    "sisa": "batch_size or max_tokens",
    "ridge": "max_tokens or ridge.layers (precision bfloat16 takes half)",
}
_SIGNS = ("not enough memory", "can't allocate memory", "out of memory")


@contextmanager
def enough_memory(recipe: Recipe, doing: str) -> Generator[None]:
    """Say which fields of the recipe to turn down when memory runs out while `doing` something.

    Raises:
        MemoryShortageError: it did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        error.__traceback__ = None  # it would keep the tensors
        raise MemoryShortageError(
            f"memory ran out while {doing}: turn down {_FIELDS[recipe.engine]} as a new recipe, or give the process "
            "more memory"
        ) from None


def is_shortage(error: Exception) -> bool:
    """Whether an error says that memory ran out; torch has no class of its own for it on CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)
