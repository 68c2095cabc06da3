"""Replays: what can come of one, and which stages are drawn."""

from collections.abc import Iterable
from enum import StrEnum
from hashlib import sha256


class ReplayOutcome(StrEnum):
    """What training a stage again from nothing gave."""

    EQUAL = "equal"
    """The served bits."""
    MISMATCH = "mismatch"
    """Other bits on the same platform: the stage is taken out of service."""
    OTHER_PLATFORM = "other_platform"
    """The artefact was made on another platform: digests are not comparable here."""
    SKIPPED = "skipped"
    """The stage left service before it could be compared, for another reason."""
    FAILED = "failed"
    """It could not be trained again, for a reason other than the above."""


def draw(keys: Iterable[str], count: int, seed: str) -> list[str]:
    """`count` of the keys, all of them where there are fewer: a function of seed and keys alone.

    Each key has its own place by hash, so that one key more or less changes no other's chance.
    """
    return sorted(set(keys), key=lambda key: sha256(f"{seed}\x00{key}".encode()).digest())[:count]
