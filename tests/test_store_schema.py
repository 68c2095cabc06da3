"""The schema and the SQL agree with the code, the programs may do no more than they must, and hold no personal data."""

import importlib
import inspect
import pkgutil
import re
import uuid
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import psycopg
import pytest
from conftest import Server

import service.store
from service.domain.replays import ReplayOutcome
from service.domain.requests import Kind, Outcome, Regime, State
from service.store.api_keys import Scope

pytestmark = pytest.mark.integration

FRAGMENTS = {
    "datasets.COLUMNS": "a list of columns",
    "models.COLUMNS": "a list of columns",
    "gates.COLUMNS": "a list of columns",
    "admissions.IN_ASSEMBLY": "a condition",
    "stages.HOLDS": "a condition",
    "stages.TAINTED_CELL": "a condition",
    "work.BACKOFF": "a condition",
    "erasure.UNHINDERED": "a condition",
    "lifts.STANDING": "a condition",
    "served.SERVED": "a recursive query",
    "manifests.RECORDS": "tables and a condition",
    "manifests.HELD": "a condition",
    "compliance.REQUESTS": "a common table expression",
}
NOT_EXPLAINED = {  # Postgres explains only queries and changes of rows
    "records.COPY": "COPY",
    "records.COPY_SUBJECTS": "COPY",
    "ledger.COPY_LEAVES": "COPY",
    "ledger.COPY_OPENINGS": "COPY",
    "leases.LISTEN_MODEL": "LISTEN",
    "notices.LISTEN": "LISTEN",
    "api_keys.LOCK_TABLE": "LOCK",
    "migrate.GRANT_REVISION": "GRANT",
    "snapshots.BEGIN": "SET",
}
PARAMETER = re.compile(r"%\((\w+)\)[sb]")


def constants() -> Iterator[tuple[str, str]]:
    """Every SQL constant of the stores: in a module with SQL, an upper-case text of several words."""
    for found in pkgutil.iter_modules(service.store.__path__):
        module = importlib.import_module(f"service.store.{found.name}")
        hints = inspect.get_annotations(module)
        for name, value in vars(module).items():
            if name.isupper() and isinstance(value, str) and "LiteralString" in str(hints.get(name, "")):
                yield f"{found.name}.{name}", value


SQL = dict(constants())
WHOLE = sorted(SQL.keys() - FRAGMENTS.keys() - NOT_EXPLAINED.keys())


@pytest.fixture(scope="module")
def app(postgres: Server, migrated_template: str) -> Iterator[psycopg.Connection]:
    """The programs' role on an empty, migrated database; nothing is ever committed."""
    name = f"schema_{uuid.uuid4().hex}"
    postgres.create(name, template=migrated_template)
    with psycopg.connect(postgres.url("expunge_app", name)) as connection:
        yield connection
    postgres.drop(name)


@pytest.fixture(autouse=True)
def _undo(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "app" in request.fixturenames:
        request.getfixturevalue("app").rollback()


def test_all_sql_of_the_stores_is_found() -> None:
    assert len(WHOLE) > 120
    assert FRAGMENTS.keys() | NOT_EXPLAINED.keys() <= SQL.keys()
    literal = re.compile(r"^([A-Z_]+): LiteralString =", re.MULTILINE)
    written = {
        f"{path.stem}.{name}"
        for path in Path(service.store.__path__[0]).glob("*.py")
        for name in literal.findall(path.read_text())
    }
    assert written == SQL.keys()


@pytest.mark.parametrize("name", WHOLE)
def test_postgres_plans_every_statement_for_the_programs_role(app: psycopg.Connection, name: str) -> None:
    """Names, types and rights are checked; nothing is executed. Every parameter has a cast: NULL has no type."""
    statement = SQL[name]
    uncast = [match[1] for match in PARAMETER.finditer(statement) if statement[match.end() : match.end() + 2] != "::"]
    assert uncast == []
    values = dict.fromkeys(PARAMETER.findall(statement))
    plan = app.execute(f"EXPLAIN {statement}".encode(), values or None).fetchall()
    assert plan


@pytest.mark.parametrize("name", sorted(NOT_EXPLAINED))
def test_what_is_not_explained_begins_with_its_verb(app: psycopg.Connection, name: str) -> None:
    statement = SQL[name]
    assert statement.lstrip().upper().startswith(NOT_EXPLAINED[name])
    if NOT_EXPLAINED[name] == "COPY":
        form = r"COPY (\w+) \((.*?)\) FROM STDIN(?: \(FORMAT BINARY\))?"
        table, columns = re.fullmatch(form, statement).groups()  # type: ignore[union-attr]
        app.execute(f"SELECT {columns} FROM {table}".encode())
    elif NOT_EXPLAINED[name] in {"LISTEN", "LOCK"}:
        app.execute(statement.encode())


@pytest.mark.parametrize(
    ("name", "enum"),
    [
        ("deletion_kind", Kind),
        ("deletion_state", State),
        ("deletion_outcome", Outcome),
        ("replay_outcome", ReplayOutcome),
    ],
)
def test_enums_are_the_codes(app: psycopg.Connection, name: str, enum: type[StrEnum]) -> None:
    labels = "SELECT enumlabel FROM pg_enum WHERE enumtypid = %s::regtype ORDER BY enumsortorder"
    assert [label for (label,) in app.execute(labels, [name])] == [each.value for each in enum]


@pytest.mark.parametrize("name", ["job_state", "artifact_kind", "artifact_state", "version_cause"])
def test_no_label_of_other_enums_is_unused(app: psycopg.Connection, repository: Path, name: str) -> None:
    """No Python enum stands for them: EXPLAIN refuses unknown labels in SQL, this finds labels that nothing uses."""
    labels = {label for (label,) in app.execute("SELECT unnest(enum_range(NULL::%s))::text" % name)}  # noqa: UP031
    code = [path.read_text() for folder in ("service", "workers") for path in (repository / folder).rglob("*.py")]
    unused = {label for label in labels if not any(f"'{label}'" in text or f'"{label}"' in text for text in code)}
    assert unused <= {"rollback"}  # operators publish an older assembly by hand


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [("api_key", "scopes", set(Scope)), ("deletion_request", "regime", set(Regime))],
)
def test_checks_are_the_codes(app: psycopg.Connection, table: str, column: str, values: set[str]) -> None:
    checks = app.execute(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'c' AND conrelid = %s::regclass", [table]
    )
    (check,) = [text for (text,) in checks if re.search(rf"\b{column}\b", text)]
    assert set(re.findall(r"'([^']+)'::text", check)) == {str(value) for value in values}


def test_migrations_are_numbered_without_gaps(repository: Path) -> None:
    files = sorted(path for path in (repository / "migrations" / "versions").glob("*.py") if path.stem != "__init__")
    assert all(re.fullmatch(r"\d{4}_[a-z0-9_]+\.py", path.name) for path in files)
    assert [int(path.name[:4]) for path in files] == list(range(1, len(files) + 1))
    for path, before in zip(files, [None, *files], strict=False):
        text = path.read_text()
        assert re.search(rf'^revision = "{path.name[:4]}"$', text, re.MULTILINE), path
        down = f'"{before.name[:4]}"' if before else "None"
        assert re.search(rf"^down_revision = {down}$", text, re.MULTILINE), path


APPEND_ONLY = ("event_pending", "certificate", "assembly", "model_version", "cell_manifest", "absence", "ledger_leaf",
               "ledger_node", "ledger_opening", "tree_head", "certificate_supplement")  # fmt: skip
KEPT = ("tombstone", "deletion_request", "request_target", "do_not_train", "lease", "artifact")


def refused(app: psycopg.Connection, statement: str) -> bool:
    try:
        with app.transaction(force_rollback=True):
            app.execute(statement.encode())
    except psycopg.errors.InsufficientPrivilege:
        return True
    return False


def test_the_programs_role_may_not_rewrite_history(app: psycopg.Connection) -> None:
    tables = [name for (name,) in app.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    may_delete = {name for name in tables if not refused(app, f"DELETE FROM {name}")}
    assert may_delete.isdisjoint({*APPEND_ONLY, *KEPT, "alembic_version"})
    column = "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass ORDER BY attnum DESC LIMIT 1"
    for name in (*APPEND_ONLY, "alembic_version"):
        (last,) = app.execute(column, [name]).fetchone() or ("",)
        assert refused(app, f"UPDATE {name} SET {last} = {last}"), name
    for name in tables:
        assert refused(app, f"TRUNCATE {name}"), name
        assert refused(app, f"DROP TABLE {name}"), name
        assert refused(app, f"ALTER TABLE {name} ADD COLUMN x int"), name
        assert refused(
            app, f"CREATE TRIGGER x BEFORE INSERT ON {name} EXECUTE FUNCTION suppress_redundant_updates_trigger()"
        )
    assert refused(app, "CREATE TABLE x (y int)")
    assert refused(app, "ALTER TYPE deletion_state ADD VALUE 'x'")
    assert refused(app, "COPY (SELECT 1) TO PROGRAM 'true'")
