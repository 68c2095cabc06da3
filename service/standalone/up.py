"""`expunge up`: everything on one machine, in one directory, as one foreground command."""

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from service.domain.errors import ExpungeError
from service.evidence.tree_head import TreeHeadError
from service.settings import Settings
from service.standalone import state as states
from service.standalone.errors import StandaloneError
from service.standalone.programs import HOST, Shape, expunge_programs
from service.standalone.state import State
from service.standalone.stores import Stores, choose
from service.standalone.supervisor import Program, Supervisor
from service.store import migrate, vetting
from service.store.artifacts import open_artifacts
from service.store.database import QuarantineError, make_pool
from service.store.ledger_files import LedgerFiles

Programs = Callable[[Shape, Mapping[str, str]], Sequence[Sequence[Program]]]
FirstKey = Callable[[str], str | None]


def up(state: Path, *, port: int = 8700, replicas: int = 2, trainers: int = 2) -> int:
    """Run until Ctrl-C or SIGTERM; the exit code, 0 after a stop that was asked for.

    Call it from the main thread. What goes wrong is said on stderr with what to do next, and is exit code 1.
    """
    # Here and not above: tests of the supervisor need no API keys.
    from service.store.api_keys import bootstrap  # noqa: PLC0415

    try:
        shape = Shape(port, replicas, trainers)
    except ValueError as error:
        _complain(str(error))
        return 2
    return serve(state, shape, programs=expunge_programs, first_key=bootstrap)


def serve(directory: Path, shape: Shape, *, programs: Programs, first_key: FirstKey) -> int:
    """As `up`, with the programs given. `first_key` takes the owner's URL and makes an API key once."""
    try:
        with states.hold(directory) as state:
            _check_ports(shape.ports)
            supervisor = Supervisor(logs=state.logs, work=state.run, tell=_say)
            with supervisor.signals():
                try:
                    _run(state, shape, supervisor, programs, first_key)
                finally:
                    (state.run / "up.json").unlink(missing_ok=True)
                    _say("stopping")
                    supervisor.stop()
        _say("stopped")
    except (StandaloneError, ExpungeError, OSError) as error:
        _complain(str(error))
        return 1
    return 0


def _run(state: State, shape: Shape, supervisor: Supervisor, programs: Programs, first_key: FirstKey) -> None:
    settings = Settings()
    stores = choose(state, settings)
    keys = settings.keys_dir.resolve() if "keys_dir" in settings.model_fields_set else state.keys
    has_data = stores.postgres is not None and (state.postgres / "PG_VERSION").exists()
    states.ensure_secrets(keys, may_create=not has_data)
    if not _start_stores(stores, supervisor):
        return
    _migrate(stores.owner_url)
    shut = compare(stores, settings.ledger_high_water or keys / "tree-head")
    if shut:
        _say(f"QUARANTINE: {shut}")
        _say(f"Nothing is taken in or served before `expunge restore --state {state.root}` has run.")
    key = None if shut else first_key(stores.owner_url)
    if key is not None:
        states.write_private(state.keys / "first-api-key", f"{key}\n".encode())
    for group in programs(shape, _environment(stores, keys, shape)):
        if not supervisor.start(group):
            return
    _note(state, shape, supervisor)
    _summarize(state, shape, key)
    supervisor.run(changed=lambda: _note(state, shape, supervisor))


def _start_stores(stores: Stores, supervisor: Supervisor) -> bool:
    """Start the embedded stores; false where a stop was asked for."""
    if stores.postgres is not None:
        stores.postgres.initialize()
    if not supervisor.start(stores.programs()):
        return False
    if stores.postgres is not None:
        stores.postgres.create_database()
    return not supervisor.stopping


def compare(stores: Stores, high_water: Path) -> str | None:
    """What is wrong with stores that are not of one moment, which shuts them; None where they are."""
    artifacts = open_artifacts(stores.artifact_url, stores.file_keys_url)
    with make_pool(stores.app_url, size=1) as pool:
        try:
            vetting.vet(pool, LedgerFiles(artifacts), high_water)
        except (QuarantineError, TreeHeadError) as error:
            return str(error)
    return None


def _migrate(owner_url: str) -> None:
    try:
        migrate.upgrade(owner_url)
    except migrate.SchemaError as error:
        raise StandaloneError(str(error)) from error
    _say("schema up to date")


def _environment(stores: Stores, keys: Path, shape: Shape) -> Mapping[str, str]:
    """What the programs are started with: ours, without the owner's URL, which only migrations need."""
    inherited = {name: value for name, value in os.environ.items() if name != "EXPUNGE_DATABASE_OWNER_URL"}
    return {
        "HF_HUB_OFFLINE": "1",
        "EXPUNGE_DRAIN_MS": "0",  # no balancer is in front, unless the user says so
        **inherited,
        "EXPUNGE_DATABASE_URL": stores.app_url,
        "EXPUNGE_DATABASE_LISTEN_URL": stores.listen_url,
        "EXPUNGE_REDIS_URL": stores.redis_url,
        "EXPUNGE_ARTIFACT_URL": stores.artifact_url,
        "EXPUNGE_FILE_KEYS_URL": stores.file_keys_url,
        "EXPUNGE_KEYS_DIR": str(keys),
        "EXPUNGE_API_URL": shape.api_url,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _check_ports(ports: Mapping[str, int]) -> None:
    for name, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the programs do: TIME_WAIT is no use
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise StandaloneError(
                    f"port {port} on {HOST}, which {name} needs, cannot be used ({error.strerror}): stop what"
                    f" uses it, or choose the first of {len(ports)} free ports in a row with --port"
                ) from error


def _note(state: State, shape: Shape, supervisor: Supervisor) -> None:
    """Write `run/up.json`, by which other commands find this one."""
    document = {
        "pid": os.getpid(),
        "api_url": shape.api_url,
        "servers": [f"http://{HOST}:{port}" for port in shape.servers.values()],
        "programs": supervisor.pids(),
    }
    states.write_private(state.run / "up.json", json.dumps(document, indent=1).encode())


def _summarize(state: State, shape: Shape, key: str | None) -> None:
    servers = " ".join(f"http://{HOST}:{port}" for port in shape.servers.values())
    lines = [f"API            {shape.api_url}", f"model servers  {servers}", f"state          {state.root}"]
    if key is not None:
        lines.append(f"first API key  {key}   (shown once; kept in {state.keys / 'first-api-key'})")
    else:
        lines.append(f"API key        {state.keys / 'first-api-key'}")
    for line in (*lines, "Ctrl-C stops."):
        _say(line)


def _say(line: str) -> None:
    with suppress(OSError):  # a closed terminal is no reason to leave programs behind
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def _complain(line: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"expunge up: {line}\n")
