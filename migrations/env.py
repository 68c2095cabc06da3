"""Run by Alembic for `service.store.migrate.upgrade`, which hands over an open connection."""

from alembic import context
from sqlalchemy import Connection, text

_ADVISORY_LOCK = 0x45585055  # "EXPU": one migrator at a time


def run(connection: Connection) -> None:
    """Apply what is missing. A revision waits for locks briefly, and runs for minutes at most."""
    # Waiting for another migrator may take as long as that one's revisions.
    connection.execute(text("set statement_timeout = '15min'"))
    connection.execute(text("select pg_advisory_lock(:key)"), {"key": _ADVISORY_LOCK})
    connection.execute(text("set lock_timeout = '5s'"))
    connection.execute(text("set statement_timeout = '10min'"))
    connection.commit()
    try:
        context.configure(connection=connection, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
    finally:
        connection.rollback()
        connection.execute(text("select pg_advisory_unlock(:key)"), {"key": _ADVISORY_LOCK})
        connection.commit()


run(context.config.attributes["connection"])
