"""The results file: figures by name, and how, when and where each was measured."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shards.digest import digest_of
from shards.engine import determinism

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "results.json"
FORMAT = 1


class BenchmarkError(Exception):
    """A measurement that would not mean what its name says; the message says why."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one group found."""

    figures: Mapping[str, float]
    """By name without the group's."""
    sizes: Mapping[str, Any]
    """What was measured: sizes, seeds, settings, and what the figures leave out."""


@dataclass(frozen=True, slots=True)
class Run:
    """One call of `python -m benchmarks`."""

    command: str
    commit: str
    date: str
    platform: Mapping[str, str]
    """Platform fingerprint of the training processes, and the number of cores."""

    @classmethod
    def now(cls, command: str) -> "Run":
        """The run that begins now."""
        determinism.prepare()  # as the measuring processes do: the fingerprint names their thread
        platform = determinism.fingerprint() | {"cores": str(os.cpu_count())}
        del platform["dtype"]  # differs from group to group: it is among their sizes
        return cls(command, _commit(), datetime.now(UTC).isoformat(timespec="seconds"), platform)

    @property
    def label(self) -> dict[str, str]:
        """What is kept beside each figure."""
        label = {"command": self.command, "commit": self.commit, "date": self.date}
        return label | {"platform": digest_of(dict(self.platform))[:12]}


def write(run: Run, groups: Mapping[str, Measured], *, keep: bool, file: Path = FILE) -> None:
    """Write the groups' figures; with `keep`, beside those of other groups that the file already has."""
    body: dict[str, Any] = {"figures": {}, "sizes": {}, "measured": {}}
    if keep and file.exists():
        earlier = json.loads(file.read_text())
        body = {part: _without(earlier.get(part, {}), groups) for part in body}
    for group, found in groups.items():
        figures = {f"{group}.{name}": _rounded(value) for name, value in found.figures.items()}
        body["figures"] |= figures
        body["sizes"][group] = dict(found.sizes)
        body["measured"] |= dict.fromkeys(figures, run.label)
    document = {"format": FORMAT, **run.label, "platform": dict(run.platform)}
    document |= {part: dict(sorted(body[part].items())) for part in ("figures", "sizes", "measured")}
    fresh = file.with_suffix(".tmp")
    fresh.write_text(json.dumps(document, indent=1) + "\n")
    fresh.replace(file)


def _without(part: Mapping[str, Any], groups: Mapping[str, Measured]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name.partition(".")[0] not in groups}


def _rounded(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")


def _commit() -> str:
    """The commit, marked where files differ from it; `unknown` outside a Git checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results.json")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}, with changes" if changed else commit


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
