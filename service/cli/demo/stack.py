"""The programs that the demo starts, and that end with it however it ends."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import IO, Any

from service.cli.demo.assets import DemoError
from service.standalone.launch import command

HOST = "127.0.0.1"
EXPUNGE = (sys.executable, "-c", "from service.cli.main import main; main()")
"""The `expunge` command of this very installation, wherever its script lies."""
UP_WITHIN = 120.0
STOP_WITHIN = 60.0
_TAIL = 25


@dataclass(frozen=True, slots=True)
class Stack:
    """A running `expunge up`."""

    state: Path
    api_url: str
    servers: tuple[str, ...]
    """The model servers' URLs."""
    api_key: str
    process: subprocess.Popen[bytes]
    log: Path
    """What `up` said; each program's own log lies in `state/logs`."""

    @property
    def public_key(self) -> Path:
        """The certificate's public key."""
        return self.state / "keys" / "signing.pub"

    @property
    def programs(self) -> Mapping[str, int]:
        """Process id by program; another one after a restart."""
        return json.loads((self.state / "run" / "up.json").read_text())["programs"]

    def check(self) -> None:
        """Raise `DemoError` with the end of the logs where `up` is gone."""
        if (code := self.process.poll()) is not None:
            raise DemoError(f"`expunge up` ended by itself (exit code {code})\n{tail(self.log)}")

    def trouble(self, program: str) -> str:
        """Where a program's log is, and its end."""
        return tail(self.state / "logs" / f"{program}.log")


def prepare(home: Path) -> None:
    """An empty home for the demo; an earlier demo's is removed, anything else is refused.

    Raises:
        DemoError: the directory is not an earlier demo's, or one is running there.
    """
    if home.exists():
        known = {"state", "up.log", "monolithic.log", "certificate.json"}
        if not home.is_dir() or not {path.name for path in home.iterdir()} <= known:
            raise DemoError(f"{home} was not made by the demo: move it away, or run the demo elsewhere")
        with suppress(FileNotFoundError, ValueError, KeyError):
            pid = json.loads((home / "state" / "run" / "up.json").read_text())["pid"]
            if _is_up(pid):
                raise DemoError(f"a demo is running in {home} (process {pid}): wait for its end, or stop it")
        shutil.rmtree(home)
    home.mkdir(mode=0o700)


@contextmanager
def running(home: Path, wait: Callable[[], None], *, trainers: int = 2) -> Generator[Stack]:
    """Start `expunge up` in `home/state`, which a later call finds again; ready in the block, gone after it.

    `wait` is called now and then, so that the caller can show that time passes.
    """
    state, log = home / "state", home / "up.log"
    port = free_ports(3)
    argv = [*EXPUNGE, "up", "--state", str(state), "--port", str(port), "--trainers", str(trainers)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command(argv, death_signal=SIGTERM),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the demo's to handle
        )
    try:
        document = _wait_until_ready(process, state, log, wait)
        key = (state / "keys" / "first-api-key").read_text().strip()
        yield Stack(state, document["api_url"], tuple(document["servers"]), key, process, log)
    finally:
        _stop(process)


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that are free now."""
    for first in range(18700, 28700, count):
        try:
            with _bound(first, count):
                return first
        except OSError:
            continue
    raise DemoError(f"no {count} free ports in a row between 18700 and 28700 on {HOST}")


def tail(log: Path) -> str:
    """Where a log is, and its end."""
    text = re.sub(r"xp_\w+", "xp_...", log.read_text(errors="replace")) if log.exists() else ""
    lines = text.splitlines()[-_TAIL:]
    return "\n".join([f"the end of {log}; the others are beside it or in state/logs:", *lines])


class Side:
    """A program beside the demo that reads one JSON object and writes JSON lines: progress, at the end the answer."""

    def __init__(self, module: str, given: Mapping[str, Any], *, log: Path, nice: int = 19) -> None:
        """Start it, at the lowest priority: it takes what the others leave."""
        self._module, self._log = module, log
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command([sys.executable, "-m", module], death_signal=SIGKILL, nice=nice),
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self.progress: tuple[int, int | None] = (0, None)
        """Steps done, and of how many where that is known."""
        self.answer: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._talk, args=(json.dumps(given).encode(),), daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it goes on; raises `DemoError` where it failed."""
        if self._thread.is_alive():
            return True
        if code := self._process.wait():
            raise DemoError(f"{self._module} failed (exit code {code})\n{tail(self._log)}")
        return False

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._thread.join()

    def _talk(self, given: bytes) -> None:
        stdin, stdout = _pipes(self._process)
        with suppress(BrokenPipeError), stdin:
            stdin.write(given)
        for line in stdout:
            said = json.loads(line)
            if "total" in said:
                self.progress = (said["done"], said["total"])
            else:
                self.answer = said


def run_json(arguments: Sequence[str]) -> tuple[int, dict[str, Any], str]:
    """Run an `expunge` command to its end: exit code, the JSON that it printed or nothing, what else it said."""
    done = subprocess.run(
        [*EXPUNGE, *arguments],
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    try:
        document = json.loads(done.stdout)
    except ValueError:
        document = {}
    return done.returncode, document, (done.stderr or done.stdout).strip()


def _environment() -> dict[str, str]:
    """Ours without any EXPUNGE_ variable: the demo may not touch a real database."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("EXPUNGE_")}
    return env | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise AssertionError("started with pipes")
    return process.stdin, process.stdout


def _wait_until_ready(
    process: subprocess.Popen[bytes], state: Path, log: Path, wait: Callable[[], None]
) -> dict[str, Any]:
    began = time.monotonic()
    while True:
        with suppress(FileNotFoundError, ValueError):
            return json.loads((state / "run" / "up.json").read_text())
        if (code := process.poll()) is not None:
            raise DemoError(f"`expunge up` did not start (exit code {code})\n{tail(log)}")
        if time.monotonic() - began > UP_WITHIN:
            raise DemoError(f"`expunge up` was not ready within {UP_WITHIN:.0f} s\n{tail(log)}")
        wait()
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()  # its children die with it
        process.wait()


def _is_up(pid: int) -> bool:
    try:
        return b"service.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextmanager
def _bound(first: int, count: int) -> Generator[None]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for offset, probe in enumerate(probes):
            probe.bind((HOST, first + offset))
        yield
    finally:
        for probe in probes:
            probe.close()
