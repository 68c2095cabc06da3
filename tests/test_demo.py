"""The demo as a user runs it, at a small size. Slow: it trains 24 stages and downloads 106 MB the first time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEMO = [sys.executable, "-c", "from service.cli.main import main; main()", "demo"]

pytestmark = [pytest.mark.slow, pytest.mark.acceptance, pytest.mark.timeout(900)]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    env = os.environ | {"EXPUNGE_CACHE_DIR": str(ROOT / ".cache" / "expunge"), "PYTHONPATH": str(ROOT)}
    arguments = [*DEMO, "--records", "240", "--held-out", "60", "--json"]
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen(arguments, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(90)
    if process.stdout:
        process.stdout.close()


def running_in(directory: Path) -> list[str]:
    """Command lines of the processes that name the directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in line:
            found.append(line)
    return found


def test_all_of_it_holds(demo: subprocess.Popen[str], tmp_path: Path) -> None:
    said, _ = demo.communicate()
    assert demo.returncode == 0, (tmp_path / "stderr").read_text()
    report = json.loads((tmp_path / "demo-report.json").read_text())
    assert json.loads(said) == report
    assert report["certificate_verified"]
    assert report["replay_equal"]
    assert report["predictions_failed"] == report["predictions_stale"] == 0
    assert running_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_it_leaves_nothing_running(
    demo: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    until = time.monotonic() + 300
    while not (tmp_path / ".expunge-demo" / "state" / "run" / "up.json").exists():
        assert time.monotonic() < until
        assert demo.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.1)
    assert running_in(tmp_path)
    demo.send_signal(number)
    assert demo.wait(90) == 130
    assert "stopped" in (tmp_path / "stderr").read_text()
    assert running_in(tmp_path) == []
    assert not (tmp_path / "demo-report.json").exists()
