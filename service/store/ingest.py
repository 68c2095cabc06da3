"""Ingestion: an upload becomes records in cells as a whole or not at all (rules 18 to 23).

Files are built outside of the transaction that takes them into service; the cell's generation and object are
compared under its lock, and the loser starts again.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

import psycopg
from psycopg import errors

from service.domain.errors import InvalidInputError, UnavailableError
from service.evidence.events import EventKind
from service.store import cells, events, objects, payloads, priors, records, subjects
from service.store.artifacts import ArtifactMissingError, Artifacts
from service.store.cells import Cell
from service.store.database import Connection, Pool, retrying, transaction
from service.store.datasets import Dataset
from service.store.payloads import StoredRecord, Whose
from service.store.records import RecordRow
from service.store.subjects import Alias
from shards.digest import sha256_hex
from shards.manifest import Manifest, Record
from shards.partition import cell_of, dataset_key

ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Line:
    """One checked line of an upload."""

    number: int
    """Counted from 1."""
    record: Record
    owner: Alias
    also: tuple[Alias, ...]
    """Others whom the record concerns."""
    prior: int | None = None
    """Index of the class that the line gives its owner; counts at first sight alone. None: it says nothing."""

    @property
    def aliases(self) -> frozenset[Alias]:
        """Everybody whom the record concerns."""
        return frozenset((self.owner, *self.also))


@dataclass(frozen=True, slots=True)
class Ingested:
    """What an upload did; counts only."""

    accepted: int
    skipped: int
    """Lines that concern a subject on the do-not-train list. Which lines is not said."""
    cells: int
    subjects: int


@dataclass(frozen=True, slots=True)
class _Part:
    """What an upload adds to one cell, as the cell was when it was read."""

    cell: Cell
    lines: list[Line]
    name: str


@dataclass(frozen=True, slots=True)
class _Draft:
    """One attempt: who is who, and what goes where."""

    who: dict[Alias, UUID]
    new: dict[Alias, UUID]
    """Subjects that this upload is the first to name."""
    aliases: dict[UUID, list[Alias]]
    """Of each subject, as Postgres has them; a subject's are never changed."""
    kept: list[Line]
    skipped: int
    parts: list[_Part]
    erased: set[UUID]
    classes: dict[UUID, int]
    """Each owner's class of deletion prior, if the dataset has any."""
    first: dict[UUID, int]
    """Those of them that this upload fixes."""

    def whose(self, line: Line) -> Whose:
        """Whom a line's record concerns."""
        owner, concerned = self.who[line.owner], sorted({self.who[alias] for alias in line.aliases})
        aliases = tuple((each, alias.type, alias.digest) for each in concerned for alias in self.aliases[each])
        return Whose(owner, self.classes.get(owner), aliases)


class _ChangedError(Exception):
    """Something that the draft was built on has changed."""


def ingest(pool: Pool, artifacts: Artifacts, partition_key: bytes, dataset: Dataset, lines: Sequence[Line]) -> Ingested:
    """Take the lines into the dataset.

    Raises:
        InvalidInputError: a record id is in use, or a subject is over its row cap; with the line.
        UnavailableError: the same cells changed in each of five attempts.
    """
    key = dataset_key(partition_key, dataset.dataset_id)
    for _ in range(ATTEMPTS):
        draft = retrying(lambda: _draft(pool, key, dataset, lines))
        try:
            for part in draft.parts:
                _write(pool, artifacts, part, draft)
            return retrying(lambda: _publish(pool, dataset, draft))  # noqa: B023 - called at once
        except (_ChangedError, ArtifactMissingError, errors.UniqueViolation):
            _abandon(pool, draft)
        except InvalidInputError:
            _abandon(pool, draft)
            raise
        except (psycopg.Error, OSError):  # rolled back for certain: a lost COMMIT is an UnavailableError
            _abandon(pool, draft)
            raise
        # After a COMMIT whose reply was lost the objects may be live: then only the reaper may decide.
    raise UnavailableError("the cells of this upload kept changing; nothing was kept, send it again")


def _draft(pool: Pool, key: bytes, dataset: Dataset, lines: Sequence[Line]) -> _Draft:
    """Read, unlocked, what the upload meets."""
    with transaction(pool) as connection:
        aliases = frozenset[Alias]().union(*(line.aliases for line in lines))
        known = subjects.find_subjects(connection, aliases)
        barred = subjects.list_do_not_train(connection, dataset.dataset_id, known.values())
        kept = [line for line in lines if not any(known.get(alias) in barred for alias in line.aliases)]
        named = frozenset[Alias]().union(*(line.aliases for line in kept))
        new = {alias: uuid4() for alias in sorted(named - known.keys())}
        who = {**known, **new}
        _check(connection, dataset, who, kept)
        named_priors = [(who[line.owner], line.prior) for line in kept] if dataset.priors else []
        classes, first = priors.find_classes(connection, dataset.dataset_id, named_priors)
        parts = _parts(connection, key, dataset, who, kept, classes)
        erased = records.list_erased(connection, [part.cell.cell_id for part in parts])
        aliases = subjects.list_aliases(connection, known.values()) | {who[alias]: [alias] for alias in new}
        return _Draft(who, new, aliases, kept, len(lines) - len(kept), parts, erased, classes, first)


def _parts(
    connection: Connection,
    key: bytes,
    dataset: Dataset,
    who: dict[Alias, UUID],
    kept: list[Line],
    classes: dict[UUID, int],
) -> list[_Part]:
    at = {(cell.shard, cell.slice): cell for cell in cells.list_cells(connection, dataset.dataset_id)}
    grouped: defaultdict[int, list[Line]] = defaultdict(list)
    found: dict[int, Cell] = {}
    for line in kept:
        owner = who[line.owner]
        span = dataset.span(classes.get(owner))
        place = cell_of(key, owner, shards=dataset.shards, slices=dataset.slices, span=span)
        cell = at[place.shard, place.slice]
        found[cell.cell_id] = cell
        grouped[cell.cell_id].append(line)
    parts: list[_Part] = []
    for cell_id, members in sorted(grouped.items()):
        # The name carries the root that is expected; the root that counts is computed under the lock.
        commitments = [
            *records.list_commitments(connection, cell_id),
            *(m.record.commitment for m in members),
        ]
        parts.append(_Part(found[cell_id], members, payloads.object_name(Manifest.of(commitments).root)))
    return parts


def _check(connection: Connection, dataset: Dataset, who: dict[Alias, UUID], kept: list[Line]) -> None:
    """Refuse record ids that are taken and subjects over their cap, with the line."""
    taken = records.list_taken(connection, (line.record.record_id for line in kept))
    owned = Counter(records.count_of_owners(connection, dataset.dataset_id, {who[line.owner] for line in kept}))
    for line in kept:
        deleted = taken.get(line.record.record_id)
        if deleted is not None:
            why = "belongs to a deleted record and never comes back: give" if deleted else "is in use already: give"
            raise InvalidInputError(f"record_id {why} the record a new one", field="record_id", line=line.number)
        owned[who[line.owner]] += 1
        if owned[who[line.owner]] > dataset.subject_row_cap:
            raise InvalidInputError(
                f"the subject would own more than {dataset.subject_row_cap} records, the dataset's"
                " subject_row_cap: leave the surplus out",
                field="subject",
                line=line.number,
            )


def _write(pool: Pool, artifacts: Artifacts, part: _Part, draft: _Draft) -> None:
    """Build and store the cell's next object. Sealed rows stay in it, the manifest leaves them out."""
    old = payloads.decode(artifacts.get(part.cell.object_name)) if part.cell.object_name else []
    kept = [stored for stored in old if stored.record.record_id not in draft.erased]
    fresh = [StoredRecord(part.cell.generation + 1, line.record, draft.whose(line)) for line in part.lines]
    data = payloads.encode([*kept, *fresh])
    with transaction(pool) as connection:  # before the first byte (rule 20)
        if not cells.share_unchanged(connection, part.cell):
            raise _ChangedError
        objects.insert_writing(
            connection,
            part.name,
            kind="cell",
            digest=sha256_hex(data),
            size=len(data),
            cell_id=part.cell.cell_id,
        )
    artifacts.put(part.name, data)


def _publish(pool: Pool, dataset: Dataset, draft: _Draft) -> Ingested:
    """Take the objects into service, if everything is still as the draft found it."""
    with transaction(pool) as connection:
        named = frozenset[Alias]().union(*(line.aliases for line in draft.kept))
        _lock(connection, dataset, draft, named)
        _check(connection, dataset, draft.who, draft.kept)
        if not objects.mark_live(connection, [part.name for part in draft.parts]):
            raise _ChangedError
        rows: list[RecordRow] = []
        for part in draft.parts:
            added = _advance(connection, part)
            rows.extend(_row(dataset, draft.who, part.cell, line, added) for line in part.lines)
        records.insert_records(connection, rows)
        if draft.skipped:
            events.append(connection, EventKind.INGESTION_REFUSED, lines=draft.skipped, reason="do_not_train")
    return Ingested(len(draft.kept), draft.skipped, len(draft.parts), len({draft.who[alias] for alias in named}))


def _lock(connection: Connection, dataset: Dataset, draft: _Draft, named: frozenset[Alias]) -> None:
    """Lock subjects, then cells, and only then read the do-not-train list again (rule 23)."""
    if not subjects.insert_subjects(connection, draft.new):
        raise _ChangedError
    known = {draft.who[alias] for alias in named - draft.new.keys()}
    subjects.share_subjects(connection, known)
    if not priors.insert_of_subjects(connection, dataset.dataset_id, draft.first):
        raise _ChangedError
    locked = {cell.cell_id: cell for cell in cells.lock_cells(connection, (p.cell.cell_id for p in draft.parts))}
    if any(locked[part.cell.cell_id] != part.cell for part in draft.parts):
        raise _ChangedError
    # Erasure forgets classes under the lock of the owner's cell, so from here on they stand.
    if priors.list_of_subjects(connection, dataset.dataset_id, draft.classes) != draft.classes:
        raise _ChangedError
    if subjects.list_do_not_train(connection, dataset.dataset_id, known):
        raise _ChangedError


def _advance(connection: Connection, part: _Part) -> int:
    """Make the cell's next generation on its new object, and doom the old one."""
    cell = part.cell
    generation, manifest = cells.advance(
        connection, cell, object_name=part.name, added=[line.record.commitment for line in part.lines]
    )
    objects.doom_replaced(connection, cell.cell_id, kept=part.name)
    events.append(
        connection,
        EventKind.CELL_INGESTED,
        shard=cell.shard,
        slice=cell.slice,
        generation=generation,
        root=manifest.root,
        rows=len(manifest.commitments),
    )
    return generation


def _row(dataset: Dataset, who: dict[Alias, UUID], cell: Cell, line: Line, added: int) -> RecordRow:
    return RecordRow(
        record_id=line.record.record_id,
        dataset_id=dataset.dataset_id,
        cell_id=cell.cell_id,
        owner_id=who[line.owner],
        commitment=line.record.commitment,
        added=added,
        subjects=tuple({who[alias] for alias in line.aliases}),
    )


def _abandon(pool: Pool, draft: _Draft) -> None:
    """Leave the objects of an attempt that was rolled back to the reaper."""
    with transaction(pool) as connection:
        objects.doom(connection, [part.name for part in draft.parts])
