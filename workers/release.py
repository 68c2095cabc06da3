"""The release of what was built: served at once, after its evaluation, or to a share of the traffic first.

A deactivation takes none of these steps: it serves what is clean and was let into service already.
"""

from datetime import datetime

from service.store import admissions, canaries, gates, publish
from service.store.database import Connection
from service.store.models import Model
from service.store.publish import Candidate

Released = tuple[int | None, str | None]
"""The version that was published, if any, and the task to ring next."""


def release(connection: Connection, model: Model) -> Released:
    """Take the best clean assembly of the locked model, gated stages included, one step on its way."""
    found = publish.candidate(connection, model, gated=True)
    nothing = found.served is None and not any(found.assembly.members)  # every training failed
    if nothing:
        return None, None
    if found.assembly.digest == found.served:
        if model.stable is None and not found.pinned:
            # Spares: nothing that serves would change.
            admissions.admit(connection, model.model_id, found.assembly.digest)
        return None, None
    if found.pinned or not (model.gate or model.canary):
        return _serve(connection, model, found), None
    known = gates.find(connection, model.model_id, found.assembly.digest)
    base = gates.base_of(connection, model)
    refused = known is not None and known.state == "refused" and (known.base, known.policy) == (base, model.gate)
    if refused or (known is not None and known.state == "aborted"):
        return None, None
    if model.gate:
        gates.open_trial(connection, model, found, state="evaluating")
        return None, "model.gate"
    return let_in(connection, model, found), None


def let_in(connection: Connection, model: Model, found: Candidate, *, until: datetime | None = None) -> int:
    """Serve a candidate that no gate keeps out, as a canary where the model has a policy for it and something serves.

    Args:
        connection: in the transaction that looked for the candidate.
        model: as it was locked.
        found: the candidate.
        until: when it was first looked for; stages trained since wait for their own turn. None: no job is open.

    Returns:
        The new version's number.
    """
    base = gates.find_assembly(connection, gates.base_of(connection, model))
    if model.canary and any(base.members):
        gates.open_trial(connection, model, found, state="canary")
        return canaries.start(connection, model, found)
    return _serve(connection, model, found, until)


def _serve(connection: Connection, model: Model, found: Candidate, until: datetime | None = None) -> int:
    if not found.pinned:
        admissions.admit(connection, model.model_id, found.assembly.digest, until=until)
        gates.mark(connection, model.model_id, found.assembly.digest, "admitted")
    return publish.publish(connection, model, found, cause="rebuild" if model.version else "train")
