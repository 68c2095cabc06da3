"""Overrides: what a gate refused, or whose canary was aborted, serves on an operator's word."""

from service.domain.errors import ConflictError
from service.evidence.events import EventKind
from service.store import admissions, events, gates, models, publish
from service.store.database import Connection


def override(connection: Connection, name: str, *, actor: str, reason_code: str) -> int:
    """Serve the assembly that the gate refused, or whose canary was aborted; returns its version.

    Raises:
        NotFoundError: no such model.
        ConflictError: there is none, or it is not what is trained and clean any more.
    """
    model = models.lock_model(connection, models.get_model(connection, name).model_id)
    found = publish.candidate(connection, model, gated=True)
    trial = gates.find(connection, model.model_id, found.assembly.digest)
    if found.pinned:
        raise ConflictError("an earlier version is pinned: unpin the model first")
    if trial is None or trial.state not in {"refused", "aborted"}:
        raise ConflictError(
            "nothing that is trained and clean now was refused or aborted: there is nothing to override"
        )
    admissions.admit(connection, model.model_id, trial.assembly, until=trial.created_at)
    gates.mark(connection, model.model_id, trial.assembly, "admitted")
    events.append(
        connection,
        EventKind.VERSION_OVERRIDDEN,
        model_id=model.model_id,
        assembly=trial.assembly,
        actor=actor,
        reason_code=reason_code,
    )
    return publish.publish(connection, model, found, cause="rebuild" if model.version else "train")
