"""Whether a running database is of one moment with what was signed outside it (protocol.md, rule 16 and section 8).

A database that was started anew, copied or put back may do nothing before it was compared with the tree heads in the
artefact store and in the high-water file: triggers see to it (revision 0012). `expunge restore` mends what differs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

from psycopg.rows import class_row

from service.evidence.merkle import Tree
from service.evidence.tiles import CHECKPOINT
from service.evidence.tree_head import ForkError, TreeHead, TreeHeadError, read_head
from service.store import ledger
from service.store.database import SHUT, Connection, Pool, QuarantineError, transaction
from service.store.ledger_files import LedgerFiles, read_high_water

GET: LiteralString = """
SELECT database_identity() AS identity, v.database, coalesce(v.published, 0) AS published, v.quarantine, v.progress,
       EXISTS (SELECT FROM ledger_queue) AS waiting
FROM (SELECT) one LEFT JOIN vetting v ON true
"""
MIGRATED: LiteralString = "SELECT to_regclass('vetting')::text"
MARK_VETTED: LiteralString = """
INSERT INTO vetting (database) VALUES (%(identity)s::text)
ON CONFLICT (one) DO UPDATE SET database = EXCLUDED.database
WHERE vetting.quarantine IS NULL AND vetting.database <> EXCLUDED.database
"""
MARK_SHUT: LiteralString = """
INSERT INTO vetting (database, quarantine) VALUES (database_identity(), %(reason)s::text)
ON CONFLICT (one) DO UPDATE SET quarantine = EXCLUDED.quarantine WHERE vetting.quarantine IS NULL
"""
MARK_PUBLISHED: LiteralString = """
INSERT INTO vetting (database, published) VALUES (database_identity(), %(size)s::bigint)
ON CONFLICT (one) DO UPDATE SET published = EXCLUDED.published WHERE vetting.published < EXCLUDED.published
"""


class BehindError(TreeHeadError):
    """The database is older than a tree head that was signed."""


class StoreBehindError(TreeHeadError):
    """The artefact store is older than the database."""


@dataclass(frozen=True, slots=True)
class Vetting:
    """How a database stands."""

    identity: str
    """Of the running database."""
    database: str | None
    """The identity that was compared; None: never one."""
    published: int
    """Leaves that the artefact store's checkpoint had when it was put."""
    quarantine: str | None
    progress: dict[str, Any] | None
    """Of a restore under way."""
    waiting: bool
    """Whether an event has no leaf."""

    @property
    def is_open(self) -> bool:
        """Whether the triggers let it work."""
        return self.quarantine is None and self.database in {None, self.identity}


@dataclass(frozen=True, slots=True)
class Seen:
    """Checkpoints outside the database, as they were read."""

    published: bytes | None
    high_water: bytes | None

    @property
    def heads(self) -> list[TreeHead]:
        """What they say. Unsigned ones stop the ledger, too: every one is compared with the leaves.

        Raises:
            TreeHeadError: one of them cannot be read.
        """
        return [head for head in (self.of_store, self.of_high_water) if head is not None]

    @property
    def of_store(self) -> TreeHead | None:
        """The artefact store's."""
        return _read(self.published, "ledger/checkpoint of the artefact store")

    @property
    def of_high_water(self) -> TreeHead | None:
        """The high-water file's."""
        return _read(self.high_water, "high-water file")


def see(files: LedgerFiles, high_water: Path) -> Seen:
    """Read the checkpoints outside the database."""
    return Seen(files.read(CHECKPOINT), read_high_water(high_water))


def get(connection: Connection) -> Vetting:
    """How the database stands; cheap enough to be asked every few milliseconds."""
    with connection.cursor(row_factory=class_row(Vetting)) as cursor:
        (found,) = cursor.execute(GET).fetchall()
    return found


def require_open(pool: Pool) -> None:
    """Do nothing where the database may work: for what begins with a change outside of it.

    Raises:
        QuarantineError: it may not.
    """
    with transaction(pool) as connection:
        found = get(connection)
    if not found.is_open:
        raise QuarantineError(SHUT["57Q01" if found.quarantine else "57Q02"])


def vet(pool: Pool, files: LedgerFiles, high_water: Path) -> None:
    """Compare the running database with what was signed, and open or shut it by that.

    Raises:
        QuarantineError: it was shut before; only a restore opens it.
        BehindError: it lacks leaves that were signed: their numbers must not be given again.
        StoreBehindError: the artefact store lacks leaves that were written to it.
        ForkError: two histories; the message names both heads.
        TreeHeadError: a checkpoint or the ledger is damaged; nothing was opened or shut.
    """
    with transaction(pool) as connection:
        if connection.execute(MIGRATED).fetchone() == (None,):
            return  # no schema yet: /readyz says so
        before = get(connection)  # ahead of the files: what is published meanwhile is no loss
    if before.quarantine is not None:
        raise QuarantineError(f"{SHUT['57Q01']}: {before.quarantine}")
    seen = see(files, high_water)
    try:
        with transaction(pool) as connection:
            last = ledger.find_tree_head(connection)
            require_agreement(connection, ledger.get_head(connection), last, seen)
        require_store(before, seen)
    except (BehindError, StoreBehindError, ForkError) as error:
        shut(pool, str(error))
        raise
    with transaction(pool) as connection:
        connection.execute(MARK_VETTED, {"identity": before.identity})


def shut(pool: Pool, reason: str) -> None:
    """Let the database do nothing until it was restored."""
    with transaction(pool) as connection:
        connection.execute(MARK_SHUT, {"reason": reason})


def mark_published(connection: Connection, size: int) -> None:
    """The artefact store holds all of so many leaves."""
    connection.execute(MARK_PUBLISHED, {"size": size})


def require_agreement(connection: Connection, current: ledger.Head, last: ledger.SignedHead | None, seen: Seen) -> Tree:
    """The tree of all leaves, once it continues every head that was seen anywhere (rule 16).

    Read `last` before `current`: another sequencer may number and sign between the two.

    Raises:
        BehindError: the database lacks leaves.
        ForkError: it holds others.
        TreeHeadError: its head is not the root of its leaves.
    """
    tree = ledger.tree(connection, current.size)
    if current.size and tree.root() != current.range.root:
        raise TreeHeadError("the ledger's head is not the root of its leaves: a table was changed by hand")
    for head in (*([read_head(last.note)] if last else []), *seen.heads):
        if head.size > current.size:
            raise BehindError(
                f"the database holds {current.size} leaves, but {head} was signed: it was restored from an older state."
                " Nothing is taken in or served before the newer database is back, or `expunge restore` has run"
                " (docs/restore.md)"
            )
        found = tree.subtree(0, head.size)
        if found != head.root:
            raise ForkError(head, TreeHead(head.origin, head.size, found))
    return tree


def require_store(before: Vetting, seen: Seen) -> None:
    """Do nothing where the artefact store holds all that was written to it.

    Raises:
        StoreBehindError: it does not.
    """
    size = seen.of_store.size if seen.of_store else 0
    if size < before.published:
        raise StoreBehindError(
            f"the artefact store's checkpoint has {size} leaves, but {before.published} were written there: it was"
            " restored from an older state. Nothing is taken in or served before the newer store is back, or"
            " `expunge restore` has run (docs/restore.md)"
        )


def _read(data: bytes | None, name: str) -> TreeHead | None:
    try:
        return None if data is None else read_head(data.decode(errors="replace"))
    except TreeHeadError as error:
        raise TreeHeadError(
            f"the {name} is damaged: {error}. Restore it; or remove it and run `expunge restore`, which writes it again"
        ) from None
