"""How an answer is drawn, and one step of it: what servers say to an engine, and hear from it. Loads no torch."""

from dataclasses import dataclass
from typing import Literal

from shards.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn."""

    max_new_tokens: int = 64
    """At most so many, and never more than the recipe's `max_tokens` leave room for (`Prompts.room`)."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these; its end token ends it in any case."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    seed: int = 0
    """Of the draws, where the temperature is above 0."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn from, naming the field."""
        if self.max_new_tokens < 1:
            raise RecipeError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature <= 100:
            raise RecipeError("temperature must be between 0 and 100")
        if not all(self.stop):
            raise RecipeError("stop: an empty text would end every answer; leave it out")


@dataclass(frozen=True, slots=True)
class Step:
    """One more token of an answer."""

    text: str
    """What the answer grows by; empty while it could still turn out to be the start of a stop text, or of a letter."""
    tokens: int
    """Tokens drawn so far, the end token included."""
    prompt_tokens: int
    finish: Literal["stop", "length"] | None = None
    """Of the last step: whether the answer ended by itself (or at a stop text), or for want of room."""
