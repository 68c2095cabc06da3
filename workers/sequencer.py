"""The sequencer: events become leaves, the tree is signed, and its files are written (rules 13 to 17).

Any number may run. The row lock on the ledger's head makes one of them number leaves at a time; heads and tiles are
functions of the leaves, so whoever writes them writes the same.
"""

import time
from collections.abc import Callable, Sequence

import psycopg
import structlog

from service.domain.errors import UnavailableError
from service.evidence.events import EventKind
from service.evidence.keys import keyid, load_signing_key
from service.evidence.merkle import TILE_WIDTH
from service.evidence.signers import SigningKey
from service.evidence.tiles import Tile
from service.evidence.tree_head import ForkError, TreeHead, read_head, sign_head
from service.settings import Settings
from service.store import events, ledger, rotation, vetting
from service.store.artifacts import Artifacts
from service.store.database import Connection, Pool, QuarantineError, retrying, transaction
from service.store.ledger_files import LedgerFiles, contents, write_high_water
from service.store.vetting import BehindError, Seen, StoreBehindError

__all__ = ["BehindError", "Seen", "Sequencer", "StoreBehindError"]

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


class Sequencer:
    """Numbers, signs and publishes, one look at a time, at the caller's pace."""

    def __init__(self, pool: Pool, artifacts: Artifacts, settings: Settings) -> None:
        """The signing key is read when it is needed."""
        self._pool = pool
        self._files = LedgerFiles(artifacts)
        self._settings = settings
        self._key_file = settings.keys_dir / "signing.pem"
        self._high_water = settings.ledger_high_water or settings.keys_dir / "tree-head"
        self._vetted = False
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
        while (batch := self._batch()) == ledger.BATCH:
            count += batch
        return count + batch

    def publish(self) -> TreeHead | None:
        """Sign the tree, keep the head, then write the high-water file, tiles and checkpoint; None without leaves.

        May die at any line: the next call finds the head by its size, and the files by their names.

        Raises:
            TreeHeadError: nothing was signed, or a file holds other bytes than the database.
        """
        with transaction(self._pool) as connection:
            before = vetting.get(connection)  # ahead of the files: what another publishes meanwhile is no loss
        seen = vetting.see(self._files, self._high_water)
        key = load_signing_key(self._key_file)  # ahead of the leaves: what an older key signed is known by then
        try:
            with transaction(self._pool) as connection:
                found = self._find(connection, seen, key)
                vetting.require_store(before, seen)
            if found is None:
                return None
            head, kept = found
            note = kept or self._sign(head, key)
        except (BehindError, StoreBehindError, ForkError) as error:
            vetting.shut(self._pool, str(error))
            raise
        if note is None:
            return self.publish()
        if seen.high_water != note.encode() and not write_high_water(self._high_water, note, expected=seen.high_water):
            return head  # another program keeps and publishes its own
        written = read_head(seen.published.decode()).size if seen.published is not None else 0
        if written < head.size:
            self._files.write(written, head.size, self._read)
            if self._files.publish(note, expected=seen.published):
                with transaction(self._pool) as connection:
                    vetting.mark_published(connection, head.size)
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

    def _batch(self) -> int:
        """Number one batch, in a database that was compared with the heads outside since it started."""
        with transaction(self._pool) as connection:
            found = vetting.get(connection)
        if not (self._vetted and found.is_open and found.database):
            self._vetted = False
            vetting.vet(self._pool, self._files, self._high_water)
            self._vetted = True
        elif not found.waiting:
            return 0

        def step() -> int:
            with transaction(self._pool) as connection:
                return ledger.sequence(connection)

        return retrying(step)

    def _find(self, connection: Connection, seen: Seen, key: SigningKey) -> tuple[TreeHead, str | None] | None:
        """The head over all leaves, and its checkpoint where one is kept: nothing is signed anew."""
        last = ledger.find_tree_head(connection)
        current = ledger.get_head(connection)
        known = {(head.size, head.root) for head in seen.heads}
        if last is not None and last.size == current.size and known == {(last.size, last.root)}:
            return read_head(last.note), last.note
        tree = vetting.require_agreement(connection, current, last, seen)
        if current.size == 0:
            return None
        origins = [head.origin for head in (*([read_head(last.note)] if last else []), *seen.heads)]
        origin = (*origins, self._settings.ledger_origin or f"expunge/{keyid(key)[:16]}")[0]
        head = TreeHead(origin, current.size, tree.root())
        if last is None or last.size < head.size:
            return head, None
        return head, _same(last, head)

    def _sign(self, head: TreeHead, key: SigningKey) -> str | None:
        """The checkpoint that is kept for the head; None where another key signs since.

        The key may lie behind a network, so it signs ahead of the transaction.
        """
        note = sign_head(head, key)
        with transaction(self._pool) as connection:
            rotation.lock_signing(connection)
            if keyid(load_signing_key(self._key_file)) != keyid(key):
                return None
            return _same(ledger.insert_tree_head(connection, head.size, head.root, note), head)

    def _read(self, tiles: Sequence[Tile]) -> list[bytes]:
        with transaction(self._pool) as connection:
            return [contents(tile, _hashes(connection, tile)) for tile in tiles]

    def _unless_refused(self, what: str, step: Callable[[], object]) -> None:
        if time.monotonic() < self._resting.get(what, 0.0):
            return
        try:
            step()
        except Exception as error:
            if isinstance(error, AWAY) and not isinstance(error, QuarantineError):
                raise
            self._resting[what] = time.monotonic() + REFUSED_SECONDS
            log.critical("ledger.refused", step=what, type=type(error).__name__, error=str(error))


def _same(kept: ledger.SignedHead, head: TreeHead) -> str:
    if kept.root != head.root:
        raise ForkError(read_head(kept.note), head)
    return kept.note


def _hashes(connection: Connection, tile: Tile) -> list[bytes]:
    first = tile.number * TILE_WIDTH
    if tile.level >= 1:
        return ledger.list_nodes(connection, tile.level, first, first + tile.width)
    readers = {0: ledger.list_hashes, -1: ledger.list_entries, -2: ledger.list_openings}
    return readers[tile.level](connection, first, first + tile.width)
