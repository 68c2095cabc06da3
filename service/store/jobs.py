"""Stage jobs: who trains which stage, under a token that fences zombies (protocol.md section 4)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import LiteralString

from psycopg.rows import class_row, scalar_row

from service.store.database import Connection, ask

INSERT: LiteralString = """
INSERT INTO stage_job (stage_key, model_id, work, queued_at)
VALUES (%(stage_key)s::text, %(model_id)s::bigint, %(work)s::float, clock_timestamp())
ON CONFLICT (stage_key) DO UPDATE
SET state = 'queued', attempts = 0, error = NULL, ended_at = NULL, queued_at = clock_timestamp(),
    token = stage_job.token + 1, work = excluded.work, started_at = NULL, platform = NULL
WHERE stage_job.state IN ('cancelled', 'failed', 'done')
"""
CLAIM: LiteralString = """
UPDATE stage_job
SET state = 'running', token = token + 1, attempts = attempts + 1, beat_at = clock_timestamp(),
    started_at = clock_timestamp()
WHERE stage_key = (
    SELECT j.stage_key
    FROM stage_job j
    JOIN stage s ON s.stage_key = j.stage_key
    WHERE j.state = 'queued'
      AND (j.attempts = 0  -- a disk that is full for a moment must not use up all attempts
           OR j.beat_at + make_interval(secs => least(power(4, j.attempts), 60)::float) < clock_timestamp())
      AND (s.parent IS NULL OR EXISTS (
          SELECT FROM artifact a WHERE a.stage_key = s.parent AND a.kind = 'stage' AND a.state = 'live'))
    ORDER BY (s.parent IS NOT DISTINCT FROM %(after)s::text AND s.parent IS NOT NULL) DESC,
             j.queued_at, s.shard, cardinality(s.prefix), s.stage_key
    LIMIT 1
    FOR UPDATE OF j SKIP LOCKED)
RETURNING stage_key, model_id, token, attempts
"""
BEAT: LiteralString = """
UPDATE stage_job SET beat_at = clock_timestamp()
WHERE stage_key = %(stage_key)s::text AND token = %(token)s::bigint AND state = 'running'
"""
LOCK_CLAIMED: LiteralString = """
SELECT stage_key FROM stage_job
WHERE stage_key = %(stage_key)s::text AND token = %(token)s::bigint AND state = 'running'
FOR UPDATE
"""
MARK_DONE: LiteralString = """
UPDATE stage_job SET state = 'done', ended_at = clock_timestamp(), platform = %(platform)s::text
WHERE stage_key = %(stage_key)s::text AND token = %(token)s::bigint AND state = 'running'
"""
MARK_TRIED: LiteralString = """
UPDATE stage_job
SET state = CASE WHEN attempts >= %(limit)s::int THEN 'failed'::job_state ELSE 'queued'::job_state END,
    error = %(error)s::text, token = token + 1,
    ended_at = CASE WHEN attempts >= %(limit)s::int THEN clock_timestamp() END
WHERE stage_key = %(stage_key)s::text AND token = %(token)s::bigint AND state = 'running'
RETURNING state, attempts
"""
CANCEL: LiteralString = """
UPDATE stage_job SET state = 'cancelled', token = token + 1, ended_at = clock_timestamp()
WHERE stage_key = ANY(%(stage_keys)s::text[]) AND state IN ('queued', 'running')
RETURNING stage_key
"""
FAIL_CHILDREN: LiteralString = """
WITH RECURSIVE below (stage_key) AS (
    SELECT s.stage_key FROM stage s WHERE s.parent = %(stage_key)s::text
    UNION ALL
    SELECT s.stage_key FROM stage s JOIN below b ON s.parent = b.stage_key)
UPDATE stage_job SET state = 'failed', error = 'ParentFailed', ended_at = clock_timestamp()
WHERE stage_key IN (SELECT stage_key FROM below) AND state = 'queued'
"""
LIST_STALLED: LiteralString = """
SELECT stage_key, model_id, token, attempts FROM stage_job
WHERE state = 'running' AND beat_at < clock_timestamp() - make_interval(secs => %(seconds)s::float)
ORDER BY stage_key
FOR UPDATE SKIP LOCKED
"""
COUNT_OPEN: LiteralString = """
SELECT count(*) FROM stage_job WHERE model_id = %(model_id)s::bigint AND state IN ('queued', 'running')
"""
# The median of the newest trainings, on the platform that trained last: one that was paused says nothing of the rest.
GET_SPEED: LiteralString = """
SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM n.ended_at - n.started_at) / n.work)::float
FROM (
    SELECT j.started_at, j.ended_at, j.work
    FROM stage_job j
    WHERE j.model_id = %(model_id)s::bigint AND j.state = 'done' AND j.work > 0 AND j.started_at IS NOT NULL
      AND j.platform = (
          SELECT l.platform FROM stage_job l
          WHERE l.model_id = %(model_id)s::bigint AND l.state = 'done' AND l.platform IS NOT NULL
          ORDER BY l.ended_at DESC LIMIT 1)
    ORDER BY j.ended_at DESC
    LIMIT 100) n
"""
SECONDS_PER_WORK = 2e-3
"""A guess until something was measured: one processor core and a backbone of 384 dimensions."""


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed job; only the holder of the newest token may publish."""

    stage_key: str
    model_id: int
    token: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Tried:
    """Where a job went after an attempt that failed."""

    state: str
    attempts: int


def insert_jobs(
    connection: Connection, model_id: int, stage_keys: Sequence[str], works: Mapping[str, float] | None = None
) -> None:
    """Queue stages in the order given, parents first; one that ended without a live artefact is queued again.

    `works` is each stage's work as the planner counts it, from which training speed is measured.
    """
    known = works or {}
    with connection.cursor() as cursor:
        cursor.executemany(
            INSERT, [{"stage_key": key, "model_id": model_id, "work": known.get(key)} for key in stage_keys]
        )


def claim_job(connection: Connection, *, after: str | None = None) -> Job | None:
    """The next job whose parent is live, a child of the stage `after` first: its features are at hand.

    Commit before the work: the attempt counts even if it kills its worker.
    """
    with connection.cursor(row_factory=class_row(Job)) as cursor:
        return cursor.execute(CLAIM, {"after": after}).fetchone()


def beat(connection: Connection, job: Job) -> bool:
    """Say that the job is alive; False when it was cancelled or given to another."""
    return connection.execute(BEAT, {"stage_key": job.stage_key, "token": job.token}).rowcount == 1


def lock_claimed(connection: Connection, job: Job) -> bool:
    """Lock the job for its publication; False when the token is not the newest any more."""
    return connection.execute(LOCK_CLAIMED, {"stage_key": job.stage_key, "token": job.token}).rowcount == 1


def mark_done(connection: Connection, job: Job, platform: str) -> None:
    """End a job whose stage was published in this transaction, trained on the platform of that fingerprint."""
    connection.execute(MARK_DONE, {"stage_key": job.stage_key, "token": job.token, "platform": platform})


def seconds_per_work(connection: Connection, model_id: int) -> float:
    """How long training takes for a unit of the planner's work, as measured on this model's newest stages."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(GET_SPEED, {"model_id": model_id}).fetchone() or SECONDS_PER_WORK


def mark_tried(connection: Connection, job: Job, error: str, *, limit: int) -> Tried | None:
    """Queue a failed attempt again, or end it as failed with all that stands on it; None: the job is not ours."""
    values = {"stage_key": job.stage_key, "token": job.token, "error": error, "limit": limit}
    with connection.cursor(row_factory=class_row(Tried)) as cursor:
        tried = cursor.execute(MARK_TRIED, values).fetchone()
    if tried and tried.state == "failed":
        connection.execute(FAIL_CHILDREN, {"stage_key": job.stage_key})
    return tried


def cancel(connection: Connection, stage_keys: Iterable[str]) -> list[str]:
    """Cancel open jobs on those keys; a trainer that is at it finds its token old (rule 22)."""
    return ask_cancel(connection, stage_keys)()


def ask_cancel(connection: Connection, stage_keys: Iterable[str]) -> Callable[[], list[str]]:
    """As `cancel`; see `database.ask`."""
    return ask(connection, CANCEL, {"stage_keys": sorted(stage_keys)}, scalar_row)


def list_stalled(connection: Connection, *, seconds: float) -> list[Job]:
    """Running jobs without a sign of life, locked."""
    with connection.cursor(row_factory=class_row(Job)) as cursor:
        return cursor.execute(LIST_STALLED, {"seconds": seconds}).fetchall()


def count_open(connection: Connection, model_id: int) -> int:
    """Jobs of the model that are queued or running."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(COUNT_OPEN, {"model_id": model_id}).fetchone() or 0
