"""Changing a model's policies: when its missing stages are trained, and how few shards may answer."""

from service.evidence.events import EventKind
from service.store import deferrals, events, models, publish
from service.store.database import Connection
from service.store.models import Model
from shards.rebuild import Policy


def set_policy(connection: Connection, name: str, policy: Policy, *, actor: str) -> Model:
    """Change when the model's missing stages are trained; deletions that waited under the old policy wait no more.

    The caller has checked that the model's grid can keep the policy.

    Raises:
        NotFoundError: no such model.
    """
    model = models.lock_model(connection, models.get_model(connection, name).model_id)
    if policy == model.policy:
        return model
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
