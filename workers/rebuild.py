"""Rebuilding: which stages are trained again and when, by the model's policy, and the release of what was built."""

from service.evidence.events import EventKind
from service.store import canaries, cells, deferrals, events, jobs, models, rebuilds, stages
from service.store.database import Connection, get_time, retrying, transaction
from service.store.models import Model
from shards.rebuild import Policy, Rebuild
from workers.context import Context
from workers.release import release


def rebuild_model(context: Context, model_id: int) -> int:
    """Queue the stages that the model's policy wants trained now; returns how many.

    Where the policy waits, the moment is written down, and the relay rings again then. Cells whose records are sealed
    but not erased get their next manifest first, so that no new stage reads them.
    """

    def step() -> int:
        with transaction(context.pool) as connection:
            return _plan(connection, model_id)

    _seal(context, model_id)
    queued = retrying(step)
    if queued:
        context.bell.ring("stages.train")
    return queued


def _seal(context: Context, model_id: int) -> None:
    """Give cells with sealed records their next manifest, one by one and without the model's lock.

    Hashing a large cell takes longer than a heartbeat may wait.
    """
    with transaction(context.pool) as connection:
        sealed = cells.list_sealed(connection, models.get_model_by_id(connection, model_id).dataset_id)
    for cell_id in sealed:
        with transaction(context.pool) as connection:
            for cell in cells.lock_cells(connection, [cell_id]):
                if cells.is_sealed(connection, cell):
                    cells.advance(connection, cell, object_name=cell.object_name)


def _plan(connection: Connection, model_id: int) -> int:
    model = models.lock_model(connection, model_id)
    if cells.list_sealed(connection, model.dataset_id):
        return 0  # a deletion came between: `rebuild_wanted` stands, and the relay rings again
    now = get_time(connection)
    found = rebuilds.survey(connection, model)
    policy = Policy() if model.rebuild_forced else model.policy
    planned = found.plan(policy, now=now, due=model.rebuild_due)
    if planned.start is not None and planned.start > now.timestamp():
        _schedule(connection, model, planned)
        return 0
    keys = [stage.key for stage in planned.stages]
    gated = model.gate is not None or model.canary is not None
    stages.insert_stages(connection, model_id, planned.stages, found.places, gated=gated)
    jobs.insert_jobs(connection, model_id, keys, {stage.key: found.work(stage) for stage in planned.stages})
    if keys:
        events.append(connection, EventKind.STAGE_QUEUED, model_id=model_id, stages=keys)
    models.mark_rebuild_planned(connection, model_id, building=bool(keys))
    return len(keys)


def _schedule(connection: Connection, model: Model, planned: Rebuild) -> None:
    """Wait for the planned start; recorded when it moves by more than a measurement's noise."""
    start = rebuilds.moment(planned.start)
    models.mark_rebuild_planned(connection, model.model_id, building=False, at=start)
    if start and (model.rebuild_at is None or abs((start - model.rebuild_at).total_seconds()) > 60):
        events.append(
            connection,
            EventKind.REBUILD_SCHEDULED,
            model_id=model.model_id,
            start=start.isoformat(),
            stages=len(planned.stages),
            work=planned.work,
        )


def publish_model(context: Context, model_id: int) -> int | None:
    """Serve the best clean assembly once no job is open; None when jobs are, or nothing changed.

    Where the model has a gate, it is evaluated first; where it has a canary, it gets a share of the traffic first, and
    a canary whose time has come gets it all. Where deletions wait for the assembly (`rebuild_first`), the planner
    publishes it with their deactivation: one swap.
    """

    def step() -> tuple[int | None, str | None]:
        with transaction(context.pool) as connection:
            return _publish_when_built(connection, model_id)

    version, then = retrying(step)
    if then:
        context.bell.ring(then, model_id)
    return version


def _publish_when_built(connection: Connection, model_id: int) -> tuple[int | None, str | None]:
    """The version that was published, if any, and the task to ring next."""
    model = models.lock_model(connection, model_id)
    if model.canary_until is not None and model.canary_until <= get_time(connection):
        canaries.promote(connection, model, actor=None, reason_code="time_passed")
        model = models.lock_model(connection, model_id)
    if not (model.building or model.deferring) or jobs.count_open(connection, model_id):
        return None, None
    if model.deferring:
        if model.rebuild_wanted or not deferrals.is_loaded(connection, model_id):
            return None, None
        if deferrals.end(connection, model_id):
            models.mark_built(connection, model_id)
            return None, "targets.plan"
        model = models.lock_model(connection, model_id)
    models.mark_built(connection, model_id)
    return release(connection, model)
