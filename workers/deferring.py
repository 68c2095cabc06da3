"""Which deletions of a model under `rebuild_first` may wait for their replacement, so that no accuracy is lost.

A deletion waits only where that changes anything, where training can end in time, and never past its last safe moment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

from service.domain.requests import Kind
from service.evidence.events import EventKind
from service.store import deferrals, events, grid, rebuilds
from service.store.database import Connection, get_time
from service.store.models import Model
from service.store.targets import Claimed
from service.store.tombstones import Place
from shards.rebuild import SAFETY

RESERVE = timedelta(days=1)
"""Kept free before a due date, beside `erase_after`, for what follows a deactivation: erasure and certificate."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a batch."""

    model: Model
    """With `deferring` as it is now."""
    waiting: frozenset[UUID]
    """Requests that stay `received`."""
    changed: bool = True
    """Whether another assembly may be the one to serve."""


def settle(
    connection: Connection,
    model: Model,
    claimed: Sequence[Claimed],
    places: Sequence[Place],
    tainted: Mapping[UUID, Sequence[str]],
) -> Settled:
    """Let those of the claimed requests wait that may, and end the deferral of the others' records.

    Runs in the planner's transaction, after the tombstones were inserted. `tainted` is each matched request's stages.
    """
    limits = _limits(connection, model, claimed, tainted)
    if not limits and not model.deferring:
        return Settled(model, frozenset(), changed=False)
    out = {place.record_id for place in places if place.request_id not in limits}
    kept = {place.record_id for place in places if place.request_id in limits} - out
    deferring = deferrals.defer(connection, model.model_id, limits, kept) if limits else True
    if out:
        deferring = deferrals.release(connection, model.model_id, out)
    for request_id, until in limits.items():
        events.append(
            connection,
            EventKind.TARGET_DEFERRED,
            request_id=request_id,
            model_id=model.model_id,
            until=until.isoformat(),
            records=sum(place.request_id == request_id for place in places),
            stages=list(tainted[request_id]),
        )
    return Settled(replace(model, deferring=deferring), frozenset(limits))


def _limits(
    connection: Connection, model: Model, claimed: Sequence[Claimed], tainted: Mapping[UUID, Sequence[str]]
) -> dict[UUID, datetime]:
    """Until when each request may wait; those that may not are left out."""
    if model.policy.kind != "rebuild_first":
        return {}
    assembly = grid.served(connection, model)
    serving = {member.stage for member in assembly.members if member} if assembly else set[str]()
    able = [
        one
        for one in claimed
        if one.kind == Kind.ERASE and not one.deferred and not serving.isdisjoint(tainted.get(one.request_id, ()))
    ]
    if not able:
        return {}
    now = get_time(connection)
    found = rebuilds.survey(connection, model)
    work = found.plan(model.policy, now=now, due=None).work
    ready = now + timedelta(seconds=work * found.seconds_per_work * SAFETY)
    limits = {one.request_id: one.due_at - model.erase_after - RESERVE for one in able}
    return {request_id: until for request_id, until in limits.items() if ready < until}
