"""The sequencer: events become leaves, the tree is signed, and its files are written (rules 13 to 17).

Any number may run. The row lock on the ledger's head makes one of them number leaves at a time; heads and tiles are
functions of the leaves, so whoever writes them writes the same.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psycopg
import structlog

from service.domain.errors import UnavailableError
from service.evidence.events import EventKind
from service.evidence.keys import keyid, load_signing_key
from service.evidence.merkle import TILE_WIDTH, Tree
from service.evidence.tiles import CHECKPOINT, Tile
from service.evidence.tree_head import ForkError, TreeHead, TreeHeadError, read_head, sign_head
from service.settings import Settings
from service.store import events, ledger
from service.store.artifacts import LocalArtifacts
from service.store.database import Connection, Pool, retrying, transaction
from service.store.ledger_files import LedgerFiles, contents, read_high_water, write_high_water

log = structlog.get_logger()

SEQUENCE_SECONDS = 0.025
"""Between looks at the queue: an event has its number within twice as long."""
PUBLISH_SECONDS = 0.75
"""Between tree heads: with their writing about a second (rule 17)."""
REFUSED_SECONDS = 5.0
"""How long nothing is tried after a refusal that only an operator can end."""
ERASE_SECONDS = 3600.0
AWAY = (UnavailableError, psycopg.OperationalError, OSError)
"""Stores that are away: the loop tries again. Anything else rests: the barrier in the same program goes on."""


class BehindError(TreeHeadError):
    """The database is older than a tree head that was signed."""


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
        found: list[TreeHead] = []
        for name, data in (
            ("ledger/checkpoint of the artefact store", self.published),
            ("high-water file", self.high_water),
        ):
            try:
                found += [read_head(data.decode(errors="replace"))] if data is not None else []
            except TreeHeadError as error:
                raise TreeHeadError(
                    f"the {name} is damaged: {error}. Restore it, or remove it: a new one is written"
                ) from None
        return found


class Sequencer:
    """Numbers, signs and publishes, one look at a time, at the caller's pace."""

    def __init__(self, pool: Pool, artifacts: LocalArtifacts, settings: Settings) -> None:
        """The signing key is read when it is needed."""
        self._pool = pool
        self._files = LedgerFiles(artifacts)
        self._settings = settings
        self._high_water = settings.ledger_high_water or settings.keys_dir / "tree-head"
        self._vetted = ""
        self._resting: dict[str, float] = {}
        self._erased = -ERASE_SECONDS

    def look(self) -> None:
        """Number what waits."""
        self._unless_refused("sequence", self.sequence)

    def look_and_publish(self) -> None:
        """Sign and write what was numbered; once an hour erase openings that are too old."""
        self._unless_refused("publish", self.publish)
        if time.monotonic() - self._erased > ERASE_SECONDS:
            self._erased = time.monotonic()
            self._unless_refused("erase", self.erase)

    def sequence(self) -> int:
        """Make leaves of all events that wait; how many.

        Raises:
            BehindError: the database lacks leaves that were signed: their numbers must not be given again.
            ForkError: it holds others.
        """
        count = 0
        while (batch := self._batch()) is None or batch == ledger.BATCH:
            count += batch or 0
        return count + batch

    def publish(self) -> TreeHead | None:
        """Sign the tree, keep the head, then write the high-water file, tiles and checkpoint; None without leaves.

        May die at any line: the next call finds the head by its size, and the files by their names.

        Raises:
            TreeHeadError: nothing was signed, or a file holds other bytes than the database.
        """
        seen = self._seen()
        with transaction(self._pool) as connection:
            signed = self._sign(connection, seen)
        if signed is None:
            return None
        head, note = signed
        kept = seen.high_water == note.encode()
        if not kept and not write_high_water(self._high_water, note, expected=seen.high_water):
            return head  # another program keeps and publishes its own
        written = read_head(seen.published.decode()).size if seen.published is not None else 0
        if written < head.size:
            self._files.write(written, head.size, self._read)
            self._files.publish(note, expected=seen.published)
        return head

    def erase(self) -> int:
        """Erase openings past their retention, in the database and beside the tiles; how many."""
        count, days, erased = 0, self._settings.ledger_opening_days, -1
        while erased:
            with transaction(self._pool) as connection:
                erased = ledger.erase_openings(connection, days=days)
                if erased:
                    events.append(connection, EventKind.LEDGER_OPENINGS_ERASED, openings=erased, days=days)
            count += erased
        with transaction(self._pool) as connection:
            head = ledger.get_head(connection)  # first: what is numbered meanwhile is above it
            first = ledger.first_opening(connection, days=days)
            before = head.size if first is None else first
            end = (before // TILE_WIDTH + 1) * TILE_WIDTH
            left = ledger.list_openings(connection, before, end) if before % TILE_WIDTH else []
        self._files.erase_openings(before, left)
        if count:
            log.info("ledger.openings_erased", openings=count)
        return count

    def _batch(self) -> int | None:
        """Number one batch; None where the heads outside must be read first."""
        seen = None if self._vetted else self._seen()  # not within the transaction

        def step() -> int | None:
            with transaction(self._pool) as connection:
                database = ledger.find_waiting(connection)
                if database is None:
                    return 0
                if database != self._vetted:  # another one than was compared before: it may have been restored
                    self._vetted = ""
                    if seen is None:
                        return None
                    last = ledger.find_tree_head(connection)  # first: another may number and sign between the two
                    _require_agreement(connection, ledger.get_head(connection), last, seen)
                    self._vetted = database
                return ledger.sequence(connection)

        return retrying(step)

    def _seen(self) -> Seen:
        return Seen(self._files.read(CHECKPOINT), read_high_water(self._high_water))

    def _sign(self, connection: Connection, seen: Seen) -> tuple[TreeHead, str] | None:
        """The head over all leaves and its checkpoint; what was signed before is found again, never signed anew."""
        last = ledger.find_tree_head(connection)  # first: another may number and sign between the two
        current = ledger.get_head(connection)
        known = {(head.size, head.root) for head in seen.heads}
        if last is not None and last.size == current.size and known == {(last.size, last.root)}:
            return read_head(last.note), last.note
        tree = _require_agreement(connection, current, last, seen)
        if current.size == 0:
            return None
        root = tree.root()
        origins = [head.origin for head in (*([read_head(last.note)] if last else []), *seen.heads)]
        key = load_signing_key(self._settings.keys_dir / "signing.pem")
        origin = (*origins, self._settings.ledger_origin or f"expunge/{keyid(key)[:16]}")[0]
        head = TreeHead(origin, current.size, root)
        kept = ledger.insert_tree_head(connection, head.size, root, sign_head(head, key))
        if kept.root != root:
            raise ForkError(read_head(kept.note), head)
        return head, kept.note

    def _read(self, tiles: Sequence[Tile]) -> list[bytes]:
        with transaction(self._pool) as connection:
            return [contents(tile, _hashes(connection, tile)) for tile in tiles]

    def _unless_refused(self, what: str, step: Callable[[], object]) -> None:
        if time.monotonic() < self._resting.get(what, 0.0):
            return
        try:
            step()
        except AWAY:
            raise
        except Exception as error:  # noqa: BLE001 - a thread that dies would take the barrier with it
            self._resting[what] = time.monotonic() + REFUSED_SECONDS
            log.critical("ledger.refused", step=what, type=type(error).__name__, error=str(error))


def _require_agreement(
    connection: Connection, current: ledger.Head, last: ledger.SignedHead | None, seen: Seen
) -> Tree:
    """The tree of all leaves, once it continues every head that was seen anywhere (rule 16)."""
    tree = ledger.tree(connection, current.size)
    if current.size and tree.root() != current.range.root:
        raise TreeHeadError("the ledger's head is not the root of its leaves: a table was changed by hand")
    for head in (*([read_head(last.note)] if last else []), *seen.heads):
        if head.size > current.size:
            raise BehindError(
                f"the database holds {current.size} leaves, but {head} was signed: it was restored from an older state."
                " Nothing is numbered or signed until the newer database is back (docs/ledger.md)"
            )
        found = tree.subtree(0, head.size)
        if found != head.root:
            raise ForkError(head, TreeHead(head.origin, head.size, found))
    return tree


def _hashes(connection: Connection, tile: Tile) -> list[bytes]:
    first = tile.number * TILE_WIDTH
    if tile.level >= 1:
        return ledger.list_nodes(connection, tile.level, first, first + tile.width)
    readers = {0: ledger.list_hashes, -1: ledger.list_entries, -2: ledger.list_openings}
    return readers[tile.level](connection, first, first + tile.width)
