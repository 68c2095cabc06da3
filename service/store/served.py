"""What is served, stage by stage, with the platforms: which stages today's machines could train again."""

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import LiteralString

from psycopg.rows import class_row

from service.store.database import Connection

SERVED: LiteralString = """
    SELECT m.model_id, e.member ->> 'stage' AS leaf, e.member ->> 'stage' AS stage_key,
           e.member -> 'artifacts' AS digests, jsonb_array_length(e.member -> 'artifacts') AS depth
    FROM model m
    JOIN model_version v ON v.model_id = m.model_id AND v.version = m.version
    JOIN assembly b ON b.digest = v.assembly
    CROSS JOIN jsonb_array_elements(b.body -> 'members') e (member)
    WHERE jsonb_typeof(e.member) = 'object'
    UNION ALL
    SELECT l.model_id, l.leaf, s.parent, l.digests, l.depth - 1
    FROM line l JOIN stage s ON s.stage_key = l.stage_key
    WHERE l.depth > 1
"""
LIST_SERVED: LiteralString = (
    "WITH RECURSIVE line AS ("
    + SERVED
    + """)
SELECT l.leaf, l.stage_key, l.depth, s.shard, s.prefix, a.digest, a.fingerprint, p.body AS platform, a.host,
       a.created_at < current_date AS settled
FROM line l
JOIN stage s ON s.stage_key = l.stage_key
JOIN artifact a ON a.stage_key = l.stage_key AND a.kind = 'stage' AND a.state = 'live'
     AND a.digest = l.digests ->> (l.depth - 1)
JOIN platform p ON p.fingerprint = a.fingerprint
WHERE l.model_id = %(model_id)s::bigint
ORDER BY s.shard, l.leaf, l.depth, a.fingerprint
"""
)
LIST_PLATFORMS: LiteralString = """
SELECT a.stage_key, a.digest, p.body AS platform
FROM artifact a JOIN platform p ON p.fingerprint = a.fingerprint
WHERE a.stage_key = ANY(%(stage_keys)s::text[]) AND a.kind = 'stage' AND a.state = 'live'
ORDER BY a.stage_key, a.fingerprint
"""
SHARES: LiteralString = (
    "WITH RECURSIVE line AS ("
    + SERVED
    + """)
SELECT m.name AS model, count(*) AS served,
       count(*) FILTER (WHERE EXISTS (
           SELECT FROM artifact a JOIN machine h ON h.model_id = l.model_id AND h.fingerprint = a.fingerprint
           WHERE a.stage_key = l.stage_key AND a.kind = 'stage' AND a.state = 'live'
             AND a.digest = l.digests ->> (l.depth - 1)
             AND h.seen_at > clock_timestamp() - interval '7 days')) AS replayable
FROM line l JOIN model m ON m.model_id = l.model_id
WHERE EXISTS (SELECT FROM machine h
              WHERE h.model_id = l.model_id AND h.seen_at > clock_timestamp() - interval '7 days')
GROUP BY m.name
ORDER BY m.name
"""
)
MARK_SEEN: LiteralString = """
INSERT INTO machine (model_id, host, fingerprint)
SELECT s.model_id, %(host)s::text, %(fingerprint)s::text FROM stage s WHERE s.stage_key = %(stage_key)s::text
ON CONFLICT (model_id, host) DO UPDATE SET fingerprint = excluded.fingerprint, seen_at = excluded.seen_at
"""


@dataclass(frozen=True, slots=True)
class ServedStage:
    """A stage whose weights are in the served version: one that speaks for a shard, or one that it stands on."""

    leaf: str
    """Key of the stage that speaks for the shard."""
    stage_key: str
    depth: int
    shard: int
    prefix: list[int]
    digest: str
    fingerprint: str
    platform: dict[str, str]
    host: str | None
    settled: bool
    """Made before today: one made today was trained only just now."""


@dataclass(frozen=True, slots=True)
class MadeOn:
    """A live artefact and the platform that it was made on."""

    stage_key: str
    digest: str
    platform: dict[str, str]


@dataclass(frozen=True, slots=True)
class Share:
    """How many of a model's served stages a machine seen lately could train again to the same bits."""

    model: str
    served: int
    replayable: int


def list_served(connection: Connection, model_id: int) -> list[ServedStage]:
    """The served stages of a model, each line from its first; one trained on two platforms to the same bits twice."""
    with connection.cursor(row_factory=class_row(ServedStage)) as cursor:
        return cursor.execute(LIST_SERVED, {"model_id": model_id}).fetchall()


def list_platforms(connection: Connection, stage_keys: Iterable[str]) -> list[MadeOn]:
    """The live artefacts of these stages."""
    with connection.cursor(row_factory=class_row(MadeOn)) as cursor:
        return cursor.execute(LIST_PLATFORMS, {"stage_keys": list(stage_keys)}).fetchall()


def mark_seen(connection: Connection, stage_key: str, fingerprint: str) -> None:
    """This machine has trained a stage of the model on that platform just now."""
    values = {"stage_key": stage_key, "fingerprint": fingerprint, "host": socket.gethostname()}
    connection.execute(MARK_SEEN, values)


def list_shares(connection: Connection) -> list[Share]:
    """Per model whose training machines were seen within a week."""
    with connection.cursor(row_factory=class_row(Share)) as cursor:
        return cursor.execute(SHARES).fetchall()
