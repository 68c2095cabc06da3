"""The assembly: what is served. Immutable, known by its digest."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from shards.digest import digest_of


@dataclass(frozen=True, slots=True)
class Member:
    """The stage that speaks for one shard, with all whose blocks it stands on."""

    stage: str
    """Stage key."""
    prefix: tuple[int, ...]
    artifacts: tuple[str, ...]
    """Digests of the artefacts of the stage's ancestors and its own, shortest prefix first."""


@dataclass(frozen=True)
class Assembly:
    """Per shard the chosen stage or none, and the aggregation rule."""

    recipe: str
    members: tuple[Member | None, ...]
    """By seat, which is a shard (of engine `ridge` a cell); None is one without a clean stage."""
    aggregation: str = "logits"
    """`logits`: mean over live shards. `merged`: one adapter of all shards' factors. `sums`: one solve of all cells."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Per shard the number of live slices, 0 for a dead shard."""
        return tuple(len(member.prefix) if member else 0 for member in self.members)

    @cached_property
    def digest(self) -> str:
        """Digest of the body."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The body whose digest names the assembly."""
        return {
            "type": "expunge assembly v1",
            "recipe": self.recipe,
            "aggregation": self.aggregation,
            "members": [
                None if m is None else {"stage": m.stage, "prefix": list(m.prefix), "artifacts": list(m.artifacts)}
                for m in self.members
            ],
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read a body written by `to_json`."""
        members = tuple(
            None if m is None else Member(m["stage"], tuple(m["prefix"]), tuple(m["artifacts"]))
            for m in body["members"]
        )
        return cls(body["recipe"], members, body["aggregation"])
