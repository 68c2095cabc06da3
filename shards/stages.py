"""Stages and their keys: a stage's name is known before it is trained, like a build key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shards.digest import digest_of


@dataclass(frozen=True, slots=True, order=True)
class CellRoot:
    """The manifest of one cell that a stage reads."""

    shard: int
    slice: int
    root: str


@dataclass(frozen=True)
class Stage:
    """The result of training the first slices of an order: a pure function of recipe and manifests."""

    recipe: str
    """Digest of the recipe."""
    shard: int
    prefix: tuple[int, ...]
    """The slices trained so far, in order; its length is the stage index, counted from 1."""
    roots: tuple[str, ...]
    """Manifest roots of those slices, aligned with `prefix`."""
    parent: str | None
    """Key of the stage one slice shorter, None for the first."""

    @property
    def depth(self) -> int:
        """Stage index: how many slices, and so how many blocks, are trained."""
        return len(self.prefix)

    @cached_property
    def lineage(self) -> frozenset[CellRoot]:
        """Every manifest that influenced the stage; its ancestors read prefixes of the same list."""
        return frozenset(CellRoot(self.shard, s, root) for s, root in zip(self.prefix, self.roots, strict=True))

    @cached_property
    def key(self) -> str:
        """Stage key: digest of all that decides the stage's weights."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The inputs of the key; `verify` derives keys again from these."""
        return {
            "type": "expunge stage v1",
            "recipe": self.recipe,
            "shard": self.shard,
            "prefix": list(self.prefix),
            "roots": list(self.roots),
            "parent": self.parent,
        }


def chain(recipe: str, shard: int, order: Sequence[int], roots: Mapping[int, str]) -> tuple[Stage, ...]:
    """All stages of one order of a shard, shortest first, on the manifest `roots` (slice -> root)."""
    stages: list[Stage] = []
    for depth in range(1, len(order) + 1):
        prefix = tuple(order[:depth])
        parent = stages[-1].key if stages else None
        stages.append(Stage(recipe, shard, prefix, tuple(roots[s] for s in prefix), parent))
    return tuple(stages)
