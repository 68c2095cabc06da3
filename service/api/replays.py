"""Replays: what training served stages again from nothing gave, and on which platforms stages were made."""

from datetime import date, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query

from service.api.auth import Caller, ModelAdmin
from service.api.context import Here
from service.api.doorbell import Task
from service.api.errors import RESPONSES
from service.api.schemas import NamePath
from service.store import models, replays, served
from service.store.database import transaction
from service.store.replays import Replay
from service.store.served import ServedStage

router = APIRouter(prefix="/v1/models", tags=["models"], responses=RESPONSES)


@router.get("/{name}/replays")
def list_replays(
    name: NamePath, here: Here, _caller: Caller, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> dict[str, Any]:
    """The newest first; `outcome` is null while one waits or is under way."""
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        found = replays.list_replays(connection, model.model_id, limit=limit)
    return {"model": name, "replays": [_replay(each) for each in found]}


@router.post("/{name}/replays/{replay_id}/release", status_code=202)
def release_replay(
    name: NamePath, replay_id: Annotated[int, Path(ge=1, le=2**63 - 1)], here: Here, caller: ModelAdmin
) -> dict[str, Any]:
    """Say that a mismatch was the replay's fault: the stage is trained again, and its digest may come back.

    The artefact that was taken out of service stays as evidence.
    """
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        replays.release(connection, model.model_id, replay_id, caller.prefix)
    here.doorbell.ring(Task.REBUILD, model.model_id)
    return {"model": name, "replay_id": replay_id, "links": {"replays": f"/v1/models/{name}/replays"}}


@router.get("/{name}/stages")
def list_stages(name: NamePath, here: Here, _caller: Caller) -> dict[str, Any]:
    """Every stage whose weights serve now, with its digest and the platform that it was made on.

    Whoever replays stages from files compares these platforms first: keep the answer beside the files.
    """
    with transaction(here.pool) as connection:
        model = models.get_model(connection, name)
        found = served.list_served(connection, model.model_id)
    return {"model": name, "version": model.version, "stages": [_stage(each) for each in found]}


def _replay(replay: Replay) -> dict[str, Any]:
    made_on, replayed_on = replay.made_on, replay.replayed_on
    names = {*made_on, *replayed_on} if replayed_on else set[str]()
    return {
        "replay_id": replay.replay_id,
        "stage": replay.stage_key,
        "digest": replay.digest,
        "outcome": replay.outcome,
        "found": replay.found,
        "differs_at": replay.differs_at,
        "reason": replay.reason,
        "made_on": made_on,
        "replayed_on": replayed_on,
        "differs": sorted(each for each in names if made_on.get(each) != (replayed_on or {}).get(each)),
        "drawn_on": _moment(replay.drawn_on),
        "started_at": _moment(replay.started_at),
        "ended_at": _moment(replay.ended_at),
        "released_at": _moment(replay.released_at),
    }


def _stage(stage: ServedStage) -> dict[str, Any]:
    return {
        "stage": stage.stage_key,
        "speaks": stage.stage_key == stage.leaf,
        "shard": stage.shard,
        "prefix": stage.prefix,
        "digest": stage.digest,
        "fingerprint": stage.fingerprint,
        "platform": stage.platform,
    }


def _moment(moment: date | datetime | None) -> str | None:
    return moment.isoformat() if moment else None
