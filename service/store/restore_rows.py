"""What a restore reads and changes of cells, stages, versions and leases, once the ledger's leaves are back."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.evidence.events import EventKind
from service.store import events
from service.store.cells import Cell
from service.store.database import Connection
from service.store.objects import Object
from service.store.stages import HOLDS

LIST_OBJECTS: LiteralString = """
SELECT object_name, digest, stage_key, cell_id FROM artifact
WHERE state = %(state)s::artifact_state
ORDER BY object_name
"""
LIST_CELLS: LiteralString = """
SELECT cell_id, dataset_id, shard, slice, generation, object_name FROM cell ORDER BY cell_id
"""
LIST_ERASED_RECORDS: LiteralString = """
SELECT record_id FROM tombstone WHERE cell_id = %(cell_id)s::bigint AND erased_at IS NOT NULL
"""
FIND_DIGEST: LiteralString = "SELECT digest FROM artifact WHERE object_name = %(object_name)s::text"
LIST_RECORDS: LiteralString = "SELECT record_id, added FROM record WHERE cell_id = %(cell_id)s::bigint"
DELETE_RECORDS: LiteralString = "DELETE FROM record WHERE record_id = ANY(%(record_ids)s::uuid[])"
LIST_READERS: LiteralString = """
SELECT DISTINCT sc.stage_key FROM stage_cell sc
WHERE sc.cell_id = %(cell_id)s::bigint AND sc.generation >= %(generation)s::bigint
"""
LIST_ERASED_IN: LiteralString = (
    """
SELECT DISTINCT sc.stage_key
FROM stage_cell sc JOIN tombstone t ON t.cell_id = sc.cell_id AND t.erased_at IS NOT NULL
WHERE """
    + HOLDS
)
END_LEASES: LiteralString = """
UPDATE lease l SET ended_at = clock_timestamp() FROM model m
WHERE m.model_id = l.model_id AND l.ended_at IS NULL
RETURNING l.process_id, l.model_id, m.floor
"""
LONGEST_LEASE: LiteralString = "SELECT coalesce(max(ttl_ms), 0) FROM lease"
END_DEFERRALS: LiteralString = "DELETE FROM deferral WHERE model_id = %(model_id)s::bigint"
END_WAITING: LiteralString = """
UPDATE request_target SET deferred_until = clock_timestamp()
WHERE model_id = %(model_id)s::bigint AND state = 'received' AND deferred_until > clock_timestamp()
"""
SKIP_VERSIONS: LiteralString = """
UPDATE model m
SET version = greatest(m.version, (SELECT max(v.version) FROM model_version v WHERE v.model_id = m.model_id))
        + %(lost)s::bigint,
    deferring = false, stable = NULL, canary_until = NULL, pinned = NULL
WHERE m.model_id = %(model_id)s::bigint
"""
LIST_UNCERTIFIED: LiteralString = """
SELECT t.request_id::text FROM request_target t
WHERE t.state = 'completed' AND t.outcome <> 'no_match'
  AND NOT EXISTS (SELECT FROM certificate c WHERE (c.request_id, c.model_id) = (t.request_id, t.model_id))
ORDER BY t.request_id
"""
LIST_KEYS: LiteralString = "SELECT prefix FROM api_key WHERE name = 'restored' AND revoked_at IS NULL ORDER BY prefix"


@dataclass(frozen=True, slots=True)
class KnownRecord:
    """A record's id and the generation that it came with."""

    record_id: UUID
    added: int


@dataclass(frozen=True, slots=True)
class _Ended:
    process_id: UUID
    model_id: int
    floor: int


def list_objects(connection: Connection, state: str) -> list[Object]:
    """Artefacts in a state."""
    with connection.cursor(row_factory=class_row(Object)) as cursor:
        return cursor.execute(LIST_OBJECTS, {"state": state}).fetchall()


def list_cells(connection: Connection) -> list[Cell]:
    """Every cell of every dataset."""
    with connection.cursor(row_factory=class_row(Cell)) as cursor:
        return cursor.execute(LIST_CELLS).fetchall()


def list_erased_records(connection: Connection, cell_id: int) -> set[UUID]:
    """Records of a cell whose payload was erased."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return set(cursor.execute(LIST_ERASED_RECORDS, {"cell_id": cell_id}).fetchall())


def find_digest(connection: Connection, object_name: str) -> str | None:
    """What an object's bytes must hash to; None for one without a row."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(FIND_DIGEST, {"object_name": object_name}).fetchone()


def list_records(connection: Connection, cell_id: int) -> list[KnownRecord]:
    """Records of a cell, in service or not, whose payload was not erased."""
    with connection.cursor(row_factory=class_row(KnownRecord)) as cursor:
        return cursor.execute(LIST_RECORDS, {"cell_id": cell_id}).fetchall()


def delete_records(connection: Connection, record_ids: Iterable[UUID]) -> None:
    """Forget records whose payloads are lost; they may be uploaded again."""
    connection.execute(DELETE_RECORDS, {"record_ids": list(record_ids)})


def list_readers(connection: Connection, cell_id: int, generation: int) -> list[str]:
    """Stages that read a cell as it was in that generation or later."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_READERS, {"cell_id": cell_id, "generation": generation}).fetchall()


def list_erased_in(connection: Connection) -> list[str]:
    """Stages whose lineage holds a record that is erased."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_ERASED_IN).fetchall()


def end_leases(connection: Connection) -> None:
    """End every process: none renews, and what comes back registers anew (rule 2)."""
    with connection.cursor(row_factory=class_row(_Ended)) as cursor:
        ended = cursor.execute(END_LEASES).fetchall()
    for each in ended:
        process_id = str(each.process_id)
        events.append(
            connection, EventKind.REPLICA_FENCED, model_id=each.model_id, process_id=process_id, floor=each.floor
        )


def longest_lease(connection: Connection) -> float:
    """The longest lease that any process was ever granted here, in seconds."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return (cursor.execute(LONGEST_LEASE).fetchone() or 0) / 1000


def skip_versions(connection: Connection, model_id: int, *, lost: int) -> None:
    """Leave out every version number that may have served, and all that stood between a stage and service.

    `lost`: leaves that are nowhere, of which each may have been a version.
    """
    at = {"model_id": model_id, "lost": lost}
    connection.execute(END_DEFERRALS, at)
    connection.execute(END_WAITING, at)
    connection.execute(SKIP_VERSIONS, at)


def list_uncertified(connection: Connection) -> list[str]:
    """Requests whose certificate's text is not here any more; its holders have it."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_UNCERTIFIED).fetchall()


def list_keys(connection: Connection) -> list[str]:
    """Prefixes of API keys whose secrets are lost."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_KEYS).fetchall()
