"""Gates: assemblies that a rebuild brought, which may serve only after they were measured, tried, or allowed by hand.

What a gate or canary has not let in is `gated`, stage by stage, and a deactivation does without it: it waits for
nothing here. Every change is made under the model's lock.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, LiteralString

from psycopg.rows import class_row, scalar_row
from psycopg.types.json import Jsonb

from service.domain.release import Gate
from service.evidence.events import EventKind
from service.store import events, models, publish
from service.store.database import Connection
from service.store.models import Model
from service.store.publish import Candidate
from shards.assembly import Assembly

COLUMNS: LiteralString = """
    assembly, base, policy, state, score, base_score, rows, error, attempts, created_at, decided_at
"""
FIND: LiteralString = (
    "SELECT " + COLUMNS + " FROM gate WHERE model_id = %(model_id)s::bigint AND assembly = %(assembly)s::text"
)
LIST: LiteralString = (
    "SELECT "
    + COLUMNS
    + """
FROM gate WHERE model_id = %(model_id)s::bigint
ORDER BY created_at DESC, assembly
LIMIT %(limit)s::int
"""
)
CLAIM: LiteralString = (
    """
UPDATE gate SET attempts = attempts + 1, attempted_at = clock_timestamp()
WHERE model_id = %(model_id)s::bigint AND state = 'evaluating'
  AND (attempted_at IS NULL
       OR attempted_at + make_interval(secs => power(4, attempts)::float * 15) < clock_timestamp())
RETURNING """
    + COLUMNS
)
DROP_OPEN: LiteralString = """
DELETE FROM gate
WHERE model_id = %(model_id)s::bigint AND state = %(state)s::gate_state AND assembly <> %(but)s::text
"""
INSERT: LiteralString = """
INSERT INTO gate (model_id, assembly, base, policy, state)
VALUES (%(model_id)s::bigint, %(assembly)s::text, %(base)s::text, %(policy)s::jsonb, %(state)s::gate_state)
ON CONFLICT (model_id, assembly) DO UPDATE
SET base = excluded.base, policy = excluded.policy, state = excluded.state, score = NULL, base_score = NULL,
    rows = NULL, error = NULL, attempts = 0, attempted_at = NULL, created_at = excluded.created_at, decided_at = NULL
"""
MARK: LiteralString = """
UPDATE gate SET state = %(state)s::gate_state, decided_at = clock_timestamp()
WHERE model_id = %(model_id)s::bigint AND assembly = %(assembly)s::text
"""
MARK_MEASURED: LiteralString = """
UPDATE gate
SET score = %(score)s::float, base_score = %(base_score)s::float, rows = %(rows)s::int, error = %(error)s::text,
    policy = %(policy)s::jsonb
WHERE model_id = %(model_id)s::bigint AND assembly = %(assembly)s::text
"""
MARK_GATED: LiteralString = """
UPDATE stage SET gated = true
WHERE model_id = %(model_id)s::bigint AND stage_key = ANY(%(stage_keys)s::text[]) AND NOT gated
"""
LIST_OBJECTS: LiteralString = """
SELECT a.digest, min(a.object_name) AS object_name
FROM stage s JOIN artifact a ON a.stage_key = s.stage_key AND a.kind = 'stage' AND a.state = 'live'
WHERE s.model_id = %(model_id)s::bigint AND a.digest = ANY(%(digests)s::text[])
GROUP BY a.digest
"""
IS_EVALUATING: LiteralString = """
SELECT EXISTS (SELECT FROM gate WHERE model_id = %(model_id)s::bigint AND state = 'evaluating')
"""
LIST_TO_EVALUATE: LiteralString = """
SELECT model_id FROM gate
WHERE state = 'evaluating'
  AND (attempted_at IS NULL
       OR attempted_at + make_interval(secs => power(4, attempts)::float * 15) < clock_timestamp())
ORDER BY model_id
"""

NO_ASSEMBLY = ""
"""Digest of nothing."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One assembly at a model's gate."""

    assembly: str
    base: str | None
    """What served when it came."""
    policy: dict[str, Any] | None
    """The gate's bounds."""
    state: str
    score: float | None
    base_score: float | None
    rows: int | None
    error: str | None
    """Class of what kept it from being measured."""
    attempts: int
    created_at: datetime
    decided_at: datetime | None


@dataclass(frozen=True, slots=True)
class Score:
    """What was measured of an assembly, and of the one that it would take the place of."""

    score: float | None
    """None: it could not be measured, and `error` is the class of what happened."""
    base_score: float | None
    rows: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Object:
    digest: str
    object_name: str


def why_unmeasured(model: Model) -> str | None:
    """Why nothing can be measured of the model's assemblies; None where it can."""
    recipe = model.parsed_recipe
    if recipe.engine == "external":
        return "models of engine external are not evaluated here"
    if recipe.task == "completion":
        return "a completion is not right or wrong word by word: try new versions as a canary instead"
    if model.evaluation_id is None:
        return "the model has no evaluation dataset: declare one with deletable: false, and a model that names it"
    return None


def base_of(connection: Connection, model: Model) -> str | None:
    """Digest of what serves most requests now."""
    return models.find_served(connection, model.model_id, model.stable or model.version)


def find(connection: Connection, model_id: int, assembly: str) -> Trial | None:
    """What became of an assembly."""
    with connection.cursor(row_factory=class_row(Trial)) as cursor:
        return cursor.execute(FIND, {"model_id": model_id, "assembly": assembly}).fetchone()


def list_trials(connection: Connection, model_id: int, *, limit: int = 20) -> list[Trial]:
    """The newest first."""
    with connection.cursor(row_factory=class_row(Trial)) as cursor:
        return cursor.execute(LIST, {"model_id": model_id, "limit": limit}).fetchall()


def open_trial(connection: Connection, model: Model, found: Candidate, *, state: str) -> None:
    """Let the candidate wait for its evaluation, or be tried as the canary; it takes the place of an earlier one.

    The stages by which it differs from what serves are gated from now on, whenever they were trained.
    """
    digest, base = found.assembly.digest, base_of(connection, model)
    at = {"model_id": model.model_id, "assembly": digest, "state": state}
    connection.execute(DROP_OPEN, {**at, "but": digest})
    publish.insert_assembly(connection, found.assembly)
    if state == "evaluating" or not connection.execute(MARK, at).rowcount:  # a canary keeps what was measured
        connection.execute(INSERT, {**at, "base": base, "policy": _json(model.gate)})
    old = {member.stage for member in find_assembly(connection, base).members if member}
    new = {member.stage for member in found.assembly.members if member} - old
    connection.execute(MARK_GATED, {"model_id": model.model_id, "stage_keys": sorted(new)})


def claim(connection: Connection, model_id: int) -> Trial | None:
    """The assembly that waits for its evaluation; None where none does, or a worker is at it.

    Commit before the work: the attempt counts even if it kills its worker.
    """
    with connection.cursor(row_factory=class_row(Trial)) as cursor:
        return cursor.execute(CLAIM, {"model_id": model_id}).fetchone()


def is_evaluating(connection: Connection, model_id: int) -> bool:
    """Whether an assembly of the model waits for its evaluation."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return bool(cursor.execute(IS_EVALUATING, {"model_id": model_id}).fetchone())


def drop_evaluating(connection: Connection, model_id: int) -> None:
    """Forget what waits for its evaluation: it is not the candidate any more."""
    connection.execute(DROP_OPEN, {"model_id": model_id, "state": "evaluating", "but": NO_ASSEMBLY})


def judge(connection: Connection, model: Model, trial: Trial, found: Score) -> bool:
    """Record what was measured, and whether the assembly keeps the bounds of the locked model's gate."""
    gate = Gate.from_json(model.gate or {})
    passed = found.score is not None and gate.passes(found.score, found.base_score)
    at = {"model_id": model.model_id, "assembly": trial.assembly}
    measured: dict[str, Any] = asdict(found)
    connection.execute(MARK_MEASURED, {**at, **measured, "policy": _json(model.gate)})
    if not passed:
        connection.execute(MARK, {**at, "state": "refused"})
    events.append(
        connection,
        EventKind.VERSION_GATED,
        model_id=model.model_id,
        assembly=trial.assembly,
        base=trial.base,
        verdict="passed" if passed else "refused",
        **measured,
    )
    return passed


def mark(connection: Connection, model_id: int, assembly: str, state: str) -> None:
    """End an assembly's trial."""
    connection.execute(MARK, {"model_id": model_id, "assembly": assembly, "state": state})


def find_assembly(connection: Connection, digest: str | None) -> Assembly:
    """An assembly by digest; one without members for None."""
    body = None if digest is None else publish.find_body(connection, digest)
    return Assembly("", ()) if body is None else Assembly.from_json(body)


def list_objects(connection: Connection, model_id: int, digests: Iterable[str]) -> dict[str, str]:
    """Object name of each live artefact by digest."""
    values = {"model_id": model_id, "digests": sorted(digests)}
    with connection.cursor(row_factory=class_row(_Object)) as cursor:
        return {row.digest: row.object_name for row in cursor.execute(LIST_OBJECTS, values)}


def list_to_evaluate(connection: Connection) -> list[int]:
    """Models with an assembly that waits for its evaluation."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_TO_EVALUATE).fetchall()


def _json(body: dict[str, Any] | None) -> Jsonb | None:
    return None if body is None else Jsonb(body)
