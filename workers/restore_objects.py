"""A restore's work on files: what was destroyed goes again, what is missing is found, cells hold what is known."""

from dataclasses import dataclass, field
from uuid import UUID

import psycopg
import structlog

from service.evidence.events import EventKind
from service.store import cells, events, jobs, objects, payloads, priors, restore_records, restore_rows, restores
from service.store.artifacts import ArtifactMissingError, Artifacts
from service.store.cells import Cell
from service.store.database import Connection, Pool, transaction
from service.store.ledger_files import is_ledger_file
from service.store.payloads import StoredRecord
from shards.digest import sha256_hex
from shards.errors import ArtifactDigestError, ManifestMismatchError
from workers.erase import destroy

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Settled:
    """What a cell's file and its records have in common, and what not."""

    cell: Cell
    kept: list[StoredRecord]
    strangers: list[StoredRecord]
    """Payloads of nobody known, and their file does not say whose they are, or not what the ledger says of the cell."""
    erased: list[StoredRecord]
    """Payloads that a deletion had removed."""
    lost: list[restore_rows.KnownRecord] = field(default_factory=list[restore_rows.KnownRecord])
    """Records without a payload."""
    unreadable: bool = False
    """Whether the file itself is missing or damaged."""

    @property
    def changes(self) -> bool:
        """Whether the cell has to be written again."""
        return bool(self.strangers or self.erased or self.lost or self.unreadable)

    @property
    def since(self) -> int | None:
        """From which generation on the cell held what is unknown or lost; None: never."""
        if self.unreadable:
            return 0
        found = [each.generation for each in self.strangers] + [each.added for each in self.lost]
        return min(found, default=None)


def destroy_again(pool: Pool, artifacts: Artifacts) -> int:
    """Delete every object that was doomed or destroyed and is there; how many came back from the dead."""
    with transaction(pool) as connection:
        doomed, destroyed = (
            restore_rows.list_objects(connection, "doomed"),
            restore_rows.list_objects(connection, "destroyed"),
        )
    for each in doomed:
        destroy(pool, artifacts, each)
    back = [each for each in destroyed if artifacts.exists(each.object_name)]
    for each in back:
        artifacts.delete(each.object_name)
        with transaction(pool) as connection:
            events.append(connection, EventKind.ARTIFACT_REAPPEARED, object_name=each.object_name, digest=each.digest)
    return len(back)


def find_lost(pool: Pool, artifacts: Artifacts) -> int:
    """Mark live stages and evaluations whose file is missing or damaged as lost, so that they are trained again."""
    with transaction(pool) as connection:
        live = [each for each in restore_rows.list_objects(connection, "live") if each.stage_key]
    lost = [each for each in live if _read(artifacts, each.object_name, each.digest) is None]
    for each in lost:
        artifacts.delete(each.object_name)
        with transaction(pool) as connection:
            objects.mark_lost(connection, each)
    return len(lost)


def remove_strays(pool: Pool, artifacts: Artifacts) -> int:
    """Delete objects without a row; nothing is being written, so none is too young."""
    with transaction(pool) as connection:
        known = objects.list_names(connection)
    strays = [name for name in artifacts.names(older_than=-60) if name not in known and not is_ledger_file(name)]
    for name in strays:
        artifacts.delete(name)
    return len(strays)


def compare_cells(pool: Pool, artifacts: Artifacts) -> list[Settled]:
    """Every cell beside its file, once the rows that the database lacks are back from there."""
    with transaction(pool) as connection:
        every = restore_rows.list_cells(connection)
    return [_compare(pool, artifacts, cell) for cell in every]


def settle(pool: Pool, artifacts: Artifacts, found: Settled) -> None:
    """Give a cell a file with the records that are known, not erased and there; doom what learnt anything else."""
    written: str | None = None
    if found.changes and found.kept:
        data = payloads.encode(found.kept)
        written = payloads.object_name(sha256_hex(data))
        with transaction(pool) as connection:
            objects.insert_writing(
                connection,
                written,
                kind="cell",
                digest=sha256_hex(data),
                size=len(data),
                cell_id=found.cell.cell_id,
            )
        artifacts.put(written, data)
    elif not found.changes:
        written = found.cell.object_name
    with transaction(pool) as connection:
        (cell,) = cells.lock_cells(connection, [found.cell.cell_id])
        if found.changes:
            _forget(connection, found, written)
        elif not cells.is_sealed(connection, cell):
            return
        cells.advance(connection, cell, object_name=written)
        objects.doom_replaced(connection, cell.cell_id, kept=written)


def doom_tainted(pool: Pool, artifacts: Artifacts) -> int:
    """Doom stages whose lineage holds a record that is erased, and destroy all that is doomed; how many of stages."""
    with transaction(pool) as connection:
        _doom(connection, restore_rows.list_erased_in(connection))
        doomed = restore_rows.list_objects(connection, "doomed")
    for each in doomed:
        destroy(pool, artifacts, each)
    return sum(each.stage_key is not None for each in doomed)


def _forget(connection: Connection, found: Settled, written: str | None) -> None:
    if written and not objects.mark_live(connection, [written]):
        raise AssertionError("nobody else writes while the installation is shut")
    gone = [each.record_id for each in found.lost]
    priors.forget(connection, gone)
    restore_rows.delete_records(connection, gone)
    if found.since is not None:
        _doom(connection, restore_rows.list_readers(connection, found.cell.cell_id, found.since))


def _doom(connection: Connection, keys: list[str]) -> None:
    objects.doom_stages(connection, keys)
    for key in jobs.cancel(connection, keys):
        events.append(connection, EventKind.STAGE_CANCELLED, stage=key)


def _compare(pool: Pool, artifacts: Artifacts, cell: Cell) -> Settled:
    with transaction(pool) as connection:
        digest = restore_rows.find_digest(connection, cell.object_name) if cell.object_name else None
    data = _read(artifacts, cell.object_name, digest) if cell.object_name else None
    stored = payloads.decode(data) if data is not None else []
    _recover(pool, cell, stored)
    with transaction(pool) as connection:
        known = {each.record_id: each for each in restore_rows.list_records(connection, cell.cell_id)}
        erased = restore_rows.list_erased_records(connection, cell.cell_id)
    there: set[UUID] = {each.record.record_id for each in stored}
    return Settled(
        cell,
        kept=[each for each in stored if each.record.record_id in known],
        strangers=[each for each in stored if each.record.record_id not in known.keys() | erased],
        erased=[each for each in stored if each.record.record_id in erased],
        lost=[each for record_id, each in known.items() if record_id not in there],
        unreadable=cell.object_name is not None and data is None,
    )


def _recover(pool: Pool, cell: Cell, stored: list[StoredRecord]) -> None:
    """Bring back the rows that the database lacks: all, or none where they do not fit what the ledger says."""
    try:
        with transaction(pool) as connection:
            restores.add_recovered(connection, restore_records.insert_missing(connection, cell, stored))
    except (psycopg.IntegrityError, ManifestMismatchError) as error:
        log.warning("restore.records_contradict", cell_id=cell.cell_id, error=type(error).__name__)


def _read(artifacts: Artifacts, name: str, digest: str | None) -> bytes | None:
    """The object, if it is there and whole."""
    try:
        data = artifacts.get(name)
    except ArtifactMissingError:
        return None
    except ArtifactDigestError as error:
        log.warning("restore.damaged", object_name=name, error=str(error))
        return None
    return data if sha256_hex(data) == digest else None
