"""Rolling back: an earlier version's assembly serves again, under a new number, and stays until it is unpinned.

A pin is a preference, not a promise: it holds while every stage of the assembly is clean and there. A deactivation that
touches one serves the best of what is clean, as always; a lift that brings the stage back brings the pinned one back.
"""

from dataclasses import replace
from typing import LiteralString

from service.domain.errors import ConflictError, NotFoundError
from service.evidence.events import EventKind
from service.store import events, gates, models, publish
from service.store.database import Connection
from shards.assembly import Assembly

MARK_PINNED: LiteralString = """
UPDATE model SET pinned = %(version)s::bigint WHERE model_id = %(model_id)s::bigint
"""
MARK_UNPINNED: LiteralString = """
UPDATE model SET pinned = NULL, building = true WHERE model_id = %(model_id)s::bigint
"""


def serve(connection: Connection, name: str, version: int, *, actor: str, reason_code: str) -> int:
    """Serve the assembly of an earlier version again, as a new version, whose number is returned; a canary ends.

    Raises:
        NotFoundError: no such model or version.
        ConflictError: a stage of it is tainted, or its artefact is not in service any more.
    """
    model = models.lock_model(connection, models.get_model(connection, name).model_id)
    earlier = models.find_version(connection, model.model_id, version)
    if earlier is None:
        raise NotFoundError("the model has no version of that number; GET /v1/models/{model}/versions lists them")
    found = publish.candidate(connection, replace(model, pinned=version))
    members = [member for member in Assembly.from_json(earlier.body).members if member]
    if not found.pinned or not found.tainted.isdisjoint(member.stage for member in members):
        raise ConflictError(
            "a stage of that version is deleted, restricted, quarantined or lost, or none of it is live: serve another"
            " version, or rebuild"
        )
    if model.stable is not None:
        running = models.find_served(connection, model.model_id, model.version)
        gates.mark(connection, model.model_id, running or "", "aborted")
    published = publish.publish(connection, model, found, cause="rollback")
    connection.execute(MARK_PINNED, {"model_id": model.model_id, "version": published})
    events.append(
        connection,
        EventKind.VERSION_ROLLED_BACK,
        model_id=model.model_id,
        version=published,
        of=version,
        actor=actor,
        reason_code=reason_code,
    )
    return published


def unpin(connection: Connection, name: str, *, actor: str, reason_code: str) -> None:
    """Let the newest stages serve again, through the model's gate and canary where it has them.

    Raises:
        NotFoundError: no such model.
        ConflictError: nothing is pinned.
    """
    model = models.lock_model(connection, models.get_model(connection, name).model_id)
    if model.pinned is None:
        raise ConflictError("no version of the model is pinned")
    connection.execute(MARK_UNPINNED, {"model_id": model.model_id})
    events.append(
        connection,
        EventKind.VERSION_UNPINNED,
        model_id=model.model_id,
        version=model.pinned,
        actor=actor,
        reason_code=reason_code,
    )
