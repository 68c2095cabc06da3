"""Replay: train a stage's whole chain from nothing and compare digests; the check behind `retrain-equal`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shards.digest import digest_of, sha256_hex
from shards.engine import determinism
from shards.engine.interface import Progress, Trainer, check_lineage
from shards.errors import ReplayMismatchError
from shards.manifest import Record
from shards.stages import Stage

Platform = Mapping[str, str]
"""The body of a platform fingerprint: what must be the same for training again to give the same bits."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One stage trained again."""

    stage: str
    """Stage key."""
    expected: str
    """Digest of the artefact that is served."""
    found: str | None
    """Digest of the artefact trained from nothing; None where it was not trained, for another platform made it."""
    fingerprint: Platform
    """Platform on which it was trained again."""
    made_on: Platform | None = None
    """Platform on which the served artefact was made; None where that is not known."""

    @property
    def equal(self) -> bool:
        """Whether both are the same, bit for bit."""
        return self.expected == self.found

    @property
    def differs(self) -> tuple[str, ...]:
        """Fields in which the two platforms differ; nothing where the artefact's is not known."""
        return differences(self.made_on, self.fingerprint) if self.made_on is not None else ()

    @property
    def outcome(self) -> str:
        """`equal`, `other_platform` (the digests say nothing), or `mismatch`."""
        if self.equal:
            return "equal"
        return "other_platform" if self.differs or self.found is None else "mismatch"

    def check(self) -> None:
        """Refuse a difference.

        Raises:
            ReplayMismatchError: the digests differ.
        """
        if not self.equal:
            raise ReplayMismatchError(
                f"stage {self.stage[:12]} is served as {self.expected[:12]}, training it from nothing gave "
                f"{(self.found or 'nothing')[:12]}: compare the platform fingerprints; where they agree, take it out "
                "of service"
            )

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON."""
        return {
            "stage": self.stage,
            "outcome": self.outcome,
            "expected": self.expected,
            "found": self.found,
            "equal": self.equal,
            "fingerprint": dict(self.fingerprint),
            "made_on": None if self.made_on is None else dict(self.made_on),
            "differs": list(self.differs),
        }


def platform_of(trainer: Trainer, device: str) -> dict[str, str]:
    """The platform fingerprint of what this process trains with that trainer."""
    return determinism.fingerprint(device, trainer.recipe.precision) | {"trunk": trainer.purity}


def differences(made_on: Platform, here: Platform) -> tuple[str, ...]:
    """Names of the fields in which two platforms differ, sorted."""
    return tuple(sorted(name for name in {*made_on, *here} if made_on.get(name) != here.get(name)))


def comparable(made_on: Sequence[Platform | None], here: Platform) -> int:
    """How many stages of a chain, from its first, were made on this platform, or on one that is not known.

    What stands on a stage of another platform cannot be compared here either.
    """
    here_digest = digest_of(dict(here))
    for depth, platform in enumerate(made_on):
        if platform is not None and digest_of(dict(platform)) != here_digest:
            return depth
    return len(made_on)


def replay(
    trainer: Trainer,
    stages: Sequence[Stage],
    records_by_slice: Mapping[int, Sequence[Record]],
    progress: Progress | None = None,
) -> list[str]:
    """Train a chain from nothing, ancestors first, and return the artefacts' digests. Keeps nothing.

    Args:
        trainer: of the stages' recipe.
        stages: a chain, shortest prefix first.
        records_by_slice: records of every slice that the chain reads.
        progress: steps within the stage at hand.

    Raises:
        ManifestMismatchError: the records are not those of the stages' manifests.
    """
    artifacts: list[bytes] = []
    try:
        for stage in stages:
            records = check_lineage(stage, {index: records_by_slice[index] for index in stage.prefix})
            artifacts.append(trainer.train(stage, records, artifacts, progress))
    finally:
        trainer.clear()
    return [sha256_hex(artifact) for artifact in artifacts]


def compare(
    stages: Sequence[Stage],
    expected: Sequence[str],
    found: Sequence[str],
    fingerprint: Platform,
    made_on: Sequence[Platform | None] | None = None,
) -> list[Comparison]:
    """Per stage of a chain the digest that is served beside the one that replay found.

    `found` may be shorter than the chain: the rest was not trained, for another platform made it.
    """
    again: list[str | None] = [*found, *[None] * (len(stages) - len(found))]
    platforms = made_on or [None] * len(stages)
    return [
        Comparison(stage.key, served, digest, fingerprint, platform)
        for stage, served, digest, platform in zip(stages, expected, again, platforms, strict=True)
    ]
