"""Private directories for files that must not outlive their use, whatever kills the process."""

import fcntl
import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

PREFIX = "expunge-external-"
WATCHED = "watched"
"""File with a child's process id and start time, so that it can be ended after its parent was killed."""


class Scratch:
    """A directory (0700) under the system's temporary one, removed at the end.

    Its owner holds a lock on it; the kernel lets go of that when the owner dies, and `reap` removes what is left.
    """

    def __init__(self) -> None:
        """Make and lock it."""
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            try:
                self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # a sweep came before the lock
                continue
            if _locked(self._lock) and self.path.exists():
                return
            os.close(self._lock)  # the sweep has removed the directory, or will

    def watch(self, pid: int) -> None:
        """Note a child that works on the files, in a process group of its own."""
        (self.path / WATCHED).write_text(f"{pid} {_started(pid)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def reap() -> int:
    """Remove directories whose owners died, and end what still works in them; returns how many there were."""
    count = 0
    for path in Path(tempfile.gettempdir()).glob(PREFIX + "*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY)
        except OSError:  # just removed, or another user's
            continue
        try:
            if os.fstat(lock).st_uid == os.getuid() and _locked(lock):
                _end_watched(path)
                shutil.rmtree(path, ignore_errors=True)
                count += 1
        finally:
            os.close(lock)
    return count


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_watched(path: Path) -> None:
    """End the orphan's group, if the process with that id is still the one that was started."""
    with suppress(OSError, ValueError):
        pid, started = (path / WATCHED).read_text().split(" ", 1)
        if started and _started(int(pid)) == started:
            os.killpg(int(pid), signal.SIGKILL)


def _started(pid: int) -> str:
    """When a process began, in clock ticks since boot, as text; empty where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # the program's name may hold anything
