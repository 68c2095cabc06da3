"""How a rebuilt assembly comes into service: the bounds that it must keep, and its share of the traffic at first."""

from dataclasses import dataclass
from typing import Any, Self

TOLERANCE = 1e-9
"""Of scores that are equal but for rounding."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Bounds on an assembly's score on the evaluation set. Scores are shares, 1 is best; 0.01 is a point."""

    within: float | None = None
    """How many points below the served assembly it may be."""
    at_least: float | None = None
    """The lowest score that may serve."""

    def passes(self, score: float, base: float | None) -> bool:
        """Whether the score may serve where `base` serves now; None: nothing does."""
        near = self.within is None or base is None or score >= base - self.within / 100 - TOLERANCE
        return near and (self.at_least is None or score >= self.at_least - TOLERANCE)

    def to_json(self) -> dict[str, Any]:
        """As it is kept and shown."""
        return {"within": self.within, "at_least": self.at_least}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Self:
        """From `to_json`."""
        return cls(**body)


@dataclass(frozen=True, slots=True)
class Canary:
    """How a rebuilt assembly is tried on real traffic."""

    share: int
    """Per cent of the requests."""
    minutes: float | None = None
    """After this time without an error of the engine it gets all traffic; None: an operator decides."""

    def to_json(self) -> dict[str, Any]:
        """As it is kept and shown."""
        return {"share": self.share, "minutes": self.minutes}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Self:
        """From `to_json`."""
        return cls(**body)
