"""Rows of artefacts: writing, live, doomed, destroyed, quarantined (rules 18, 20, 22). Bytes are in `artifacts`."""

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString

from psycopg.rows import class_row, scalar_row
from psycopg.types.json import Jsonb

from service.evidence.events import EventKind
from service.store import events, served
from service.store.database import Connection

INSERT: LiteralString = """
INSERT INTO artifact (object_name, kind, stage_key, cell_id, fingerprint, parent_digest, digest, bytes, host)
VALUES (%(object_name)s::text, %(kind)s::artifact_kind, %(stage_key)s::text, %(cell_id)s::bigint, %(fingerprint)s::text,
        %(parent_digest)s::text, %(digest)s::text, %(bytes)s::bigint, %(host)s::text)
"""
INSERT_PLATFORM: LiteralString = """
INSERT INTO platform (fingerprint, body) VALUES (%(fingerprint)s::text, %(body)s::jsonb) ON CONFLICT DO NOTHING
"""
MARK_LIVE: LiteralString = """
UPDATE artifact SET state = 'live'
WHERE object_name = ANY(%(object_names)s::text[]) AND state = 'writing'
"""
LIST_MADE: LiteralString = """
SELECT a.digest, a.state = 'live' AS live
FROM artifact n
JOIN artifact a ON a.stage_key = n.stage_key AND a.fingerprint = n.fingerprint AND a.kind = 'stage'
     AND a.state IN ('live', 'lost') AND a.parent_digest IS NOT DISTINCT FROM n.parent_digest
WHERE n.object_name = %(object_name)s::text
ORDER BY a.digest, a.object_name
"""
DOOM: LiteralString = """
UPDATE artifact SET state = 'doomed', doomed_at = clock_timestamp()
WHERE object_name = ANY(%(object_names)s::text[]) AND state IN ('writing', 'live')
RETURNING object_name, digest, stage_key, cell_id
"""
DOOM_REPLACED: LiteralString = """
UPDATE artifact SET state = 'doomed', doomed_at = clock_timestamp()
WHERE cell_id = %(cell_id)s::bigint AND state IN ('writing', 'live') AND object_name IS DISTINCT FROM %(kept)s::text
RETURNING object_name, digest, stage_key, cell_id
"""
# Of a stage whose parent was lost and trained again on another platform, to another digest.
DOOM_ORPHANS: LiteralString = """
UPDATE artifact a SET state = 'doomed', doomed_at = clock_timestamp()
FROM artifact n
JOIN artifact o ON o.stage_key = n.stage_key AND o.fingerprint = n.fingerprint AND o.kind = 'stage'
     AND o.state = 'live' AND o.parent_digest IS DISTINCT FROM n.parent_digest
WHERE n.object_name = %(object_name)s::text
  AND a.stage_key = o.stage_key AND a.fingerprint = o.fingerprint AND a.state = 'live'
RETURNING a.object_name, a.digest, a.stage_key, a.cell_id
"""
DOOM_STAGES: LiteralString = """
UPDATE artifact SET state = 'doomed', doomed_at = clock_timestamp()
WHERE stage_key = ANY(%(stage_keys)s::text[]) AND state IN ('writing', 'live', 'lost', 'quarantined')
RETURNING object_name, digest, stage_key, cell_id
"""
DOOM_ABANDONED: LiteralString = """
UPDATE artifact a SET state = 'doomed', doomed_at = clock_timestamp()
WHERE a.state = 'writing' AND a.created_at < clock_timestamp() - make_interval(secs => %(seconds)s::float)
  AND NOT EXISTS (SELECT FROM stage_job j WHERE j.stage_key = a.stage_key AND j.state = 'running')
RETURNING object_name, digest, stage_key, cell_id
"""
LIST_DOOMED: LiteralString = """
SELECT object_name, digest, stage_key, cell_id FROM artifact
WHERE state = 'doomed' AND (%(stage_keys)s::text[] IS NULL OR stage_key = ANY(%(stage_keys)s::text[]))
ORDER BY object_name
LIMIT %(limit)s::int
"""
MARK_DESTROYED: LiteralString = """
UPDATE artifact
SET state = 'destroyed', destroyed_at = %(destroyed_at)s::timestamptz, checked_at = %(absent_at)s::timestamptz
WHERE object_name = %(object_name)s::text AND state = 'doomed'
RETURNING object_name
"""
LIST_SWEEPS: LiteralString = """
SELECT object_name, digest, stage_key, cell_id FROM artifact
WHERE state = 'destroyed' AND sweeps < 3 AND (
      (sweeps = 0 AND destroyed_at < clock_timestamp() - interval '1 minute')
   OR (sweeps = 1 AND destroyed_at < clock_timestamp() - interval '1 hour')
   OR (sweeps = 2 AND destroyed_at < clock_timestamp() - interval '1 day'))
ORDER BY object_name
LIMIT %(limit)s::int
"""
MARK_SWEPT: LiteralString = """
UPDATE artifact SET sweeps = sweeps + 1, checked_at = clock_timestamp()
WHERE object_name = %(object_name)s::text AND state = 'destroyed'
"""
MARK_ABSENT: LiteralString = """
UPDATE artifact SET checked_at = %(absent_at)s::timestamptz
WHERE object_name = ANY(%(object_names)s::text[]) AND state = 'destroyed'
"""
FIND_LIVE: LiteralString = """
SELECT object_name, digest, stage_key, cell_id FROM artifact
WHERE stage_key = ANY(%(stage_keys)s::text[]) AND kind = %(kind)s::artifact_kind AND state = 'live'
ORDER BY stage_key, digest, object_name
"""
MARK_LOST: LiteralString = """
UPDATE artifact SET state = 'lost' WHERE object_name = %(object_name)s::text AND state = 'live'
RETURNING object_name
"""
LIST_NAMES: LiteralString = "SELECT object_name FROM artifact WHERE state <> 'destroyed'"


@dataclass(frozen=True, slots=True)
class Object:
    """An artefact's row, as far as moving and destroying it needs."""

    object_name: str
    digest: str | None
    stage_key: str | None
    cell_id: int | None


@dataclass(frozen=True, slots=True)
class Made:
    """What training a stage gave before."""

    digest: str
    live: bool
    """False: its file is lost."""


def insert_writing(
    connection: Connection,
    object_name: str,
    *,
    kind: str,
    digest: str,
    size: int,
    stage_key: str | None = None,
    cell_id: int | None = None,
    fingerprint: str | None = None,
    parent_digest: str | None = None,
) -> None:
    """The intent to write an object; commit it before the first byte moves (rule 20)."""
    values = {
        "object_name": object_name,
        "kind": kind,
        "stage_key": stage_key,
        "cell_id": cell_id,
        "fingerprint": fingerprint,
        "parent_digest": parent_digest,
        "digest": digest,
        "bytes": size,
        "host": socket.gethostname(),
    }
    connection.execute(INSERT, values)
    if kind == "stage" and stage_key and fingerprint:
        served.mark_seen(connection, stage_key, fingerprint)


def insert_platform(connection: Connection, fingerprint: str, body: dict[str, Any]) -> None:
    """What a fingerprint stands for."""
    connection.execute(INSERT_PLATFORM, {"fingerprint": fingerprint, "body": Jsonb(body)})


def mark_live(connection: Connection, object_names: Sequence[str]) -> bool:
    """Objects may be opened from now on; False when one of them was doomed meanwhile (rule 21)."""
    return connection.execute(MARK_LIVE, {"object_names": list(object_names)}).rowcount == len(object_names)


def list_made(connection: Connection, object_name: str) -> list[Made]:
    """What training the stage of a written object gave before on its platform and parent: the same, or it is broken."""
    with connection.cursor(row_factory=class_row(Made)) as cursor:
        return cursor.execute(LIST_MADE, {"object_name": object_name}).fetchall()


def doom(connection: Connection, object_names: Iterable[str], **about: Any) -> list[Object]:
    """Nobody may open these any more; a reaper destroys them if the caller dies."""
    return _doomed(connection, DOOM, {"object_names": list(object_names)}, **about)


def doom_replaced(connection: Connection, cell_id: int, *, kept: str | None, **about: Any) -> list[Object]:
    """Doom every file of a locked cell but the one it points at now: those being written have lost their race."""
    return _doomed(connection, DOOM_REPLACED, {"cell_id": cell_id, "kept": kept}, **about)


def doom_orphans(connection: Connection, object_name: str, **about: Any) -> list[Object]:
    """Doom what the written object of a stage replaces: its platform's live artefact that stands on another parent."""
    return _doomed(connection, DOOM_ORPHANS, {"object_name": object_name}, **about)


def doom_stages(connection: Connection, stage_keys: Iterable[str], **about: Any) -> list[Object]:
    """Doom every artefact of these stages: weights and what was derived from them."""
    return _doomed(connection, DOOM_STAGES, {"stage_keys": list(stage_keys)}, **about)


def doom_abandoned(connection: Connection, *, seconds: float) -> list[Object]:
    """Doom objects whose writer began long ago and is not at work any more."""
    return _doomed(connection, DOOM_ABANDONED, {"seconds": seconds})


def list_doomed(connection: Connection, stage_keys: Iterable[str] | None = None, *, limit: int = 1000) -> list[Object]:
    """Objects to destroy, of these stages or all."""
    keys = None if stage_keys is None else list(stage_keys)
    with connection.cursor(row_factory=class_row(Object)) as cursor:
        return cursor.execute(LIST_DOOMED, {"stage_keys": keys, "limit": limit}).fetchall()


def mark_destroyed(
    connection: Connection, found: Object, *, destroyed_at: object, absent_at: object, **about: Any
) -> None:
    """Record that the object was deleted, and that a look at `absent_at` found it absent."""
    values = {"object_name": found.object_name, "destroyed_at": destroyed_at, "absent_at": absent_at}
    if connection.execute(MARK_DESTROYED, values).fetchone():
        events.append(
            connection,
            EventKind.ARTIFACT_DESTROYED,
            object_name=found.object_name,
            digest=found.digest,
            absent_at=str(absent_at),
            **about,
        )


def list_sweeps(connection: Connection, *, limit: int = 200) -> list[Object]:
    """Destroyed objects to look at again: a paused writer may have uploaded late (rule 22)."""
    with connection.cursor(row_factory=class_row(Object)) as cursor:
        return cursor.execute(LIST_SWEEPS, {"limit": limit}).fetchall()


def mark_swept(connection: Connection, object_name: str) -> None:
    """The object was looked for again and is absent."""
    connection.execute(MARK_SWEPT, {"object_name": object_name})


def mark_absent(connection: Connection, object_names: Sequence[str], absent_at: object) -> None:
    """Destroyed objects were looked for again, after this time, and were absent."""
    connection.execute(MARK_ABSENT, {"object_names": list(object_names), "absent_at": absent_at})


def list_live(connection: Connection, stage_keys: Iterable[str], *, kind: str) -> list[Object]:
    """Live artefacts of one kind of these stages."""
    with connection.cursor(row_factory=class_row(Object)) as cursor:
        return cursor.execute(FIND_LIVE, {"stage_keys": list(stage_keys), "kind": kind}).fetchall()


def mark_lost(connection: Connection, found: Object) -> None:
    """A live object is not there: its stage is unusable and must be trained again (rule 20)."""
    if connection.execute(MARK_LOST, {"object_name": found.object_name}).rowcount:
        events.append(connection, EventKind.ARTIFACT_LOST, object_name=found.object_name, digest=found.digest)


def list_names(connection: Connection) -> set[str]:
    """Names of all objects that may lawfully be there."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return set(cursor.execute(LIST_NAMES).fetchall())


def _doomed(connection: Connection, query: LiteralString, values: dict[str, Any], **about: Any) -> list[Object]:
    with connection.cursor(row_factory=class_row(Object)) as cursor:
        found = cursor.execute(query, values).fetchall()
    for each in found:
        events.append(connection, EventKind.ARTIFACT_DOOMED, object_name=each.object_name, digest=each.digest, **about)
    return found
