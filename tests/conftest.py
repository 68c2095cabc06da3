"""Real stores for tests: one Postgres and one Valkey a session (each pytest-xdist worker starts its own).

A test that takes `database` gets a migrated database of its own, copied from a template.
EXPUNGE_TEST_DATABASE_OWNER_URL names a superuser of another Postgres to use instead; `expunge_app` must then
be able to log in as that one does.
"""

import os
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql
from psycopg.conninfo import make_conninfo

from service.standalone.postgres import APP, OWNER, Postgres, root_identity
from service.standalone.state import State, hold
from service.standalone.supervisor import Program, Supervisor
from service.standalone.valkey import Valkey
from service.store import migrate

# A busy machine fails no example; what Hypothesis sets by itself in CI stays.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
if "CI" not in os.environ:
    settings.load_profile("here")


@dataclass(frozen=True, slots=True)
class Server:
    """A Postgres server: `url(role or "" for the superuser, database)`."""

    url: Callable[[str, str], str]

    def create(self, name: str, *, template: str = "template1") -> None:
        # Copying files beats writing everything through the WAL for the small databases of tests.
        statement = sql.SQL("create database {} template {} strategy file_copy")
        self._execute(statement.format(sql.Identifier(name), sql.Identifier(template)))

    def drop(self, name: str) -> None:
        self._execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.url("", "postgres"), autocommit=True) as connection:
            connection.execute(statement)


@dataclass(frozen=True, slots=True)
class Database:
    """One test's database."""

    owner_url: str
    app_url: str


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    """A developer's EXPUNGE_* variables would point tests at real data."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("EXPUNGE_") and not name.startswith("EXPUNGE_TEST_"):
                patch.delenv(name)
        yield


@contextmanager
def running(state: State, program: Program) -> Generator[None]:
    supervisor = Supervisor(logs=state.logs, work=state.run, tell=lambda _line: None)
    try:
        supervisor.start([program])
        yield
    finally:
        supervisor.stop()


@pytest.fixture(scope="session")
def store_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    with hold(tmp_path_factory.mktemp("stores")) as state:
        yield state


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> Iterator[Server]:
    outside = os.environ.get("EXPUNGE_TEST_DATABASE_OWNER_URL")
    if outside:
        yield Server(lambda user, name: make_conninfo(outside, dbname=name, **({"user": user} if user else {})))
        return
    state: State = request.getfixturevalue("store_state")
    server = Postgres(state.postgres, state.sockets, root_identity(), durable=False)
    server.initialize()
    with running(state, server.program()):
        yield Server(lambda user, name: server.url(user or OWNER, name))


@pytest.fixture(scope="session")
def valkey(store_state: State) -> Iterator[str]:
    """The URL of an empty Valkey; what a test leaves in it stays for the next."""
    server = Valkey(store_state.valkey, store_state.sockets)
    with running(store_state, server.program()):
        yield server.url


@pytest.fixture(scope="session")
def migrated_template(postgres: Server) -> Iterator[str]:
    name = f"template_{uuid.uuid4().hex}"
    postgres.create(name)
    try:
        migrate.upgrade(postgres.url("", name))
        yield name
    finally:
        postgres.drop(name)


@pytest.fixture
def database(postgres: Server, migrated_template: str) -> Iterator[Database]:
    """A fresh, migrated database."""
    name = f"test_{uuid.uuid4().hex}"
    postgres.create(name, template=migrated_template)
    try:
        yield Database(owner_url=postgres.url("", name), app_url=postgres.url(APP, name))
    finally:
        postgres.drop(name)


@pytest.fixture
def empty_database(postgres: Server) -> Iterator[str]:
    """The owner's URL of a database without a schema."""
    name = f"test_{uuid.uuid4().hex}"
    postgres.create(name)
    try:
        yield postgres.url("", name)
    finally:
        postgres.drop(name)


@pytest.fixture
def repository() -> Path:
    return Path(__file__).resolve().parents[1]
