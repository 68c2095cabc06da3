"""Becomes another program, after arranging that it cannot outlive its parent.

Every child of the supervisor starts as `python launch.py ... program arguments`. A program of its own rather
than `preexec_fn`, since that is unsafe (and warned about) where the parent has threads. Run as a file and
isolated, so it may import only the standard library.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from signal import Signals

NOBODY = 65534
"""The user and group `nobody`; Postgres refuses to run as a user that /etc/passwd does not know."""
_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1


class Identity(StrEnum):
    """As whom a program runs. Postgres refuses to run as root."""

    SELF = "self"
    """The caller."""
    NAMESPACE = "namespace"
    """Root that looks like `nobody` from inside a user namespace: files stay root's, no `chown` is needed."""
    NOBODY = "nobody"
    """The real `nobody`: for root where user namespaces are refused, as under Docker's default profile."""


def command(
    argv: Sequence[str], *, death_signal: Signals, nice: int = 0, identity: Identity = Identity.SELF
) -> list[str]:
    """The command line that runs `argv`; start it from the parent's main thread, with a file for its output.

    `death_signal` reaches the program when the thread that started it ends, however it ends (Linux only).
    """
    options = [str(os.getpid()), str(int(death_signal)), str(nice), identity.value]
    return [sys.executable, "-I", "-S", str(Path(__file__)), *options, *argv]


def _libc_call(name: str, *arguments: int) -> None:
    """Call libc; `OSError` where it refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


def _take(identity: Identity) -> None:
    if identity is Identity.NAMESPACE:
        _libc_call("unshare", _CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} 0 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} 0 1")
    elif identity is Identity.NOBODY:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def main(arguments: Sequence[str]) -> None:
    """Do as `command` promised; returns only by becoming the program. `OSError` where the system refuses."""
    parent, death_signal, nice, identity, *argv = arguments
    os.nice(int(nice))
    _take(Identity(identity))
    if sys.platform == "linux":
        # After `_take`: the kernel forgets the death signal whenever credentials change.
        _libc_call("prctl", _PR_SET_PDEATHSIG, int(death_signal))
    if os.getppid() != int(parent):
        sys.exit("launch: the parent was gone before the child was ready to follow it")
    os.execv(argv[0], argv)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main(sys.argv[1:])
