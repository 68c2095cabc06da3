"""Starts programs in order, restarts those that die, stops them in reverse order.

One thread, one loop: the kernel ties a child's death signal to the thread that started it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from types import FrameType

from service.standalone.errors import StandaloneError
from service.standalone.launch import Identity, command

_TICK = 0.05
_LOG_BYTES = 10 * 2**20
_TAIL_LINES = 15


def _nothing() -> None:
    """The default of `Program.prepare`."""


def _alive() -> bool:
    """The default of `Program.ready`: a program that runs is ready."""
    return True


@dataclass(frozen=True, slots=True)
class Program:
    """What to run and how to tell that it works."""

    name: str
    """Unique; also the name of its log file."""
    argv: tuple[str, ...]
    """The first is an absolute path."""
    env: Mapping[str, str]
    """The whole environment."""
    ready: Callable[[], bool] = _alive
    """Asked often, so it answers within a second; raises nothing."""
    prepare: Callable[[], None] = _nothing
    """Done before each start."""
    ready_within: float = 120.0
    """Seconds until a program that is not ready counts as dead."""
    nice: int = 0
    stop_signal: Signals = signal.SIGTERM
    """Asks for an orderly end."""
    death_signal: Signals = signal.SIGKILL
    """What the kernel sends when the supervisor is gone."""
    grace: float = 10.0
    """Seconds between `stop_signal` and SIGKILL."""
    identity: Identity = Identity.SELF


@dataclass(frozen=True, slots=True)
class Patience:
    """When a program that dies is restarted, and when no longer."""

    first_pause: float = 0.5
    """Seconds before the first restart; doubled with each fast death."""
    longest_pause: float = 10.0
    """Seconds."""
    fast: float = 30.0
    """A death before the program was ready, or within so many seconds of its start, is a fast one."""
    fast_deaths: int = 5
    """So many fast deaths in a row end everything."""


@dataclass(slots=True)
class _Child:
    """A program and its process, if one runs."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    ready: bool = False
    fast_deaths: int = 0
    start_at: float = 0.0
    """When to start it, on the monotonic clock, while there is no process."""


@dataclass(slots=True)
class Supervisor:
    """Holds processes; use it from the main thread, and call `stop` in a `finally`."""

    logs: Path
    """Directory of one `NAME.log` a program."""
    work: Path
    """Working directory of the programs: one without anything that Python could import."""
    tell: Callable[[str], None]
    """Takes one line an event."""
    patience: Patience = field(default_factory=Patience)
    _groups: list[list[_Child]] = field(default_factory=list[list[_Child]])
    _signals: int = 0

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self._signals > 0

    def pids(self) -> dict[str, int]:
        """The programs that run, by name."""
        return {child.program.name: child.process.pid for child in self._children() if child.process}

    @contextmanager
    def signals(self) -> Generator[None]:
        """Take SIGINT, SIGTERM and SIGHUP as requests to stop; a second one makes `stop` impatient."""

        def note(_number: int, _frame: FrameType | None) -> None:
            self._signals += 1

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
            numbers.append(signal.SIGHUP)
        before = [signal.signal(number, note) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def start(self, programs: Sequence[Program]) -> bool:
        """Start programs side by side and wait until all are ready; false where a stop was asked for instead.

        Raises `StandaloneError`, with the end of its log, where one keeps dying.
        """
        group = [_Child(program) for program in programs]
        self._groups.append(group)
        while not all(child.ready for child in group):
            if self.stopping:
                return False
            self._turn()
            time.sleep(_TICK)
        return True

    def run(self, changed: Callable[[], None] = _nothing) -> None:
        """Restart what dies until a stop is asked for; `changed` is called after each change of `pids()`.

        Raises `StandaloneError` as `start` does.
        """
        known = self.pids()
        while not self.stopping:
            self._turn()
            if self.pids() != known:
                known = self.pids()
                changed()
            time.sleep(2 * _TICK)

    def stop(self) -> None:
        """Stop everything, the last started group first. Raises nothing, leaves nothing running."""
        asked = self._signals
        while self._groups:
            group = self._groups.pop()
            for child in group:
                if child.process and child.process.poll() is None:
                    child.process.send_signal(child.program.stop_signal)
            began = time.monotonic()
            for child in group:
                self._await_end(child, began + child.program.grace, asked)

    def _await_end(self, child: _Child, until: float, asked: int) -> None:
        if child.process is None:
            return
        while child.process.poll() is None:
            if time.monotonic() > until or self._signals > max(asked, 1):
                self.tell(f"{child.program.name} did not stop in time: killed")
                _kill_group(child.process.pid)
                child.process.wait()
            else:
                time.sleep(_TICK / 5)
        _kill_group(child.process.pid)
        child.process = None

    def _children(self) -> Iterator[_Child]:
        for group in self._groups:
            yield from group

    def _turn(self) -> None:
        """Look at each child once."""
        now = time.monotonic()
        for child in self._children():
            if child.process is None:
                if now >= child.start_at:
                    self._spawn(child)
            elif child.process.poll() is not None:
                self._bury(child, now)
            elif not child.ready:
                self._look(child, now)

    def _spawn(self, child: _Child) -> None:
        program = child.program
        program.prepare()
        log = self.logs / f"{program.name}.log"
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            child.process = subprocess.Popen(
                command(
                    program.argv,
                    death_signal=program.death_signal,
                    nice=program.nice,
                    identity=program.identity,
                ),
                env=program.env,
                cwd=self.work,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for the supervisor alone
            )
        child.started = time.monotonic()

    def _look(self, child: _Child, now: float) -> None:
        program = child.program
        if program.ready():
            child.ready = True
            took = f"ready ({now - child.started:.1f} s)"
            self.tell(f"{program.name} {'started' if program.ready is _alive else took}")
        elif child.process and now - child.started > program.ready_within:
            self.tell(f"{program.name} was not ready within {program.ready_within:.0f} s: killed")
            _kill_group(child.process.pid)

    def _bury(self, child: _Child, now: float) -> None:
        """A child died: plan its restart, or give up."""
        process, program = child.process, child.program
        if process is None:
            return
        _kill_group(process.pid)
        fast = not child.ready or now - child.started < self.patience.fast
        child.fast_deaths = child.fast_deaths + 1 if fast else 1
        child.process, child.ready = None, False
        log = self.logs / f"{program.name}.log"
        if child.fast_deaths >= self.patience.fast_deaths:
            raise StandaloneError(
                f"{program.name} died {child.fast_deaths} times in a row ({_ending(process.returncode)});"
                f" the end of {log}:\n{_tail(log)}"
            )
        pause = min(self.patience.first_pause * 2 ** (child.fast_deaths - 1), self.patience.longest_pause)
        child.start_at = now + pause
        self.tell(f"{program.name} died ({_ending(process.returncode)}), starts again in {pause:.1f} s; see {log}")


def _kill_group(pid: int) -> None:
    """SIGKILL to what is left of a child's session; none is left as a rule."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else Signals(-code).name


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])
