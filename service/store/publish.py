"""Publishing a version: the one function that deactivation, rebuild and roll-back all take (rule 8)."""

from dataclasses import dataclass
from typing import LiteralString

from psycopg.types.json import Jsonb

from service.evidence.events import EventKind
from service.store import active, deferrals, events, models, stages
from service.store.database import Connection
from service.store.models import Model
from shards import plan
from shards.assembly import Assembly

INSERT_ASSEMBLY: LiteralString = """
INSERT INTO assembly (digest, body) VALUES (%(digest)s::text, %(body)s::jsonb) ON CONFLICT DO NOTHING
"""
INSERT_VERSION: LiteralString = """
INSERT INTO model_version (model_id, version, assembly, cause, canonical)
VALUES (%(model_id)s::bigint, %(version)s::bigint, %(assembly)s::text, %(cause)s::version_cause, %(canonical)s::boolean)
"""
MARK_DEACTIVATED: LiteralString = """
UPDATE model
SET version = %(version)s::bigint, floor = %(version)s::bigint, published_at = clock_timestamp()
WHERE model_id = %(model_id)s::bigint AND version = %(version)s::bigint - 1
"""
MARK_REBUILT: LiteralString = """
UPDATE model SET version = %(version)s::bigint
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


def candidate(connection: Connection, model: Model) -> Candidate:
    """Compute taint of every stage against all tombstones, and the assembly of the clean ones.

    Stages that hold none but deferred records serve until their replacement does.
    """
    recipe = model.parsed_recipe
    open_stages = stages.list_open(connection, model.model_id, model.recipe_digest)
    touched = stages.list_touched(connection, open_stages.stages)
    tainted = plan.tainted(open_stages.stages.values(), touched)
    roots = active.list_roots(connection, model.dataset_id, open_stages.stages, touched)
    barred = tainted
    if model.deferring:
        touched = deferrals.list_touched(connection, model.model_id, open_stages.stages)
        barred = plan.tainted(open_stages.stages.values(), touched)
    assembly = plan.assemble(recipe, open_stages.live(without=barred), open_stages.digests, roots)
    served = models.find_served(connection, model.model_id, model.version)
    return Candidate(
        assembly,
        plan.canonical(assembly, recipe, roots),
        tainted,
        served,
        not barred.isdisjoint(open_stages.digests),
    )


def publish(connection: Connection, model: Model, found: Candidate, *, cause: str) -> int:
    """Make `found` the next version of the locked `model`; a deactivation raises the floor with it.

    Replicas hear of it when the transaction commits.

    Returns:
        The new version's number.
    """
    version = model.version + 1
    at = {"model_id": model.model_id, "version": version}
    connection.execute(INSERT_ASSEMBLY, {"digest": found.assembly.digest, "body": Jsonb(found.assembly.to_json())})
    connection.execute(
        INSERT_VERSION,
        {**at, "assembly": found.assembly.digest, "cause": cause, "canonical": found.canonical},
    )
    raised = cause == "deactivate"
    connection.execute(MARK_DEACTIVATED if raised else MARK_REBUILT, at)
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


def notify(connection: Connection, model_id: int) -> None:
    """Tell the model's replicas to look, when the transaction commits."""
    connection.execute(NOTIFY, {"model_id": str(model_id)})
