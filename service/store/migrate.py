"""Brings the schema to the newest revision, and tells whether it is there.

`python -m service.store.migrate` does it for EXPUNGE_DATABASE_OWNER_URL.
"""

import sys
from pathlib import Path
from typing import LiteralString

import psycopg

from service.settings import Settings

_MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"

GET_REVISION: LiteralString = "select version_num from alembic_version"
GRANT_REVISION: LiteralString = "grant select on alembic_version to public"


class SchemaError(Exception):
    """The schema cannot be used with this code, or could not be brought up to date."""


def upgrade(owner_url: str, *, migrations: Path = _MIGRATIONS) -> None:
    """Apply the revisions that are missing, each in a transaction of its own; safe to call side by side.

    Afterwards every role may read which revision is there, for `check`. Raises `SchemaError`: nothing of the
    revision that failed is left, the ones before it stay.
    """
    # Alembic and SQLAlchemy serve this function alone; programs that only `check` do not load them.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415
    from sqlalchemy import NullPool, create_engine  # noqa: PLC0415
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    # `creator`, since SQLAlchemy's own URLs are not libpq's.
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(owner_url), poolclass=NullPool)
    try:
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        with psycopg.connect(owner_url) as plain:
            plain.execute(GRANT_REVISION)
    except (SQLAlchemyError, psycopg.Error, CommandError) as error:
        raise SchemaError(f"the migration failed, nothing of the failed revision is left: {error}") from error


def check(url: str, *, migrations: Path = _MIGRATIONS) -> None:
    """Raise `SchemaError` where the schema is behind this code.

    A newer schema is fine: old code must run on it.
    """
    wanted = newest(migrations)
    try:
        with psycopg.connect(url) as connection:
            row = connection.execute(GET_REVISION).fetchone()
    except psycopg.errors.UndefinedTable:
        row = None
    except psycopg.Error as error:
        raise SchemaError(f"cannot read the schema's revision: {error}") from error
    found = "" if row is None else str(row[0])
    if found < wanted:
        raise SchemaError(
            f"the schema is at revision {found or 'none'}, this code needs {wanted}:"
            " set EXPUNGE_DATABASE_OWNER_URL, run `python -m service.store.migrate`, start the program again"
        )


def newest(migrations: Path = _MIGRATIONS) -> str:
    """The newest revision's number, with which its file name begins; empty where there is none."""
    return max((path.name[:4] for path in (migrations / "versions").glob("[0-9][0-9][0-9][0-9]_*.py")), default="")


def main() -> int:
    """Upgrade the database that the settings name; the exit code."""
    owner_url = Settings().database_owner_url
    if not owner_url:
        sys.stderr.write("set EXPUNGE_DATABASE_OWNER_URL to the URL of the role that owns the schema\n")
        return 2
    try:
        upgrade(owner_url)
    except SchemaError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
