"""Publishing a version: the one function that deactivation, rebuild and roll-back all take (rule 8)."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from psycopg.rows import scalar_row
from psycopg.types.json import Jsonb

from service.evidence.events import EventKind
from service.store import active, deferrals, events, models, stages
from service.store.database import Connection
from service.store.models import Model
from service.store.stages import OpenStages
from shards import plan
from shards.assembly import Assembly

INSERT_ASSEMBLY: LiteralString = """
INSERT INTO assembly (digest, body) VALUES (%(digest)s::text, %(body)s::jsonb) ON CONFLICT DO NOTHING
"""
FIND_ASSEMBLY: LiteralString = "SELECT body FROM assembly WHERE digest = %(digest)s::text"
INSERT_VERSION: LiteralString = """
INSERT INTO model_version (model_id, version, assembly, cause, canonical)
VALUES (%(model_id)s::bigint, %(version)s::bigint, %(assembly)s::text, %(cause)s::version_cause, %(canonical)s::boolean)
"""
MARK_DEACTIVATED: LiteralString = """
UPDATE model
SET version = %(version)s::bigint, floor = %(version)s::bigint, published_at = clock_timestamp(),
    stable = NULL, canary_until = NULL, building = building OR %(waiting)s::boolean
WHERE model_id = %(model_id)s::bigint AND version = %(version)s::bigint - 1
"""
MARK_REBUILT: LiteralString = """
UPDATE model
SET version = %(version)s::bigint, stable = %(stable)s::bigint, canary_until = %(until)s::timestamptz,
    building = building OR %(waiting)s::boolean
WHERE model_id = %(model_id)s::bigint AND version = %(version)s::bigint - 1
"""
NOTIFY: LiteralString = "SELECT pg_notify('expunge_model', %(model_id)s::text)"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What would serve, computed under the model's lock from everything that is clean now."""

    assembly: Assembly
    canonical: bool
    tainted: frozenset[str]
    """Stages of the model, trained or coming, whose lineage holds a tombstone."""
    served: str | None
    """Digest of the assembly that the newest version serves; None before the first."""
    reserve: bool
    """Whether a trained stage may not serve any more: replicas may hold it, served or not."""
    pinned: bool = False
    """Whether it is what an operator rolled back to."""
    waiting: bool = False
    """Whether clean stages were left out since no gate or canary has let them into service."""


def candidate(connection: Connection, model: Model, *, gated: bool = False) -> Candidate:
    """Compute taint of every stage against all tombstones, and the assembly of the clean ones.

    Stages that hold none but deferred records serve until their replacement does. Stages that the model's gate or
    canary has not let into service yet are counted only where `gated`. What an operator rolled back to comes first,
    while all of it is clean.
    """
    recipe = model.parsed_recipe
    cells = active.ask_cells(connection, model.dataset_id)
    served = models.ask_served(connection, model.model_id, model.version)
    open_stages = stages.list_open(connection, model.model_id, model.recipe_digest)
    touched = stages.list_touched(connection, open_stages.stages)
    tainted = plan.tainted(open_stages.stages.values(), touched)
    roots = active.list_roots(connection, cells(), open_stages.stages, touched)
    barred = tainted
    if model.deferring:
        touched = deferrals.list_touched(connection, model.model_id, open_stages.stages)
        barred = plan.tainted(open_stages.stages.values(), touched)
    waiting = frozenset[str]() if gated else open_stages.gated - barred
    pinned = find_pinned(connection, model, open_stages, barred)
    assembly = pinned or plan.assemble(recipe, open_stages.live(barred | waiting), open_stages.digests, roots)
    return Candidate(
        assembly,
        plan.canonical(assembly, recipe, roots),
        tainted,
        next(iter(served()), None),
        reserve=not barred.isdisjoint(open_stages.digests),
        pinned=pinned is not None,
        waiting=not waiting.isdisjoint(open_stages.digests),
    )


def find_pinned(
    connection: Connection, model: Model, open_stages: OpenStages, barred: AbstractSet[str]
) -> Assembly | None:
    """What an operator rolled back to, while none of its stages is in `barred` and all are there."""
    version = models.find_version(connection, model.model_id, model.pinned) if model.pinned else None
    assembly = Assembly.from_json(version.body) if version else None
    return assembly if assembly and open_stages.carry(assembly, without=barred) else None


def publish(
    connection: Connection,
    model: Model,
    found: Candidate,
    *,
    cause: str,
    stable: int | None = None,
    until: datetime | None = None,
) -> int:
    """Make `found` the next version of the locked `model`; a deactivation raises the floor with it.

    Replicas hear of it when the transaction commits. A canary that was running ends.

    Args:
        connection: in the transaction that locked the model and looked for the candidate.
        model: as it was locked.
        found: the candidate.
        cause: as `model_version` records it.
        stable: for a canary, the version that goes on answering beside it.
        until: when the canary is promoted.

    Returns:
        The new version's number.
    """
    version = model.version + 1
    at = {"model_id": model.model_id, "version": version}
    insert_assembly(connection, found.assembly)
    connection.execute(
        INSERT_VERSION,
        {**at, "assembly": found.assembly.digest, "cause": cause, "canonical": found.canonical},
    )
    raised = cause in {"deactivate", "restore"}
    marks = {**at, "stable": stable, "until": until, "waiting": found.waiting}
    connection.execute(MARK_DEACTIVATED if raised else MARK_REBUILT, marks)
    notify(connection, model.model_id)
    events.append(
        connection,
        EventKind.VERSION_PUBLISHED,
        model_id=model.model_id,
        version=version,
        floor=version if raised else model.floor,
        assembly=found.assembly.digest,
        cause=cause,
        canonical=found.canonical,
    )
    return version


def insert_assembly(connection: Connection, assembly: Assembly) -> None:
    """Keep an assembly under its digest."""
    connection.execute(INSERT_ASSEMBLY, {"digest": assembly.digest, "body": Jsonb(assembly.to_json())})


def find_body(connection: Connection, digest: str) -> dict[str, Any] | None:
    """The body of an assembly."""
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(FIND_ASSEMBLY, {"digest": digest}).fetchone()


def notify(connection: Connection, model_id: int) -> None:
    """Tell the model's replicas to look, when the transaction commits."""
    connection.execute(NOTIFY, {"model_id": str(model_id)})
