"""Replays: who trains a drawn stage again, and what came of it. `draws` draws them."""

from dataclasses import dataclass
from datetime import date, datetime
from typing import LiteralString

from psycopg.rows import class_row, scalar_row

from service.domain.errors import NotFoundError
from service.domain.replays import ReplayOutcome
from service.evidence.events import EventKind
from service.store import events, models
from service.store.database import Connection

COUNT_OUTCOMES: LiteralString = """
SELECT outcome, count(*) AS replays FROM replay WHERE outcome IS NOT NULL GROUP BY outcome ORDER BY outcome
"""
# Capacity first: stages that wait for their training have the workers to themselves for some hours.
LIST_DUE: LiteralString = """
SELECT r.replay_id FROM replay r
WHERE r.outcome IS NULL AND r.due_at <= clock_timestamp()
  AND (r.drawn_at < clock_timestamp() - interval '6 hours'
       OR NOT EXISTS (SELECT FROM stage_job j WHERE j.state = 'queued'))
ORDER BY r.replay_id
LIMIT 100
"""
# For an hour only another machine of the artefact's platform may take it, where one was seen lately.
CLAIM: LiteralString = """
UPDATE replay SET token = token + 1, attempts = attempts + 1, host = %(host)s::text,
       started_at = clock_timestamp(), due_at = clock_timestamp() + make_interval(secs => %(seconds)s::float)
WHERE replay_id = (
    SELECT r.replay_id FROM replay r
    WHERE r.replay_id = %(replay_id)s::bigint AND r.outcome IS NULL AND r.due_at <= clock_timestamp()
      AND (r.made_by IS DISTINCT FROM %(host)s::text OR r.drawn_at < clock_timestamp() - interval '1 hour'
           OR NOT EXISTS (
               SELECT FROM machine h
               WHERE h.model_id = r.model_id AND h.fingerprint = r.fingerprint AND h.host <> %(host)s::text
                 AND h.seen_at > clock_timestamp() - interval '7 days'))
    FOR UPDATE SKIP LOCKED)
RETURNING replay_id, model_id, stage_key, digest, fingerprint, token, attempts, reason
"""
GET_CLAIMED: LiteralString = """
SELECT replay_id, model_id, stage_key, digest, fingerprint, token, attempts, reason FROM replay
WHERE replay_id = %(replay_id)s::bigint AND token = %(token)s::bigint AND outcome IS NULL
"""
LOCK_CLAIMED: LiteralString = GET_CLAIMED + " FOR UPDATE"
BEAT: LiteralString = """
UPDATE replay SET due_at = clock_timestamp() + make_interval(secs => %(seconds)s::float)
WHERE replay_id = %(replay_id)s::bigint AND token = %(token)s::bigint AND outcome IS NULL
"""
POSTPONE: LiteralString = """
UPDATE replay SET token = token + 1, reason = %(reason)s::text,
       due_at = clock_timestamp() + make_interval(mins => least(power(4, attempts), 60)::int)
WHERE replay_id = %(replay_id)s::bigint AND token = %(token)s::bigint AND outcome IS NULL
"""
LIST_HOPELESS: LiteralString = """
SELECT replay_id, model_id, stage_key, digest, fingerprint, token, attempts, reason FROM replay
WHERE outcome IS NULL AND attempts >= %(limit)s::int AND due_at <= clock_timestamp()
ORDER BY replay_id
FOR UPDATE SKIP LOCKED
"""
MARK_ENDED: LiteralString = """
UPDATE replay SET outcome = %(outcome)s::replay_outcome, found = %(found)s::text,
       differs_at = %(differs_at)s::text, platform = %(platform)s::text,
       reason = %(reason)s::text, ended_at = clock_timestamp()
WHERE replay_id = %(replay_id)s::bigint AND token = %(token)s::bigint AND outcome IS NULL
"""
INSERT_CONTRADICTED: LiteralString = """
INSERT INTO replay (model_id, stage_key, digest, found, differs_at, fingerprint, platform, drawn_on, outcome,
                    started_at, ended_at)  -- of one that is drawn today whoever is at it finds its token old
VALUES (%(model_id)s::bigint, %(stage_key)s::text, %(digest)s::text, %(found)s::text, %(stage_key)s::text,
        %(fingerprint)s::text, %(fingerprint)s::text, current_date, 'mismatch', clock_timestamp(), clock_timestamp())
ON CONFLICT (model_id, drawn_on, stage_key) WHERE challenge_id IS NULL DO UPDATE
SET digest = EXCLUDED.digest, found = EXCLUDED.found, differs_at = EXCLUDED.differs_at,
    fingerprint = EXCLUDED.fingerprint, platform = EXCLUDED.platform, outcome = EXCLUDED.outcome, reason = NULL,
    ended_at = EXCLUDED.ended_at, released_at = NULL, token = replay.token + 1, attempts = greatest(replay.attempts, 1)
"""
RELEASE: LiteralString = """
UPDATE replay SET released_at = clock_timestamp()
WHERE replay_id = %(replay_id)s::bigint AND model_id = %(model_id)s::bigint AND outcome = 'mismatch'
  AND released_at IS NULL
RETURNING differs_at
"""
LIST: LiteralString = """
SELECT r.replay_id, r.stage_key, r.digest, r.found, r.differs_at, r.outcome, r.reason, r.fingerprint, r.platform,
       r.drawn_on, r.started_at, r.ended_at, r.released_at, a.body AS made_on, b.body AS replayed_on
FROM replay r
JOIN platform a ON a.fingerprint = r.fingerprint
LEFT JOIN platform b ON b.fingerprint = r.platform
WHERE r.model_id = %(model_id)s::bigint
ORDER BY r.replay_id DESC
LIMIT %(limit)s::int
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """A replay in a worker's hands; only the holder of the newest token may end it."""

    replay_id: int
    model_id: int
    stage_key: str
    digest: str
    fingerprint: str
    token: int
    attempts: int
    reason: str | None
    """Class of the error of the last attempt."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A replay's row, with both platforms."""

    replay_id: int
    stage_key: str
    digest: str
    found: str | None
    differs_at: str | None
    """The first stage of its line that differs; `found` is then of that one."""
    outcome: str | None
    reason: str | None
    fingerprint: str
    platform: str | None
    drawn_on: date
    started_at: datetime | None
    ended_at: datetime | None
    released_at: datetime | None
    made_on: dict[str, str]
    replayed_on: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class OutcomeCount:
    """How many replays ended so."""

    outcome: str
    replays: int


def list_due(connection: Connection) -> list[int]:
    """Replays that a worker may take now."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_DUE).fetchall()


def claim_replay(connection: Connection, replay_id: int, *, host: str, seconds: float) -> Claim | None:
    """Take a replay for `seconds`, or until the next beat; None where it is not this host's turn."""
    values = {"replay_id": replay_id, "host": host, "seconds": seconds}
    with connection.cursor(row_factory=class_row(Claim)) as cursor:
        return cursor.execute(CLAIM, values).fetchone()


def get_claimed(connection: Connection, replay_id: int, token: int, *, lock: bool = False) -> Claim | None:
    """The claimed replay, locked if asked; None when the token is not the newest any more."""
    values = {"replay_id": replay_id, "token": token}
    with connection.cursor(row_factory=class_row(Claim)) as cursor:
        return cursor.execute(LOCK_CLAIMED if lock else GET_CLAIMED, values).fetchone()


def beat(connection: Connection, claim: Claim, *, seconds: float) -> bool:
    """Keep the replay for `seconds` more; False when it has ended or another has it."""
    values = {"replay_id": claim.replay_id, "token": claim.token, "seconds": seconds}
    return connection.execute(BEAT, values).rowcount == 1


def postpone(connection: Connection, claim: Claim, reason: str) -> None:
    """Give the replay back for a later attempt, at a growing distance; nothing if it has ended."""
    values = {"replay_id": claim.replay_id, "token": claim.token, "reason": reason}
    connection.execute(POSTPONE, values)


def list_hopeless(connection: Connection, *, limit: int) -> list[Claim]:
    """Replays tried `limit` times that nobody is at any more, locked."""
    with connection.cursor(row_factory=class_row(Claim)) as cursor:
        return cursor.execute(LIST_HOPELESS, {"limit": limit}).fetchall()


def mark_ended(
    connection: Connection,
    claim: Claim,
    outcome: ReplayOutcome,
    *,
    found: str | None = None,
    differs_at: str | None = None,
    platform: str | None = None,
    reason: str | None = None,
) -> bool:
    """End a replay; False when it has ended or another has it."""
    values = {
        "replay_id": claim.replay_id,
        "token": claim.token,
        "outcome": outcome.value,
        "found": found,
        "differs_at": differs_at,
        "platform": platform,
        "reason": reason,
    }
    return connection.execute(MARK_ENDED, values).rowcount == 1


def insert_contradicted(
    connection: Connection, model_id: int, stage_key: str, *, digest: str, found: str, fingerprint: str
) -> None:
    """Note a training that gave another digest than one before on the same platform: a replay that nobody drew."""
    values = {
        "model_id": model_id,
        "stage_key": stage_key,
        "digest": digest,
        "found": found,
        "fingerprint": fingerprint,
    }
    connection.execute(INSERT_CONTRADICTED, values)


def release(connection: Connection, model_id: int, replay_id: int, actor: str) -> None:
    """Take a mismatch back, for the replay was at fault: the stage is trained again, to whatever digest that gives.

    What was taken out of service stays in quarantine.

    Raises:
        NotFoundError: the model has no such replay with an open mismatch.
    """
    models.lock_model(connection, model_id)
    with connection.cursor(row_factory=scalar_row) as cursor:
        stage: str | None = cursor.execute(RELEASE, {"replay_id": replay_id, "model_id": model_id}).fetchone()
    if stage is None:
        raise NotFoundError("the model has no such replay with a mismatch to release; GET its /replays lists them")
    events.append(
        connection,
        EventKind.STAGE_REPLAY_RELEASED,
        model_id=model_id,
        stage=stage,
        replay=replay_id,
        actor=actor,
    )
    models.mark_rebuild_wanted(connection, model_id)


def list_replays(connection: Connection, model_id: int, *, limit: int = 100) -> list[Replay]:
    """The newest replays of a model first."""
    with connection.cursor(row_factory=class_row(Replay)) as cursor:
        return cursor.execute(LIST, {"model_id": model_id, "limit": limit}).fetchall()


def count_outcomes(connection: Connection) -> list[OutcomeCount]:
    """Ended replays by outcome."""
    with connection.cursor(row_factory=class_row(OutcomeCount)) as cursor:
        return cursor.execute(COUNT_OUTCOMES).fetchall()
