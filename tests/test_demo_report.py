import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.cli.demo.report import Accuracy, Report, Versions

GOOD = Report(
    deactivated_ms=12.5,
    deactivated_ms_client=12.5,
    deactivated_ms_server=10.0,
    versions=Versions(1, 2, 3),
    predictions_total=100,
    predictions_failed=0,
    predictions_stale=0,
    predictions_after_deactivated=20,
    predictions_versions=(1, 2, 3),
    records_deleted=5,
    stages_tainted=4,
    artifacts_destroyed=9,
    certificate_verified=True,
    replay_equal=True,
    replayed_stage="ab" * 32,
    depth_before=(3, 3),
    depth_after_deactivation=(3, 1),
    depth_after_rebuild=(3, 3),
    accuracy=Accuracy(0.87, 0.85, 0.86, 0.85, 0.86),
    accuracy_stderr=0.012,
    training_records=2001,
    reviewers=1144,
    held_out_records=802,
    seconds={"training": 140.0},
    seconds_total=300.0,
)


def test_the_file_has_the_promised_keys(tmp_path: Path) -> None:
    GOOD.write(tmp_path / "demo-report.json")
    found = json.loads((tmp_path / "demo-report.json").read_text())
    assert found.keys() >= {
        "deactivated_ms", "versions", "predictions_total", "predictions_failed", "predictions_stale",
        "stages_tainted", "artifacts_destroyed", "certificate_verified", "replay_equal", "depth_before",
        "depth_after_deactivation", "depth_after_rebuild", "accuracy", "seconds_total",
    }  # fmt: skip
    assert found["accuracy"].keys() == {"monolithic", "before", "previewed", "deactivated", "rebuilt"}
    assert [path.name for path in tmp_path.iterdir()] == ["demo-report.json"]


def test_success_is_all_of_it() -> None:
    assert GOOD.failures() == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"predictions_total": 0}, "no prediction"),
        ({"predictions_failed": 1}, "failed"),
        ({"predictions_stale": 1}, "stale"),
        ({"predictions_after_deactivated": 0}, "answered nothing after"),
        ({"predictions_versions": (1, 3)}, "from the deactivated version"),
        ({"deactivated_ms": 1200.0}, "only after 1200 ms"),
        ({"stages_tainted": 0}, "tainted no stage"),
        ({"artifacts_destroyed": 3}, "only 3 artefacts"),
        ({"certificate_verified": False}, "certificate"),
        ({"replay_equal": False}, "replayed"),
        ({"versions": Versions(1, 2, 2)}, "versions"),
        ({"depth_after_deactivation": (3, 3)}, "did not lower"),
        ({"depth_after_rebuild": (3, 2)}, "did not restore"),
        ({"accuracy": replace(GOOD.accuracy, previewed=0.86)}, "previewed 0.8600"),
    ],
)
def test_each_failure_is_named(change: dict[str, Any], says: str) -> None:
    failures = replace(GOOD, **change).failures()
    assert len(failures) == 1
    assert says in failures[0]
