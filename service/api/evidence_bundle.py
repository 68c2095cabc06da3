"""What lies in an evidence bundle: enough to check certificates, ledger and events without us, from one snapshot."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from service.api.audit import prove
from service.api.context import Context
from service.domain.errors import ConflictError
from service.evidence.merkle import TILE_WIDTH
from service.evidence.tiles import CHECKPOINT, Tile, added_tiles
from service.reports.bundle import File
from service.reports.readme import readme
from service.reports.tables import write_jsonl
from service.store import export_rows, ledger
from service.store.database import Connection
from service.store.export_rows import CertificateRow, LeafRow, Range, RequestRow, TargetRow
from service.store.ledger import Entry, SignedHead
from service.store.ledger_files import contents
from shards.digest import canonical


@dataclass(frozen=True, slots=True)
class _Opened:
    """A line of `events.jsonl`."""

    index: int
    leaf: str
    opening: str | None


def bundle_files(here: Context, connection: Connection, chosen: Range, rows: Iterator[RequestRow]) -> Iterator[File]:
    """The files, each read from the snapshot when its turn has come; `rows` are the requests.

    Raises:
        ConflictError: there is no public key to check with.
    """
    directory = here.settings.keys_dir
    try:
        key = (directory / "signing.pub").read_bytes()
    except OSError:
        raise ConflictError(
            "the public key is missing: put signing.pub, as `expunge up` makes it, into EXPUNGE_KEYS_DIR"
        ) from None
    first = next(rows, None)
    found = () if first is None else chain((first,), rows)
    head = ledger.find_tree_head(connection)
    # Only there once the key was changed: leads from the key that an auditor trusts to the newest.
    key_set = [File("keys.json", lambda: [keys.read_bytes()])] if (keys := directory / "keys.json").is_file() else []
    text = readme(chosen.since, chosen.until, chosen.request_id, empty=first is None, rotated=bool(key_set))
    fixed = [
        File("README.md", lambda: [text.encode()]),
        File("signing.pub", lambda: [key]),
        *key_set,
        File("requests.jsonl", lambda: write_jsonl(RequestRow, found)),
        File("targets.jsonl", lambda: write_jsonl(TargetRow, export_rows.list_targets(connection, chosen))),
    ]
    return chain(fixed, _certificates(connection, chosen), () if head is None else _log(connection, chosen, head))


def _certificates(connection: Connection, chosen: Range) -> Iterator[File]:
    """Of one request a file each, as `expunge verify` takes them; of a range, which may have any number, lines."""
    rows = export_rows.list_certificates(connection, chosen)
    if chosen.request_id is None:
        yield File("certificates.jsonl", lambda: write_jsonl(CertificateRow, rows, at_once=1))
        return
    for row in rows:
        yield _json(f"certificates/{row.model}.json", row.certificate)
        if row.supplements:
            yield _json(f"certificates/{row.model}.supplements.json", row.supplements)


def _json(name: str, body: Any) -> File:
    return File(name, lambda: [canonical(body)])


def _log(connection: Connection, chosen: Range, head: SignedHead) -> Iterator[File]:
    """Events with what opens them, proofs for one request, and the log's own files as they are at this tree head."""
    leaves = export_rows.list_leaves(connection, chosen, before=head.size)
    yield File("events.jsonl", lambda: write_jsonl(_Opened, map(_opened, leaves)))
    if chosen.request_id is not None:
        yield File("inclusion-proof.json", lambda: _proof(connection, chosen, head))
    yield File(f"ledger/{CHECKPOINT}", lambda: [head.note.encode()])
    for tile in added_tiles(0, head.size):
        yield _tile(connection, tile)
        if tile.level == 0:
            yield _tile(connection, tile._replace(level=-1))


def _opened(row: LeafRow) -> _Opened:
    return _Opened(row.index, bytes(row.leaf).decode(), bytes(row.opening).decode() if row.opening else None)


def _proof(connection: Connection, chosen: Range, head: SignedHead) -> Iterable[bytes]:
    leaves = export_rows.list_leaves(connection, chosen, before=head.size)
    entries = [Entry(row.index, row.leaf, row.opening) for row in leaves]
    if chosen.request_id is not None and entries:
        yield json.dumps(prove(connection, chosen.request_id, entries, head), indent=1).encode()


def _tile(connection: Connection, tile: Tile) -> File:
    first = tile.number * TILE_WIDTH
    stop = first + tile.width

    def read() -> Iterable[bytes]:
        if tile.level > 0:
            return [contents(tile, ledger.list_nodes(connection, tile.level, first, stop))]
        rows = ledger.list_entries if tile.level < 0 else ledger.list_hashes
        return [contents(tile, rows(connection, first, stop))]

    return File(f"ledger/{tile.path}", read)
