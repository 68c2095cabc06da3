"""Releases: what became of rebuilt assemblies; an operator's word on them: override, promote, abort, serve, unpin."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Path

from service.api.auth import Caller, ModelAdmin
from service.api.context import Context, Here
from service.api.errors import RESPONSES
from service.api.schemas import NamePath, Reason
from service.store import canaries, gates, models, overrides, refusals, rollbacks
from service.store.database import Connection, retrying, transaction
from service.store.gates import Trial

router = APIRouter(prefix="/v1/models/{name}", tags=["models"], responses=RESPONSES)


@router.get("/gate")
def list_trials(name: NamePath, here: Here, _caller: Caller) -> dict[str, Any]:
    """The newest assemblies that came to the model's gate or canary, and what became of them."""
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        found = gates.list_trials(connection, model.model_id)
    return {"model": name, "gate": model.gate, "trials": [_view(trial) for trial in found]}


@router.post("/gate:override")
def override_gate(name: NamePath, body: Reason, here: Here, caller: ModelAdmin) -> dict[str, Any]:
    """Serve what the gate refused, or whose canary was aborted, if it is still the best that is clean."""
    return _published(
        here,
        name,
        lambda connection: overrides.override(connection, name, actor=caller.prefix, reason_code=body.reason_code),
    )


@router.post("/canary:promote")
def promote_canary(name: NamePath, body: Reason, here: Here, caller: ModelAdmin) -> dict[str, Any]:
    """Give the canary all traffic."""

    def step(connection: Connection) -> int:
        model = models.lock_model(connection, models.get_model(connection, name).model_id)
        canaries.promote(connection, model, actor=caller.prefix, reason_code=body.reason_code)
        return model.version

    return _published(here, name, step)


@router.post("/canary:abort")
def abort_canary(name: NamePath, body: Reason, here: Here, caller: ModelAdmin) -> dict[str, Any]:
    """Give the stable assembly all traffic again, as a new version."""

    def step(connection: Connection) -> int:
        model = models.lock_model(connection, models.get_model(connection, name).model_id)
        return canaries.abort(connection, model, actor=caller.prefix, reason_code=body.reason_code)

    return _published(here, name, step)


@router.post("/versions/{version}:serve")
def serve_version(
    name: NamePath, version: Annotated[int, Path(ge=1, lt=2**63)], body: Reason, here: Here, caller: ModelAdmin
) -> dict[str, Any]:
    """Roll back: serve an earlier version's assembly again, until it is unpinned. Refused where a stage is tainted."""
    with refusals.recorded(here.pool, "serve_version", actor=caller.prefix):
        return _published(
            here,
            name,
            lambda connection: rollbacks.serve(
                connection, name, version, actor=caller.prefix, reason_code=body.reason_code
            ),
        )


@router.post("/versions:unpin")
def unpin_version(name: NamePath, body: Reason, here: Here, caller: ModelAdmin) -> dict[str, Any]:
    """End a rollback: what was trained since comes into service as after a rebuild."""

    def step(connection: Connection) -> int:
        rollbacks.unpin(connection, name, actor=caller.prefix, reason_code=body.reason_code)
        return models.get_model(connection, name).version

    return _published(here, name, step)


def _published(here: Context, name: str, step: Callable[[Connection], int]) -> dict[str, Any]:
    def run() -> int:
        with transaction(here.pool) as connection:
            return step(connection)

    return {"model": name, "version": retrying(run), "links": {"model": f"/v1/models/{name}"}}


def _view(trial: Trial) -> dict[str, Any]:
    return {
        "assembly": trial.assembly,
        "state": trial.state,
        "score": trial.score,
        "base": trial.base,
        "base_score": trial.base_score,
        "rows": trial.rows,
        "error": trial.error,
        "gate": trial.policy,
        "created_at": trial.created_at.isoformat(),
        "decided_at": trial.decided_at.isoformat() if trial.decided_at else None,
    }
