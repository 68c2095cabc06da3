"""What is told of a training that failed, on its job's row, in events and logs: nothing of a record (design.md 2)."""

from shards.errors import (
    BackboneError,
    CommandError,
    DivergedError,
    MemoryShortageError,
    ModuleError,
    RecipeError,
)

TOLD = frozenset({CommandError, DivergedError, MemoryShortageError, ModuleError, RecipeError})
"""Errors whose messages are told also where records are at hand: none of ours is made of one."""


def told(failure: Exception, *, at_hand: bool) -> str:
    """The class of a failure; with its message where that names nothing but steps, files and fields of the recipe.

    `at_hand`: whether records were. Then a subclass, and a message that quotes somebody else's code, its cause, may
    quote them too.
    """
    if at_hand:
        own = type(failure) in TOLD and failure.__cause__ is None
    else:
        own = isinstance(failure, BackboneError | RecipeError | MemoryShortageError)
    return f"{type(failure).__name__}: {failure}" if own else type(failure).__name__
