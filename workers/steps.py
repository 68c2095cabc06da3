"""The steps of a request, callable without Celery. Each is one or more whole transactions; none trusts a message."""

import json
import time
from collections import Counter
from uuid import UUID

import psycopg
import structlog

from service.domain.requests import State
from service.evidence.events import EventKind
from service.store import cells, events, jobs, models, publish, stages, targets, tombstones
from service.store.database import Connection, retrying, transaction
from service.store.models import Model
from service.store.targets import Claimed
from service.store.tombstones import Place
from shards import plan
from workers import deferring
from workers.certify import certify_target
from workers.context import Context
from workers.erase import erase_target
from workers.rebuild import publish_model, rebuild_model

__all__ = ["certify_target", "erase_target", "plan_targets", "publish_model", "rebuild_model"]

log = structlog.get_logger()

SPACING_SECONDS = 0.1
"""At most one deactivation per model in this time; requests that come meanwhile share the next (rule 27)."""


class _TooSoonError(Exception):
    """The model's last deactivation is too young; the argument is how long to wait, in seconds."""


class _OverdueError(Exception):
    """Received targets wait for so long that earlier planners may have died on them; the argument names them."""


def plan_targets(context: Context, model_id: int) -> int:
    """Take all received targets of a model and publish one deactivation for them.

    Returns:
        How many targets were taken; 0 where another planner was faster.
    """
    counted = singly = False

    def step() -> int:
        with transaction(context.pool) as connection:
            return plan_batch(connection, model_id, counted=counted, singly=singly)

    while True:
        try:
            return retrying(step)
        except _TooSoonError as wait:
            time.sleep(wait.args[0])
        except _OverdueError as overdue:
            _drop_hopeless(context, model_id, overdue.args[0])
            counted = True
        except psycopg.errors.DatabaseError as error:
            if singly or isinstance(error, psycopg.OperationalError):
                raise
            singly = True  # one bad target must not poison the batch (rule 27)


def _drop_hopeless(context: Context, model_id: int, request_ids: list[UUID]) -> None:
    """Count an attempt of overdue targets before the work, so that one that kills its planner fails in the end."""
    with transaction(context.pool) as connection:
        for overdue in targets.raise_overdue(connection, model_id, request_ids):
            if overdue.attempts > context.settings.target_attempts:
                _fail(connection, overdue.request_id, model_id, "PlannerDied")


def plan_batch(connection: Connection, model_id: int, *, counted: bool, singly: bool = False) -> int:
    """One deactivation for the received targets of a model, in the caller's transaction; returns how many.

    `counted` says that the attempt of overdue ones was; `singly`, that each is to be tried in a savepoint of its own.
    """
    with connection.pipeline():  # what is not read at once travels together with the next that is
        locked = models.ask_locked(connection, model_id)
        claimed = targets.claim_received(connection, model_id)
        model = locked()
        if model.deactivated_ago is not None and model.deactivated_ago < SPACING_SECONDS:
            raise _TooSoonError(SPACING_SECONDS - model.deactivated_ago)
        overdue = [one.request_id for one in claimed if one.overdue]
        if overdue and not counted:
            raise _OverdueError(overdue)
        if claimed and not singly:
            _deactivate(connection, model, claimed)
    if singly:
        _deactivate_singly(connection, model_id, claimed)
    return len(claimed)


def _deactivate_singly(connection: Connection, model_id: int, claimed: list[Claimed]) -> None:
    for one in claimed:
        try:
            with connection.transaction(), connection.pipeline():
                _deactivate(connection, models.lock_model(connection, model_id), [one])
        except psycopg.errors.DatabaseError as error:
            if isinstance(error, psycopg.OperationalError):
                raise
            _fail(connection, one.request_id, model_id, type(error).__name__)


def _deactivate(connection: Connection, model: Model, claimed: list[Claimed]) -> None:
    """Records to tombstones to tainted stages to the next version, under model, subject and cell locks."""
    targets.lock_subjects(connection, [one.subject_id for one in claimed if one.subject_id])
    places = tombstones.list_places(connection, model.model_id, model.dataset_id, [one.request_id for one in claimed])
    cells.hold_cells(connection, {place.cell_id for place in places})
    matched = list(dict.fromkeys(place.request_id for place in places))
    unmatched = [one.request_id for one in claimed if one.request_id not in set(matched)]
    if unmatched:
        _complete_unmatched(connection, model, unmatched)
        tombstones.insert_do_not_train(connection, model.dataset_id, unmatched)  # of those who are known otherwise
    if not matched:
        return
    tombstones.insert_tombstones(connection, places)
    targets.insert_targets(connection, model.dataset_id, matched)
    tombstones.insert_do_not_train(connection, model.dataset_id, matched)
    held = stages.ask_held(connection, model.model_id, model.recipe_digest, {place.cell_id for place in places})
    found = publish.candidate(connection, model)
    cancelled = jobs.ask_cancel(connection, found.tainted)
    traces = held()
    touched = stages.list_touched_by(connection, traces, matched)
    for key in cancelled():
        events.append(connection, EventKind.STAGE_CANCELLED, model_id=model.model_id, stage=key)
    tainted = {request_id: sorted(plan.tainted(traces.values(), touched[request_id])) for request_id in matched}
    due = min(one.due_at for one in claimed if one.request_id in tainted)
    models.mark_rebuild_wanted(connection, model.model_id, due=due)
    settled = deferring.settle(connection, model, claimed, places, tainted)
    if settled.changed:
        model = settled.model
        found = publish.candidate(connection, model)
    now = [request_id for request_id in matched if request_id not in settled.waiting]
    if not now:
        return
    version = model.floor
    # The same assembly needs a new version, too, where the floor lets an older one be served, or where replicas hold
    # weights in reserve that have just become tainted and must leave their memory.
    changed = (
        found.assembly.digest != found.served
        or model.floor < model.version
        or (found.reserve and tombstones.are_new(connection, model.model_id, places))
    )
    if model.version > 0 and changed:
        version = publish.publish(connection, model, found, cause="deactivate")
    _freeze_plans(connection, model, version, places, {request_id: tainted[request_id] for request_id in now})
    targets.refresh_requests(connection, now)


def _complete_unmatched(connection: Connection, model: Model, unmatched: list[UUID]) -> None:
    targets.mark_no_match(connection, model.model_id, unmatched)
    for request_id in unmatched:
        events.append(
            connection,
            EventKind.TARGET_COMPLETED,
            request_id=request_id,
            model_id=model.model_id,
            outcome="no_match",
        )


def _freeze_plans(
    connection: Connection, model: Model, version: int, places: list[Place], tainted: dict[UUID, list[str]]
) -> None:
    """Write on each target which stages its own records tainted; erasure goes by this, not by a later look."""
    counts = Counter(place.request_id for place in places)
    for request_id, keys in tainted.items():
        events.append(
            connection,
            EventKind.TARGET_DEACTIVATING,
            request_id=request_id,
            model_id=model.model_id,
            version=version,
            records=counts[request_id],
            stages=keys,
        )
    plans = {request_id: json.dumps({"stages": keys}) for request_id, keys in tainted.items()}
    targets.mark_deactivating(connection, model.model_id, version, plans)


def _fail(connection: Connection, request_id: UUID, model_id: int, error: str) -> None:
    if targets.mark_failed(connection, request_id, model_id, State.RECEIVED, error):
        log.error("target.failed", request_id=str(request_id), model_id=model_id, error=error)
