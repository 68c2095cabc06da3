"""A real haproxy for the tests of scale-out: the one on the path, else Debian's, unpacked into .cache without root.

`python tools/balancer.py` prints where it is. Packages come by apt from the archives that this machine is set up for,
which checks their signatures; lists are fetched into .cache too where the machine has none.
"""
# ruff: noqa: T201, INP001, S607 - it prints what it finds, is a script, and takes apt's tools from the path

import os
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "haproxy"
PACKAGES = ("haproxy", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1", "libpcre2-8-0", "libsystemd0")
"""haproxy and what of it a slim image may lack."""
NEEDED = ("apt-get", "dpkg-deb")


class NoBalancerError(Exception):
    """There is none, and none can be had here; the message says why."""


def find() -> tuple[str, dict[str, str]]:
    """The program, and the variables that it needs.

    Raises:
        NoBalancerError: this is no Debian, its archives cannot be reached, or the program does not run.
    """
    if (found := shutil.which("haproxy")) is not None:
        return found, {}
    root = CACHE / "root"
    if not root.exists():
        _unpack(root)
    program = root / "usr" / "sbin" / "haproxy"
    variables = {"LD_LIBRARY_PATH": ":".join(sorted({str(path.parent) for path in root.rglob("*.so*")}))}
    tried = subprocess.run([str(program), "-v"], env={**os.environ, **variables}, capture_output=True, check=False)
    if tried.returncode:
        raise NoBalancerError(f"{program} does not run here: {tried.stderr.decode(errors='replace').strip()}")
    return str(program), variables


def _unpack(root: Path) -> None:
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        raise NoBalancerError(f"{', '.join(missing)} is not here: install haproxy yourself")
    draft = CACHE / f"draft-{os.getpid()}"  # several test processes may do this at a time; the last rename counts
    for name in ("lists/partial", "archives/partial"):
        (draft / name).mkdir(parents=True, exist_ok=True)
    lists = [f"-oDir::State::lists={draft / 'lists'}", f"-oDir::Cache={draft}", "-oAPT::Sandbox::User="]
    try:
        if not _run("apt-get", "-q", "download", *PACKAGES, cwd=draft):
            _run("apt-get", "-q", *lists, "update", cwd=draft)
            if not _run("apt-get", "-q", *lists, "download", *PACKAGES, cwd=draft):
                raise NoBalancerError("apt-get download haproxy failed: are Debian's archives reachable?")
        for package in draft.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(draft / "root")], check=True)
        if not root.exists():
            (draft / "root").rename(root)
    except OSError:
        if not root.exists():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _run(*command: str, cwd: Path) -> bool:
    return subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL, check=False, timeout=120).returncode == 0


if __name__ == "__main__":
    try:
        program, variables = find()
    except NoBalancerError as why:
        sys.exit(str(why))
    print(*(f"{name}={value}" for name, value in variables.items()), program)
