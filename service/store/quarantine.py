"""Quarantine: artefacts that leave service as evidence. Nobody opens them; only an erasure destroys them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString

from psycopg.rows import class_row, scalar_row

from service.evidence.events import EventKind
from service.store import events
from service.store.database import Connection

# By digest and not by key alone: where two platforms trained one stage, the other one's children stay.
QUARANTINE: LiteralString = """
WITH RECURSIVE below (stage_key, fingerprint, digest) AS (
    SELECT a.stage_key, a.fingerprint, a.digest FROM artifact a
    WHERE a.stage_key = %(stage_key)s::text AND a.kind = 'stage' AND a.digest = %(digest)s::text
      AND a.state IN ('live', 'lost')
    UNION
    SELECT a.stage_key, a.fingerprint, a.digest
    FROM below b
    JOIN stage s ON s.parent = b.stage_key
    JOIN artifact a ON a.stage_key = s.stage_key AND a.kind = 'stage' AND a.state = 'live'
         AND a.parent_digest = b.digest)
UPDATE artifact a SET state = 'quarantined'
FROM below b
WHERE a.stage_key = b.stage_key AND a.fingerprint = b.fingerprint
  AND (a.state = 'live' OR a.state = 'lost' AND a.kind = 'stage')
RETURNING a.object_name, a.digest, a.stage_key
"""
KEEP: LiteralString = """
UPDATE artifact SET state = 'quarantined'
WHERE object_name = ANY(%(object_names)s::text[]) AND state = 'writing'
RETURNING object_name, digest, stage_key
"""
LIST_BELOW: LiteralString = """
WITH RECURSIVE below (stage_key) AS (
    SELECT %(stage_key)s::text
    UNION
    SELECT s.stage_key FROM below b JOIN stage s ON s.parent = b.stage_key)
SELECT stage_key FROM below ORDER BY stage_key
"""
LIST_DIGESTS: LiteralString = """
SELECT a.digest FROM artifact a
WHERE a.stage_key = %(stage_key)s::text AND a.kind = 'stage' AND a.fingerprint = %(fingerprint)s::text
  AND a.state = 'quarantined'
  AND EXISTS (  -- what stood on a wrong stage was not wrong itself
      SELECT FROM replay r
      WHERE r.model_id = %(model_id)s::bigint AND r.differs_at = a.stage_key AND r.released_at IS NULL)
"""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An artefact that left service."""

    object_name: str
    digest: str
    stage_key: str


def quarantine(connection: Connection, model_id: int, stage_key: str, digest: str) -> list[Quarantined]:
    """Take the stage's artefact of that digest out of service with all that was trained on it; record each.

    Derived artefacts go with their stages. Nothing is destroyed. The model must be locked.
    """
    with connection.cursor(row_factory=class_row(Quarantined)) as cursor:
        found = cursor.execute(QUARANTINE, {"stage_key": stage_key, "digest": digest}).fetchall()
    _tell(connection, model_id, found)
    return found


def keep(connection: Connection, model_id: int, object_names: Sequence[str]) -> None:
    """Let what was written never serve, and stay as evidence; record each."""
    with connection.cursor(row_factory=class_row(Quarantined)) as cursor:
        found = cursor.execute(KEEP, {"object_names": list(object_names)}).fetchall()
    _tell(connection, model_id, found)


def list_below(connection: Connection, stage_key: str) -> list[str]:
    """The stage and all that stand on it, whatever became of them."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_BELOW, {"stage_key": stage_key}).fetchall()


def list_digests(connection: Connection, model_id: int, stage_key: str, fingerprint: str) -> list[str]:
    """Digests that a replay, or another training, refuted for the stage on that platform.

    They may not come back before an operator's release; where they are two, neither may any other.
    """
    values = {"model_id": model_id, "stage_key": stage_key, "fingerprint": fingerprint}
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_DIGESTS, values).fetchall()


def _tell(connection: Connection, model_id: int, found: Sequence[Quarantined]) -> None:
    for each in found:
        events.append(
            connection,
            EventKind.ARTIFACT_QUARANTINED,
            model_id=model_id,
            object_name=each.object_name,
            digest=each.digest,
        )
