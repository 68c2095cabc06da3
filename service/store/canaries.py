"""Canaries: a new version answers a share of the requests, the stable one the rest; both are above the floor.

A deactivation ends a canary with the floor that it raises, and asks nobody. Changes are made under the model's lock.
"""

from datetime import timedelta
from typing import LiteralString

from service.domain.errors import ConflictError
from service.domain.release import Canary
from service.evidence.events import EventKind
from service.store import admissions, events, gates, models, publish
from service.store.database import Connection, get_time
from service.store.models import Model
from service.store.publish import Candidate

MARK_PROMOTED: LiteralString = """
UPDATE model SET stable = NULL, canary_until = NULL WHERE model_id = %(model_id)s::bigint
"""


def start(connection: Connection, model: Model, found: Candidate) -> int:
    """Publish the candidate beside the version that serves; returns its number."""
    policy = Canary.from_json(model.canary or {})
    stable = model.stable or model.version
    until = None if policy.minutes is None else get_time(connection) + timedelta(minutes=policy.minutes)
    version = publish.publish(connection, model, found, cause="canary", stable=stable, until=until)
    events.append(
        connection,
        EventKind.CANARY_STARTED,
        model_id=model.model_id,
        version=version,
        stable=stable,
        share=policy.share,
        until=until.isoformat() if until else None,
    )
    return version


def promote(connection: Connection, model: Model, *, actor: str | None, reason_code: str) -> None:
    """Give the canary of the locked model all traffic; `actor` is None where its time has come.

    Raises:
        ConflictError: no canary runs.
    """
    digest = _running(connection, model)
    trial = gates.find(connection, model.model_id, digest)
    admissions.admit(connection, model.model_id, digest, until=trial.created_at if trial else None)
    gates.mark(connection, model.model_id, digest, "admitted")
    connection.execute(MARK_PROMOTED, {"model_id": model.model_id})
    publish.notify(connection, model.model_id)
    events.append(
        connection,
        EventKind.CANARY_PROMOTED,
        model_id=model.model_id,
        version=model.version,
        actor=actor,
        reason_code=reason_code,
    )


def abort(connection: Connection, model: Model, *, actor: str | None, reason_code: str) -> int:
    """Give the stable assembly all traffic again, as a new version; returns its number. Rebuilds leave it at that.

    `actor` is None where a model server saw the engine fail.

    Raises:
        ConflictError: no canary runs.
    """
    gates.mark(connection, model.model_id, _running(connection, model), "aborted")
    events.append(
        connection,
        EventKind.CANARY_ABORTED,
        model_id=model.model_id,
        version=model.version,
        actor=actor,
        reason_code=reason_code,
    )
    return publish.publish(connection, model, publish.candidate(connection, model), cause="rollback")


def report_failure(connection: Connection, model_id: int, version: int) -> None:
    """A model server's engine failed on `version`: where that is the canary, it ends."""
    model = models.lock_model(connection, model_id)
    if model.stable is not None and model.version == version:
        abort(connection, model, actor=None, reason_code="engine_failed")


def _running(connection: Connection, model: Model) -> str:
    digest = models.find_served(connection, model.model_id, model.version)
    if model.stable is None or digest is None:
        raise ConflictError("no canary of the model is running")
    return digest
