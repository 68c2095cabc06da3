"""Migrations are applied once, one transaction each, and a schema that is behind is noticed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from conftest import Database

from service.store import migrate

pytestmark = pytest.mark.integration


def write(migrations: Path, number: int, statement: str) -> None:
    before = f"{number - 1:04}" if number > 1 else None
    (migrations / "versions" / f"{number:04}_step.py").write_text(
        f"from alembic import op\nrevision = '{number:04}'\ndown_revision = {before!r}\n"
        f"def upgrade() -> None:\n    op.execute({statement!r})\n"
    )


@pytest.fixture
def migrations(tmp_path: Path, repository: Path) -> Path:
    copy = tmp_path / "migrations"
    (copy / "versions").mkdir(parents=True)
    shutil.copy(repository / "migrations" / "env.py", copy)
    write(copy, 1, "create table one (id int)")
    return copy


def test_migrators_side_by_side_apply_each_revision_once(empty_database: str, repository: Path) -> None:
    argv = [sys.executable, "-m", "service.store.migrate"]
    env = {**os.environ, "EXPUNGE_DATABASE_OWNER_URL": empty_database}
    both = [subprocess.Popen(argv, env=env, cwd=repository, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in both] == [(b"", 0)] * 2
    migrate.check(empty_database)


def test_the_command_needs_the_owners_url(capsys: pytest.CaptureFixture[str]) -> None:
    assert migrate.main() == 2
    assert "EXPUNGE_DATABASE_OWNER_URL" in capsys.readouterr().err


def test_a_failed_revision_leaves_nothing_of_itself_and_keeps_the_ones_before(
    empty_database: str, migrations: Path
) -> None:
    write(migrations, 2, "create table two (id int); select 1 / 0")
    with pytest.raises(migrate.SchemaError, match="division by zero"):
        migrate.upgrade(empty_database, migrations=migrations)
    with psycopg.connect(empty_database) as connection:
        tables = connection.execute("select to_regclass('one')::text, to_regclass('two')::text").fetchone()
    assert tables == ("one", None)
    with pytest.raises(migrate.SchemaError, match=r"at revision 0001, this code needs 0002.*service\.store\.migrate"):
        migrate.check(empty_database, migrations=migrations)


def test_old_code_runs_on_a_newer_schema(empty_database: str, migrations: Path) -> None:
    write(migrations, 2, "create table two (id int)")
    migrate.upgrade(empty_database, migrations=migrations)
    (migrations / "versions" / "0002_step.py").unlink()
    migrate.check(empty_database, migrations=migrations)
    with pytest.raises(migrate.SchemaError):
        migrate.upgrade(empty_database, migrations=migrations)


def test_an_empty_database_is_behind(empty_database: str) -> None:
    with pytest.raises(migrate.SchemaError, match="at revision none"):
        migrate.check(empty_database)


def test_the_programs_role_may_check(database: Database) -> None:
    migrate.check(database.app_url)


def test_revisions_are_numbered_without_gaps(repository: Path) -> None:
    names = sorted(path.stem for path in (repository / "migrations" / "versions").glob("[0-9]*.py"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    assert migrate.newest() == f"{len(names):04}"
