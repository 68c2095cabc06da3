"""What the demo found, and whether all of it held."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

WELL_UNDER_A_SECOND = 1000.0


@dataclass(frozen=True, slots=True)
class Versions:
    """Version numbers of the model at its three moments."""

    before: int
    deactivated: int
    rebuilt: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of held-out records answered right; all but the first two are measured through HTTP."""

    monolithic: float
    """One model trained on everything, in memory only."""
    previewed: float
    """What the preview said the deletion would leave."""
    before: float
    deactivated: float
    rebuilt: float


@dataclass(frozen=True, slots=True)
class Report:
    """The file `demo-report.json`."""

    deactivated_ms: float
    """From the 202 to `deactivated`: the larger of what the client saw by asking and what the server recorded."""
    deactivated_ms_client: float
    """From the 202's arrival to the first answer that said `deactivated`."""
    deactivated_ms_server: float
    """Between the times on the request: its creation and its deactivation."""
    versions: Versions
    predictions_total: int
    predictions_failed: int
    predictions_stale: int
    """Sent after the client had read `deactivated`, and answered from below the floor."""
    predictions_after_deactivated: int
    """Answers to requests sent after `deactivated` was read, of the server that gave fewest."""
    predictions_versions: tuple[int, ...]
    """Versions that answered."""
    records_deleted: int
    stages_tainted: int
    artifacts_destroyed: int
    certificate_verified: bool
    replay_equal: bool
    replayed_stage: str
    depth_before: tuple[int, ...]
    """Per shard how many slices the stage that serves was trained on."""
    depth_after_deactivation: tuple[int, ...]
    depth_after_rebuild: tuple[int, ...]
    accuracy: Accuracy
    accuracy_stderr: float
    training_records: int
    reviewers: int
    held_out_records: int
    seconds: dict[str, float]
    """What each part took."""
    seconds_total: float
    """All but the downloads."""

    def failures(self) -> list[str]:
        """What did not hold; empty is success."""
        return [what for held, what in self._checks() if not held]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        aside = path.with_name(f".{path.name}.new")
        aside.write_text(json.dumps(asdict(self), indent=2) + "\n")
        aside.replace(path)

    def _checks(self) -> Iterator[tuple[bool, str]]:
        accuracy, versions = self.accuracy, self.versions
        yield self.predictions_total > 0, "no prediction was answered"
        yield self.predictions_failed == 0, f"{self.predictions_failed} predictions failed"
        yield self.predictions_after_deactivated > 0, "a server answered nothing after the deactivation was known"
        yield versions.deactivated in self.predictions_versions, "no prediction came from the deactivated version"
        yield self.deactivated_ms < WELL_UNDER_A_SECOND, f"deactivated only after {self.deactivated_ms:.0f} ms"
        yield self.predictions_stale == 0, f"{self.predictions_stale} predictions were stale"
        yield self.stages_tainted > 0, "the deletion tainted no stage"
        yield (
            self.artifacts_destroyed >= self.stages_tainted,
            f"{self.stages_tainted} stages were tainted, only {self.artifacts_destroyed} artefacts destroyed",
        )
        yield self.certificate_verified, "the certificate did not verify"
        yield self.replay_equal, "the replayed stage differs from the served one"
        yield versions.before < versions.deactivated < versions.rebuilt, "versions did not grow"
        lower = [after <= before for before, after in self._depths()]
        yield (
            all(lower) and self.depth_after_deactivation != self.depth_before,
            "the deactivation did not lower the depth of the shard that was hit",
        )
        yield self.depth_after_rebuild == self.depth_before, "the rebuild did not restore the depth"
        # One evaluation set, one way to take the mean: equal to the last record, or something is wrong.
        yield (
            abs(accuracy.previewed - accuracy.deactivated) < 1e-6,
            f"previewed {accuracy.previewed:.4f}, but {accuracy.deactivated:.4f} after deactivation",
        )

    def _depths(self) -> Iterator[tuple[int, int]]:
        return zip(self.depth_before, self.depth_after_deactivation, strict=True)
