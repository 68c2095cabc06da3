"""A small installation whose stores are put back to earlier states."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from conftest import Server
from world_copies import Copy
from world_requests import deactivate

from service.domain.requests import Kind
from service.evidence.keys import load_key_set
from service.store import mirror, restores, vetting
from service.store.database import Pool, QuarantineError, make_pool, transaction
from service.store.ledger_files import LedgerFiles
from workers.restore import Report, Stores, restore
from workers.sequencer import Sequencer


@contextmanager
def owner_pool(url: str) -> Iterator[Pool]:
    pool = make_pool(url, size=4, options=restores.MODE)
    pool.open()
    try:
        yield pool
    finally:
        pool.close()


class Installation:
    """A small installation whose stores are put back to earlier states."""

    def __init__(self, world: Copy, server: Server, directory: Path) -> None:
        self.world = world
        self.server = server
        self.directory = directory
        self.keys = directory / "own-keys"
        shutil.copytree(world.context.settings.keys_dir, self.keys)
        self.high_water = directory / "high-water"
        changes = {
            "keys_dir": self.keys,
            "ledger_high_water": self.high_water,
            "lease_ttl_ms": 200,
            "lease_margin_ms": 20,
        }
        world.context = type(world.context)(
            world.context.settings.model_copy(update=changes),
            world.context.pool,
            world.context.artifacts,
            world.context.bell,
        )
        self.copies: list[str] = []

    def log(self) -> int:
        """Number, sign and write what happened; the ledger's size."""
        sequencer = Sequencer(self.world.pool, self.world.context.artifacts, self.world.context.settings)
        sequencer.sequence()
        head = sequencer.publish()
        assert head is not None
        return head.size

    def delete(self, subject: str) -> UUID:
        request_id = deactivate(self.world, subject, Kind.ERASE)
        self.world.finish(request_id)
        assert self.world.shown(request_id) == ("completed", "erased")
        return request_id

    def backup(self) -> str:
        """A copy of the database as it is."""
        name = f"backup_{uuid4().hex}"
        self.world.pool.close()
        self.server.create(name, template=self.database)
        self.reopen()
        self.copies.append(name)
        return name

    def put_back(self, backup: str) -> None:
        """The database is dropped, and the backup takes its place."""
        self.world.pool.close()
        self.server.drop(self.database)
        self.server.create(self.database, template=backup)
        self.reopen()

    @property
    def database(self) -> str:
        return psycopg.conninfo.conninfo_to_dict(self.world.owner_url)["dbname"]  # type: ignore[return-value]

    def reopen(self) -> None:
        settings = self.world.context.settings
        pool = make_pool(settings.database_url, size=8)
        pool.open()
        context = self.world.context
        self.world.context = type(context)(settings, pool, context.artifacts, context.bell)

    def restore(self, **options: Any) -> Report:
        with owner_pool(self.world.owner_url) as pool:
            keys = load_key_set(self.keys)
            stores = Stores(self.world.context.settings, pool, self.world.context.artifacts, keys)
            return restore(stores, **({"checkpoint": None, "accept_loss": False, "tell": print} | options))

    def vet(self) -> None:
        """What every start does."""
        vetting.vet(self.world.pool, LedgerFiles(self.world.context.artifacts), self.high_water)

    def require_shut(self) -> None:
        """Nothing is taken in, registered or renewed."""
        with pytest.raises(QuarantineError, match="expunge restore"):
            self.world.ask("s1")
        for statement in (
            "INSERT INTO event_pending (kind, body) VALUES ('a.b', '{}')",
            "INSERT INTO lease SELECT gen_random_uuid(), 1, 'x', 1, 1, 2000",
            "UPDATE lease SET covers = covers",
        ):
            with pytest.raises(QuarantineError), transaction(self.world.pool) as connection:
                connection.execute(statement.encode())

    def state(self) -> dict[str, list[tuple[Any, ...]]]:
        """What the ledger must be able to rebuild, by table, without what is not in it."""
        with psycopg.connect(self.world.owner_url) as connection:
            return {name: rows(connection, name) for name in mirror.TABLES if name not in INGESTED}

    def ingested(self) -> dict[str, list[tuple[Any, ...]]]:
        """What payload files must be able to rebuild, of subjects whom a record concerns."""
        with psycopg.connect(self.world.owner_url) as connection:
            return {name: connection.execute(query.encode()).fetchall() for name, query in INGESTED.items()}


INGESTED = {
    "record": "SELECT record_id, dataset_id, cell_id, owner_id, commitment, added FROM record ORDER BY 1",
    "record_subject": "SELECT record_id, subject_id FROM record_subject ORDER BY 1, 2",
    "subject": "SELECT DISTINCT subject_id FROM record_subject JOIN subject USING (subject_id) ORDER BY 1",
    "subject_alias": "SELECT type, digest, subject_id FROM subject_alias"
    " WHERE subject_id IN (SELECT subject_id FROM record_subject) ORDER BY 1, 2",
    "subject_prior": "SELECT dataset_id, subject_id, prior FROM subject_prior ORDER BY 1, 2",
}
"""Who was ingested, by table."""


def rows(connection: psycopg.Connection, table: str) -> list[tuple[Any, ...]]:
    """The mirrored columns of a table: those that its triggers name."""
    source = connection.execute("SELECT prosrc FROM pg_proc WHERE proname = %s", (f"mirror_{table}",)).fetchone()
    assert source
    columns = source[0].split("(SELECT ", 1)[1].split(" FROM", 1)[0]
    return connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2".encode()).fetchall()
