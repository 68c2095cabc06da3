"""Replay: train a stage's whole chain from nothing and compare digests; the check behind `retrain-equal`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shards.digest import sha256_hex
from shards.engine.s3t import S3T, Progress, check_lineage
from shards.errors import ReplayMismatchError
from shards.manifest import Record
from shards.stages import Stage


@dataclass(frozen=True, slots=True)
class Comparison:
    """One stage trained again."""

    stage: str
    """Stage key."""
    expected: str
    """Digest of the artefact that is served."""
    found: str
    """Digest of the artefact trained from nothing."""
    fingerprint: Mapping[str, str]
    """Platform on which it was trained again."""

    @property
    def equal(self) -> bool:
        """Whether both are the same, bit for bit."""
        return self.expected == self.found

    def check(self) -> None:
        """Refuse a difference.

        Raises:
            ReplayMismatchError: the digests differ.
        """
        if not self.equal:
            raise ReplayMismatchError(
                f"stage {self.stage[:12]} is served as {self.expected[:12]}, training it from nothing gave "
                f"{self.found[:12]}: compare the platform fingerprints; where they agree, take it out of service"
            )

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON."""
        return {
            "stage": self.stage,
            "expected": self.expected,
            "found": self.found,
            "equal": self.equal,
            "fingerprint": dict(self.fingerprint),
        }


def replay(
    engine: S3T,
    stages: Sequence[Stage],
    records_by_slice: Mapping[int, Sequence[Record]],
    progress: Progress | None = None,
) -> list[str]:
    """Train a chain from nothing, ancestors first, and return the artefacts' digests. Keeps nothing.

    Args:
        engine: of the stages' recipe.
        stages: a chain, shortest prefix first.
        records_by_slice: records of every slice that the chain reads.
        progress: optimizer steps within the stage at hand.

    Raises:
        ManifestMismatchError: the records are not those of the stages' manifests.
    """
    artifacts: list[bytes] = []
    try:
        for stage in stages:
            records = check_lineage(stage, {index: records_by_slice[index] for index in stage.prefix})
            artifacts.append(engine.train(stage, records, artifacts, progress))
    finally:
        engine.trunk.clear()
    return [sha256_hex(artifact) for artifact in artifacts]


def compare(
    stages: Sequence[Stage], expected: Sequence[str], found: Sequence[str], fingerprint: Mapping[str, str]
) -> list[Comparison]:
    """Per stage of a chain the digest that is served beside the one that replay found."""
    return [
        Comparison(stage.key, served, again, fingerprint)
        for stage, served, again in zip(stages, expected, found, strict=True)
    ]
