"""Models and their versions: `version`, `floor` and `cleared` only grow (rule 1)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row
from psycopg.types.json import Jsonb

from service.domain.answers import Answers
from service.domain.errors import NotFoundError
from service.store.database import Connection, ask
from shards.rebuild import Policy
from shards.recipe import Recipe

NOW = Policy()
"""Unless told otherwise, what is missing is trained at once."""

COLUMNS: LiteralString = """
    model_id, name, dataset_id, evaluation_id, recipe, recipe_digest, version, floor, cleared, erase_after,
    rebuild_wanted, building, extract(epoch FROM clock_timestamp() - published_at)::float AS deactivated_ago,
    rebuild_policy, rebuild_forced, rebuild_due, rebuild_at, deferring, reproducible, min_shards,
    gate, canary, stable, canary_until, pinned, answers
"""
FIND: LiteralString = "SELECT " + COLUMNS + " FROM model WHERE name = %(name)s::text"
GET: LiteralString = "SELECT " + COLUMNS + " FROM model WHERE model_id = %(model_id)s::bigint"
LOCK: LiteralString = GET + " FOR NO KEY UPDATE"
LOCK_SHARED: LiteralString = GET + " FOR SHARE"
LIST: LiteralString = "SELECT " + COLUMNS + " FROM model ORDER BY model_id"
INSERT: LiteralString = """
INSERT INTO model (name, dataset_id, evaluation_id, recipe, recipe_digest, erase_after, rebuild_policy, min_shards,
                   answers)
VALUES (%(name)s::text, %(dataset_id)s::uuid, %(evaluation_id)s::uuid, %(recipe)s::jsonb, %(recipe_digest)s::text,
        %(erase_after)s::interval, %(rebuild_policy)s::jsonb, %(min_shards)s::int, %(answers)s::text)
RETURNING model_id
"""
LIST_VERSIONS: LiteralString = """
SELECT v.version, v.assembly, v.cause, v.canonical, v.created_at, a.body
FROM model_version v JOIN assembly a ON a.digest = v.assembly
WHERE v.model_id = %(model_id)s::bigint
ORDER BY v.version DESC
LIMIT %(limit)s::int
"""
FIND_VERSION: LiteralString = """
SELECT v.version, v.assembly, v.cause, v.canonical, v.created_at, a.body
FROM model_version v JOIN assembly a ON a.digest = v.assembly
WHERE v.model_id = %(model_id)s::bigint AND v.version = %(version)s::bigint
"""

FIND_SERVED: LiteralString = """
SELECT assembly FROM model_version WHERE model_id = %(model_id)s::bigint AND version = %(version)s::bigint
"""
MARK_REBUILD_WANTED: LiteralString = """
UPDATE model
SET rebuild_wanted = true, rebuild_forced = rebuild_forced OR %(forced)s::boolean,
    rebuild_due = least(rebuild_due, %(due)s::timestamptz)
WHERE model_id = %(model_id)s::bigint
  AND NOT (rebuild_wanted AND rebuild_forced >= %(forced)s::boolean
           AND rebuild_due IS NOT DISTINCT FROM least(rebuild_due, %(due)s::timestamptz))
"""
MARK_REBUILD_PLANNED: LiteralString = """
UPDATE model
SET rebuild_wanted = false, rebuild_forced = false, building = building OR %(building)s::boolean,
    rebuild_at = %(at)s::timestamptz, rebuild_due = CASE WHEN %(at)s::timestamptz IS NOT NULL THEN rebuild_due END
WHERE model_id = %(model_id)s::bigint
"""
MARK_POLICY: LiteralString = """
UPDATE model SET rebuild_policy = %(policy)s::jsonb, rebuild_wanted = rebuild_wanted OR version > 0
WHERE model_id = %(model_id)s::bigint
"""
MARK_MIN_SHARDS: LiteralString = """
UPDATE model SET min_shards = %(min_shards)s::int WHERE model_id = %(model_id)s::bigint
"""
MARK_ANSWERS: LiteralString = """
UPDATE model SET answers = %(answers)s::text WHERE model_id = %(model_id)s::bigint
"""
MARK_REPRODUCIBLE: LiteralString = """
UPDATE model SET reproducible = %(found)s::boolean
WHERE model_id = %(model_id)s::bigint AND (reproducible IS NULL OR reproducible > %(found)s::boolean)
RETURNING reproducible
"""
MARK_BUILT: LiteralString = """
UPDATE model SET building = %(building)s::boolean WHERE model_id = %(model_id)s::bigint
"""


@dataclass(frozen=True, slots=True)
class Model:
    """A model's row."""

    model_id: int
    name: str
    dataset_id: UUID
    evaluation_id: UUID | None
    recipe: dict[str, Any]
    recipe_digest: str
    version: int
    floor: int
    cleared: int
    erase_after: timedelta
    rebuild_wanted: bool
    building: bool
    deactivated_ago: float | None
    """Seconds since the newest deactivation on the database's clock; None before the first."""
    rebuild_policy: dict[str, Any]
    rebuild_forced: bool
    """An operator asked for the rebuild: the policy's waiting is over."""
    rebuild_due: datetime | None
    """Earliest due date of the deletions that were not rebuilt yet."""
    rebuild_at: datetime | None
    """When what is missing will be queued; None: nothing waits."""
    deferring: bool
    """Whether deletions wait, and stages may serve on that hold a deferred record (`service.store.deferrals`)."""
    reproducible: bool | None
    """Of engine external, whether training a stage twice gave the same bits; None: not tried yet."""
    min_shards: int
    """With fewer live members of its ensemble the model answers nothing."""
    gate: dict[str, Any] | None
    """Bounds that a rebuilt assembly must keep before it serves."""
    canary: dict[str, Any] | None
    """What share of the traffic a rebuilt assembly gets at first."""
    stable: int | None
    """While a canary runs: the version that answers the rest of the traffic."""
    canary_until: datetime | None
    pinned: int | None
    """Version that an operator rolled back to: serves while all of it is clean."""
    answers: str
    """How much its answers tell: one of `service.domain.answers.Answers`."""

    @property
    def policy(self) -> Policy:
        """When missing stages are trained."""
        return Policy.from_json(self.rebuild_policy)

    @property
    def parsed_recipe(self) -> Recipe:
        """The recipe, checked; one value per recipe and process, since its digest and orders take a while."""
        return _parsed(json.dumps(self.recipe))


@lru_cache(maxsize=256)
def _parsed(body: str) -> Recipe:
    return Recipe.from_json(json.loads(body))


@dataclass(frozen=True, slots=True)
class Version:
    """A numbered assembly of a model."""

    version: int
    assembly: str
    cause: str
    canonical: bool
    created_at: datetime
    body: dict[str, Any]


def insert_model(
    connection: Connection,
    *,
    name: str,
    dataset_id: UUID,
    evaluation_id: UUID | None,
    recipe: Recipe,
    erase_after: timedelta,
    policy: Policy = NOW,
    min_shards: int = 1,
    answers: Answers = Answers.PROBABILITIES,
) -> int:
    """Create a model with nothing trained; returns its id.

    Raises:
        psycopg.errors.UniqueViolation: the name is taken.
    """
    values = {
        "name": name,
        "dataset_id": dataset_id,
        "evaluation_id": evaluation_id,
        "recipe": Jsonb(recipe.to_json()),
        "recipe_digest": recipe.digest,
        "erase_after": erase_after,
        "rebuild_policy": Jsonb(policy.to_json()),
        "min_shards": min_shards,
        "answers": answers,
    }
    row = connection.execute(INSERT, values).fetchone()
    if row is None:
        raise AssertionError("INSERT .. RETURNING gives a row")
    return row[0]


def get_model(connection: Connection, name: str) -> Model:
    """The model of that name.

    Raises:
        NotFoundError: no such model.
    """
    with connection.cursor(row_factory=class_row(Model)) as cursor:
        found = cursor.execute(FIND, {"name": name}).fetchone()
    if found is None:
        raise NotFoundError("there is no model of that name; GET /v1/models lists them")
    return found


def get_model_by_id(connection: Connection, model_id: int) -> Model:
    """The model with that id, unlocked."""
    return _ask(connection, GET, model_id)()


def lock_model(connection: Connection, model_id: int) -> Model:
    """The model, locked FOR NO KEY UPDATE: the first lock of every transaction that publishes or declares."""
    return ask_locked(connection, model_id)()


def ask_locked(connection: Connection, model_id: int) -> Callable[[], Model]:
    """As `lock_model`; see `database.ask`."""
    return _ask(connection, LOCK, model_id)


def share_model(connection: Connection, model_id: int) -> Model:
    """The model, locked FOR SHARE: its floor cannot rise until the transaction ends (rules 3 and 5)."""
    return _ask(connection, LOCK_SHARED, model_id)()


def find_served(connection: Connection, model_id: int, version: int) -> str | None:
    """Digest of the assembly that a version serves."""
    return next(iter(ask_served(connection, model_id, version)()), None)


def ask_served(connection: Connection, model_id: int, version: int) -> Callable[[], list[str]]:
    """As `find_served`, in a list of one or none; see `database.ask`."""
    return ask(connection, FIND_SERVED, {"model_id": model_id, "version": version}, scalar_row)


def mark_rebuild_wanted(
    connection: Connection, model_id: int, *, due: datetime | None = None, forced: bool = False
) -> None:
    """Ask for the stages that are missing; the relay rings `model.rebuild` until it was heard.

    `due` is the earliest due date of the deletions that took them; `forced` ends the policy's waiting.
    """
    connection.execute(MARK_REBUILD_WANTED, {"model_id": model_id, "due": due, "forced": forced})


def mark_rebuild_planned(connection: Connection, model_id: int, *, building: bool, at: datetime | None = None) -> None:
    """The missing stages are queued (`building` says that there were any), or are to be planned again at `at`."""
    connection.execute(MARK_REBUILD_PLANNED, {"model_id": model_id, "building": building, "at": at})


def mark_policy(connection: Connection, model_id: int, policy: Policy) -> None:
    """Set the rebuild policy of the locked model; what is missing is planned anew."""
    connection.execute(MARK_POLICY, {"model_id": model_id, "policy": Jsonb(policy.to_json())})


def mark_min_shards(connection: Connection, model_id: int, min_shards: int) -> None:
    """Set how many shards of the locked model must be live."""
    connection.execute(MARK_MIN_SHARDS, {"model_id": model_id, "min_shards": min_shards})


def mark_answers(connection: Connection, model_id: int, answers: Answers) -> None:
    """Set how much the answers of the locked model tell."""
    connection.execute(MARK_ANSWERS, {"model_id": model_id, "answers": answers})


def mark_reproducible(connection: Connection, model_id: int, *, found: bool) -> bool:
    """Note whether training a stage again gave the same bits; True where that is news. A difference is never undone."""
    values = {"model_id": model_id, "found": found}
    return connection.execute(MARK_REPRODUCIBLE, values).fetchone() is not None


def mark_built(connection: Connection, model_id: int) -> None:
    """What was queued has ended and is being published."""
    connection.execute(MARK_BUILT, {"model_id": model_id, "building": False})


def mark_unpublished(connection: Connection, model_id: int) -> None:
    """What is trained is to be looked at again; the relay rings `model.publish`."""
    connection.execute(MARK_BUILT, {"model_id": model_id, "building": True})


def list_models(connection: Connection) -> list[Model]:
    """All models by id."""
    with connection.cursor(row_factory=class_row(Model)) as cursor:
        return cursor.execute(LIST).fetchall()


def list_versions(connection: Connection, model_id: int, *, limit: int = 100) -> list[Version]:
    """The newest versions first."""
    with connection.cursor(row_factory=class_row(Version)) as cursor:
        return cursor.execute(LIST_VERSIONS, {"model_id": model_id, "limit": limit}).fetchall()


def find_version(connection: Connection, model_id: int, version: int) -> Version | None:
    """One version, or None (version 0 means that nothing was published yet)."""
    with connection.cursor(row_factory=class_row(Version)) as cursor:
        return cursor.execute(FIND_VERSION, {"model_id": model_id, "version": version}).fetchone()


def _ask(connection: Connection, query: LiteralString, model_id: int) -> Callable[[], Model]:
    asked = ask(connection, query, {"model_id": model_id}, class_row(Model))

    def one() -> Model:
        if not (found := asked()):
            raise NotFoundError("there is no model with that id")
        return found[0]

    return one
