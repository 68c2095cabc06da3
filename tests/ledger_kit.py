"""A ledger for tests: a real database, files, keys; events are written as the programs write them."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from conftest import Database
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from key_store import file_keys, open_local

from service.evidence.events import EventKind
from service.evidence.keys import load_signing_key, public_pem
from service.evidence.ledger_check import Report, check
from service.settings import Settings
from service.store import events
from service.store.artifacts import Artifacts
from service.store.database import Connection, Pool, make_pool, transaction
from workers.sequencer import Sequencer


def write_signing_key(keys: Path) -> None:
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = keys / "signing.pem"
    path.touch(mode=0o600)
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (keys / "signing.pub").write_bytes(public_pem(load_signing_key(path)))


@dataclass
class Ledger:
    """One installation's ledger."""

    database: Database
    directory: Path
    settings: Settings
    pool: Pool
    artifacts: Artifacts
    sequencer: Sequencer = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self, **changes: Any) -> None:
        """A new process: nothing is remembered."""
        settings = self.settings.model_copy(update=changes)
        self.sequencer = Sequencer(self.pool, self.artifacts, settings)

    @property
    def files(self) -> Path:
        return self.directory / "artifacts" / "ledger"

    @property
    def key(self) -> Ed25519PublicKey:
        return load_signing_key(self.settings.keys_dir / "signing.pem").public_key()

    def forget_files(self) -> None:
        """As if nothing had been published: what a restore does before it writes the files again."""
        self.as_owner("UPDATE vetting SET published = 0")

    @property
    def checkpoint(self) -> str:
        return (self.files / "checkpoint").read_text()

    def append(self, count: int = 1, *, request_id: UUID | None = None) -> None:
        with transaction(self.pool) as connection:
            for number in range(count):
                record(connection, number, request_id)

    def run(self, count: int = 0) -> None:
        """Append, number, sign and write."""
        if count:
            self.append(count)
        self.sequencer.sequence()
        self.sequencer.publish()

    def check(self, **options: Any) -> Report:
        return check(fetcher(self.files), self.key, **options)

    def row(self, query: str, *values: Any) -> tuple[Any, ...]:
        with psycopg.connect(self.database.owner_url) as connection:
            found = connection.execute(query.encode(), values).fetchone()
        assert found is not None
        return found

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database.owner_url) as connection:
            return connection.execute(query.encode()).fetchall()

    def as_owner(self, statement: str) -> None:
        """What only somebody with the owner's rights and without regard for triggers can do."""
        with psycopg.connect(self.database.owner_url, autocommit=True) as connection:
            connection.execute("SET session_replication_role = replica")
            connection.execute(statement.encode())

    def leaves(self) -> list[dict[str, Any]]:
        return [json.loads(bytes(leaf)) for (leaf,) in self.rows("SELECT leaf FROM ledger_leaf ORDER BY index")]

    def require_whole(self, events_recorded: int) -> None:
        """Every event is one leaf, without a gap, under the head; every head that was signed is of the same tree."""
        counts = "SELECT count(*), count(DISTINCT event_id), min(index), max(index) FROM ledger_leaf"
        assert self.row(counts) == (events_recorded, events_recorded, 0, events_recorded - 1)
        assert self.row("SELECT count(*) FROM event_pending e JOIN ledger_leaf l USING (event_id)") == (
            events_recorded,
        )
        assert self.row("SELECT count(*) FROM ledger_queue") == (0,)
        assert self.row("SELECT size FROM ledger_head") == (events_recorded,)
        for (signed,) in self.rows("SELECT note FROM tree_head ORDER BY size"):
            self.check(old=signed)
        assert self.check().head.size == events_recorded


def record(connection: Connection, number: int, request_id: UUID | None = None) -> None:
    fields = {"stage": f"{number:064x}"}
    events.append(connection, EventKind.STAGE_CANCELLED, request_id=request_id, model_id=1, **fields)


def fetcher(directory: Path) -> Any:
    def fetch(name: str) -> bytes | None:
        path = directory / name
        return path.read_bytes() if path.is_file() else None

    return fetch


@contextmanager
def open_ledger(database: Database, directory: Path) -> Iterator[Ledger]:
    write_signing_key(directory / "keys")
    settings = Settings(
        database_url=database.app_url,
        artifact_url=f"file://{directory}/artifacts",
        keys_dir=directory / "keys",
        file_keys_url=file_keys(directory / "artifacts"),
    )
    pool = make_pool(database.app_url, size=8, checked=False)
    pool.open()
    try:
        yield Ledger(database, directory, settings, pool, open_local(directory / "artifacts"))
    finally:
        pool.close()


@contextmanager
def threads(*work: Any) -> Iterator[None]:
    """Run each until the block ends; an error in one fails the test."""
    failed: list[BaseException] = []

    def guarded(each: Any) -> None:
        try:
            each()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failed.append(error)

    running = [threading.Thread(target=guarded, args=(each,)) for each in work]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        for thread in running:
            thread.join(timeout=60)
    assert not failed, [repr(error) for error in failed]
