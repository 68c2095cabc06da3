"""Changing a model's policies: when missing stages are trained, how few shards answer, how much; gate and canary."""

from typing import LiteralString

from psycopg.types.json import Jsonb

from service.domain.answers import Answers
from service.domain.errors import ConflictError
from service.domain.release import Canary, Gate
from service.evidence.events import EventKind
from service.store import admissions, deferrals, events, gates, models, publish
from service.store.database import Connection
from service.store.models import Model
from shards.rebuild import Policy

FIRST = (
    "under rebuild_first a deletion and its replacement are one swap, which waits for no gate and no canary: choose"
    " another rebuild policy first"
)
MARK_RELEASE: LiteralString = """
UPDATE model
SET gate = %(gate)s::jsonb, canary = %(canary)s::jsonb,
    building = building OR EXISTS (SELECT FROM stage s WHERE s.model_id = %(model_id)s::bigint AND s.gated)
WHERE model_id = %(model_id)s::bigint
"""


def set_policy(connection: Connection, name: str, policy: Policy, *, actor: str) -> Model:
    """Change when the model's missing stages are trained; deletions that waited under the old policy wait no more.

    The caller has checked that the model's grid can keep the policy.

    Raises:
        NotFoundError: no such model.
        ConflictError: the model has a gate or a canary, which the one swap of `rebuild_first` has no room for.
    """
    model = models.lock_model(connection, models.get_model(connection, name).model_id)
    if policy == model.policy:
        return model
    if policy.kind == "rebuild_first" and (model.gate or model.canary):
        raise ConflictError(FIRST)
    models.mark_policy(connection, model.model_id, policy)
    if policy.kind != "rebuild_first":
        deferrals.end(connection, model.model_id)
    events.append(connection, EventKind.MODEL_POLICY, model_id=model.model_id, actor=actor, policy=policy.to_json())
    return models.get_model_by_id(connection, model.model_id)


def set_min_shards(connection: Connection, name: str, min_shards: int, *, actor: str) -> Model:
    """Change how many shards must be live for the model to answer; its replicas hear of it at once.

    Raises:
        NotFoundError: no such model.
    """
    model = models.lock_model(connection, models.get_model(connection, name).model_id)
    if min_shards == model.min_shards:
        return model
    models.mark_min_shards(connection, model.model_id, min_shards)
    publish.notify(connection, model.model_id)
    events.append(connection, EventKind.MODEL_MIN_SHARDS, model_id=model.model_id, actor=actor, min_shards=min_shards)
    return models.get_model_by_id(connection, model.model_id)


def set_answers(connection: Connection, name: str, answers: Answers, *, actor: str) -> Model:
    """Change how much the model's answers tell; its replicas hear of it at once.

    Raises:
        NotFoundError: no such model.
    """
    model = models.lock_model(connection, models.get_model(connection, name).model_id)
    if answers == model.answers:
        return model
    models.mark_answers(connection, model.model_id, answers)
    publish.notify(connection, model.model_id)
    events.append(connection, EventKind.MODEL_ANSWERS, model_id=model.model_id, actor=actor, answers=answers)
    return models.get_model_by_id(connection, model.model_id)


def set_gate(connection: Connection, name: str, gate: Gate | None, *, actor: str) -> Model:
    """Set which bounds a rebuilt assembly must keep before it serves; None: none. What waits is looked at anew.

    Raises:
        NotFoundError: no such model.
        ConflictError: nothing can be measured of the model's assemblies, or it rebuilds first.
    """
    model = models.lock_model(connection, models.get_model(connection, name).model_id)
    body = gate.to_json() if gate else None
    if body == model.gate:
        return model
    if gate and (why := gates.why_unmeasured(model)):
        raise ConflictError(f"no gate can be set: {why}")
    _mark_release(connection, model, gate=body, canary=model.canary)
    if gate is None:
        gates.drop_evaluating(connection, model.model_id)
    events.append(connection, EventKind.MODEL_GATE, model_id=model.model_id, actor=actor, gate=body)
    return models.get_model_by_id(connection, model.model_id)


def set_canary(connection: Connection, name: str, canary: Canary | None, *, actor: str) -> Model:
    """Set which share of the traffic a rebuilt assembly gets at first; None: all at once. Its replicas hear of it.

    Raises:
        NotFoundError: no such model.
        ConflictError: a canary is running and would lose its policy, or the model rebuilds first.
    """
    model = models.lock_model(connection, models.get_model(connection, name).model_id)
    body = canary.to_json() if canary else None
    if body == model.canary:
        return model
    if canary is None and model.stable is not None:
        raise ConflictError("a canary is running: promote or abort it first")
    _mark_release(connection, model, gate=model.gate, canary=body)
    publish.notify(connection, model.model_id)
    events.append(connection, EventKind.MODEL_CANARY, model_id=model.model_id, actor=actor, canary=body)
    return models.get_model_by_id(connection, model.model_id)


def _mark_release(
    connection: Connection, model: Model, *, gate: dict[str, object] | None, canary: dict[str, object] | None
) -> None:
    if (gate or canary) and (model.policy.kind == "rebuild_first" or model.deferring):
        raise ConflictError(FIRST)
    if (gate or canary) and not (model.gate or model.canary):
        admissions.gate_open(connection, model.model_id)
    bodies = {"gate": Jsonb(gate) if gate else None, "canary": Jsonb(canary) if canary else None}
    connection.execute(MARK_RELEASE, {"model_id": model.model_id, **bodies})
    if not (gate or canary):
        admissions.admit_all(connection, model.model_id)
