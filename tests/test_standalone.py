"""`expunge up` with real stores: it keeps data, leaves nothing running, and says what is wrong."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from serving_kit import free_port

from service.settings import Settings
from service.standalone import postgres as postgres_module
from service.standalone.errors import StandaloneError
from service.standalone.launch import Identity, command
from service.standalone.postgres import Postgres, root_identity
from service.standalone.state import State, ensure_secrets, hold
from service.standalone.stores import choose
from service.standalone.supervisor import Patience, Program, Supervisor

HELPER = Path(__file__).with_name("standalone_up.py")
needs_proc = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="finds leftovers through /proc")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited in vain: {what}"
        time.sleep(0.02)


def processes_under(root: Path) -> list[str]:
    """The processes that work in the state directory, as all those of `up` do."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink().is_relative_to(root):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@dataclass
class Up:
    root: Path
    process: subprocess.Popen[str]

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            return self.note().get("pid") == self.process.pid  # and not a killed one's

        wait_for(ready, "up.json")

    def note(self) -> dict[str, Any]:
        path = self.root / "run" / "up.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def pids(self) -> dict[str, int]:
        return self.note()["programs"]

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
        wait_for(lambda: not processes_under(self.root), f"an end of {processes_under(self.root)}", 60)
        return self.process.returncode

    def execute(self, statement: str) -> list[tuple[object, ...]]:
        url = f"postgresql:///expunge?host={self.root}/run/pg&user=expunge_owner"
        with psycopg.connect(url) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


class Launcher:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        self._started: list[subprocess.Popen[str]] = []

    def __call__(self, identity: Identity = Identity.SELF) -> Up:
        argv = [sys.executable, str(HELPER), str(self.root), str(self.port)]
        process = subprocess.Popen(
            command(argv, death_signal=signal.SIGKILL, identity=identity),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return Up(self.root, process)

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with tempfile.TemporaryDirectory(prefix="expunge-test-") as directory:  # a short path: sockets stay inside
        launcher = Launcher(Path(directory).resolve() / "state")
        yield launcher
        launcher.close()


@pytest.mark.integration
@needs_proc
def test_keeps_data_through_a_crash_of_postgres_and_leaves_nothing_after_ctrl_c(launcher: Launcher) -> None:
    up = launcher()
    up.wait_ready()
    before = up.pids()
    assert set(before) == {"postgres", "valkey", "api"}
    assert (up.root / "keys" / "first-api-key").read_text() == "the-first-key\n"
    assert {path.stat().st_mode & 0o777 for path in (up.root / "keys").iterdir()} == {0o600}
    assert up.root.stat().st_mode & 0o777 == 0o700
    up.execute("create table kept as select generate_series(1, 1000) as number")

    second = launcher()
    _, complaint = second.process.communicate(timeout=60)
    assert second.process.returncode == 1
    assert f"in use by process {up.process.pid}" in complaint

    os.kill(before["postgres"], signal.SIGKILL)
    wait_for(lambda: up.pids().get("postgres", before["postgres"]) != before["postgres"], "a new postmaster")
    wait_for(lambda: postgres_answers(up), "Postgres after its crash")
    assert up.execute("select count(*) from kept") == [(1000,)]

    assert up.end(signal.SIGINT) == 0
    assert not (up.root / "run" / "up.json").exists()


def postgres_answers(up: Up) -> bool:
    try:
        return up.execute("select 1") == [(1,)]
    except psycopg.OperationalError:
        return False


@pytest.mark.integration
@needs_proc
def test_leaves_nothing_when_killed_and_starts_again_on_the_same_data(launcher: Launcher) -> None:
    up = launcher()
    up.wait_ready()
    up.execute("create table kept as select generate_series(1, 1000) as number")
    assert len(processes_under(up.root)) >= 3
    assert up.end(signal.SIGKILL) == -signal.SIGKILL

    # As after a crash in a container: the number in the lock file is somebody else's by now.
    (up.root / "postgres" / "postmaster.pid").write_text(f"{os.getpid()}\n{up.root}/postgres\n1\n5432\n\n\n\n")
    again = launcher()
    again.wait_ready()
    assert again.execute("select count(*) from kept") == [(1000,)]
    assert again.end(signal.SIGTERM) == 0


@pytest.mark.integration
@needs_proc
def test_an_ordinary_user_can_run_it(launcher: Launcher) -> None:
    if os.geteuid() == 0 and root_identity() is not Identity.NAMESPACE:
        pytest.skip("cannot look like an ordinary user here: user namespaces are refused")
    up = launcher(Identity.NAMESPACE if os.geteuid() == 0 else Identity.SELF)
    up.wait_ready()
    if os.geteuid() == 0:
        map_of_up = Path(f"/proc/{up.process.pid}/uid_map").read_text().split()
        map_of_postgres = Path(f"/proc/{up.pids()['postgres']}/uid_map").read_text().split()
        assert map_of_up == map_of_postgres == ["65534", "0", "1"]
    assert up.end(signal.SIGTERM) == 0


@pytest.mark.integration
@needs_root
def test_root_without_user_namespaces_runs_postgres_as_nobody() -> None:
    directory = Path(tempfile.mkdtemp(prefix="expunge-test-"))
    directory.chmod(0o755)
    try:
        with hold(directory / "state") as state:
            supervisor = Supervisor(logs=state.logs, work=state.run, tell=lambda _line: None)
            server = Postgres(state.postgres, state.sockets, Identity.NOBODY, durable=False)
            try:
                server.initialize()
                assert supervisor.start([server.program()])
                server.create_database()
                pid = supervisor.pids()["postgres"]
                assert Path(f"/proc/{pid}").stat().st_uid == 65534
            finally:
                supervisor.stop()
            # The same data later under another identity, and with a way that nobody may not go.
            server = Postgres(state.postgres, state.sockets, Identity.NAMESPACE, durable=False)
            server.initialize()
            assert (state.postgres / "base").stat().st_uid == 0
            directory.chmod(0o700)
            with pytest.raises(StandaloneError, match=r"cannot enter .* --state"):
                Postgres(state.postgres, state.sockets, Identity.NOBODY).initialize()
    finally:
        shutil.rmtree(directory)


@pytest.mark.integration
def test_a_port_in_use_is_named_with_the_way_out(launcher: Launcher) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", launcher.port))
        listener.listen()
        up = launcher()
        _, complaint = up.process.communicate(timeout=60)
    assert up.process.returncode == 1
    assert f"port {launcher.port} on 127.0.0.1, which api needs" in complaint
    assert "--port" in complaint


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with hold(tmp_path / "state") as state:
        yield state


def program(name: str, code: str) -> Program:
    return Program(name=name, argv=(sys.executable, "-c", code), env={}, grace=0.5)


def test_gives_up_with_the_end_of_the_log(state: State) -> None:
    lines: list[str] = []
    patience = Patience(first_pause=0.01)
    supervisor = Supervisor(logs=state.logs, work=state.run, tell=lines.append, patience=patience)
    doomed = program("doomed", "import sys; sys.exit('no such table')")
    supervisor.start([program("fine", "import time; time.sleep(60)")])
    try:
        # A program without a check is ready once it runs, so it may be found dead in either.
        with pytest.raises(StandaloneError, match=r"(?s)doomed died 5 times.*exit code 1.*no such table"):
            supervisor.run() if supervisor.start([doomed]) else None
    finally:
        supervisor.stop()
    assert supervisor.pids() == {}
    assert sum("doomed died" in line for line in lines) == 4


def test_a_program_that_ignores_the_stop_signal_is_killed(state: State) -> None:
    lines: list[str] = []
    supervisor = Supervisor(logs=state.logs, work=state.run, tell=lines.append)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    try:
        supervisor.start([program("deaf", deaf)])
        wait_for(lambda: b"deaf" in (state.logs / "deaf.log").read_bytes(), "the program's first line")
    finally:
        supervisor.stop()
    assert lines[-1] == "deaf did not stop in time: killed"


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StandaloneError, match="no Expunge state directory"), hold(tmp_path):
        pass
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    with pytest.raises(StandaloneError, match="--state"), hold(tmp_path / "thesis.tex"):
        pass


def test_sockets_move_where_the_path_is_too_long(tmp_path: Path) -> None:
    with hold(tmp_path / ("x" * 80)) as state:
        sockets = state.sockets
        assert sockets.parent == Path(tempfile.gettempdir())
        assert sockets.stat().st_mode & 0o777 == 0o700
    with hold(tmp_path / ("x" * 80)) as state:
        assert state.sockets == sockets
    sockets.rmdir()
    sockets.symlink_to(tmp_path)
    try:
        with pytest.raises(StandaloneError, match="not ours"), hold(tmp_path / ("x" * 80)):
            pass
    finally:
        sockets.unlink()


def test_secrets_are_made_once_and_never_replaced(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    ensure_secrets(keys, may_create=True)
    first = {path.name: path.read_bytes() for path in keys.iterdir()}
    assert set(first) == {"signing.pem", "signing.pub", "pepper", "partition"}
    assert len(bytes.fromhex(first["pepper"].decode())) == 32
    ensure_secrets(keys, may_create=False)
    assert {path.name: path.read_bytes() for path in keys.iterdir()} == first
    (keys / "pepper").unlink()
    with pytest.raises(StandaloneError, match=r"pepper missing .* restore"):
        ensure_secrets(keys, may_create=False)


def test_half_of_the_database_urls_is_refused(state: State) -> None:
    with pytest.raises(StandaloneError, match="EXPUNGE_DATABASE_OWNER_URL is not"):
        choose(state, Settings(database_url="postgresql://somewhere"))
    given = Settings(database_url="postgresql://a", database_owner_url="postgresql://b", redis_url="redis://c")
    assert choose(state, given).programs() == []


def test_data_of_another_postgres_is_refused(state: State) -> None:
    (state.postgres / "PG_VERSION").write_text("17\n")
    with pytest.raises(StandaloneError, match="made by Postgres 17"):
        Postgres(state.postgres, state.sockets, Identity.SELF).initialize()


def test_an_unreadable_process_table_leaves_the_lock_to_postgres(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_module, "_users_of", lambda _data: None)
    lock = state.postgres / "postmaster.pid"
    lock.touch()
    Postgres(state.postgres, state.sockets, Identity.SELF).program().prepare()
    assert lock.exists()
