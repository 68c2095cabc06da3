"""The stores of a state directory for commands that need no other program: started where `expunge up` does not run."""

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.settings import Settings
from service.standalone import state as states
from service.standalone.errors import StandaloneError
from service.standalone.state import State
from service.standalone.stores import Stores, choose
from service.standalone.supervisor import Supervisor
from service.store import migrate


@dataclass(frozen=True, slots=True)
class Offline:
    """Where everything lies, and the settings that say so to what runs in this process."""

    stores: Stores
    settings: Settings


@contextmanager
def opened(directory: Path) -> Generator[Offline]:
    """The stores of `expunge up` in that directory, or those that the environment names; Postgres answers.

    Raises:
        StandaloneError: the directory is another program's, or Postgres does not start.
        SchemaError: the schema cannot be brought up to date.
    """
    if _runs(directory):
        yield _offline(State.found(directory))
        return
    with states.hold(directory) as state:
        found = _offline(state)
        supervisor = Supervisor(logs=state.logs, work=state.run, tell=_tell)
        with supervisor.signals():
            try:
                _start(found.stores, supervisor)
                yield found
            finally:
                supervisor.stop()


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _offline(state: State) -> Offline:
    settings = Settings()
    stores = choose(state, settings)
    keys = settings.keys_dir.resolve() if "keys_dir" in settings.model_fields_set else state.keys
    return Offline(
        stores,
        settings.model_copy(
            update={
                "database_url": stores.app_url,
                "database_owner_url": stores.owner_url,
                "artifact_url": stores.artifact_url,
                "file_keys_url": stores.file_keys_url,
                "keys_dir": keys,
            }
        ),
    )


def _start(stores: Stores, supervisor: Supervisor) -> None:
    if stores.postgres is not None:
        stores.postgres.initialize()
        if not supervisor.start([stores.postgres.program()]):
            raise StandaloneError("stopped before Postgres was ready: try again")
        stores.postgres.create_database()
    migrate.upgrade(stores.owner_url)


def _runs(directory: Path) -> bool:
    """Whether `expunge up` runs there."""
    try:
        pid = json.loads((directory / "run" / "up.json").read_text())["pid"]
        return Path(f"/proc/{int(pid)}").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False
