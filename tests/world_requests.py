"""What tests of restrictions and holds do to a small installation, and read of it."""

from typing import Any
from uuid import UUID

import pytest
from world_copies import Copy

from service.domain.errors import ConflictError
from service.domain.requests import Kind
from service.store import holds, lifts, payloads
from service.store.database import transaction
from shards.partition import dataset_key, record_id_of
from workers import steps
from workers.barrier import Barrier

RESTRICTED = [("completed", "restricted")]
DONE = [("completed", "erased")]


def served(world: Copy) -> str:
    return world.row("SELECT assembly FROM model_version ORDER BY model_id, version DESC LIMIT 1")[0]


def deactivate(world: Copy, subject: str | None, kind: Kind, **fields: Any) -> UUID:
    request_id = world.ask(subject, kind=kind, **fields)
    for (model_id,) in world.rows("SELECT model_id FROM model ORDER BY model_id"):
        steps.plan_targets(world.context, model_id)
    Barrier(world.pool, margin=0.05).look()
    return request_id


def withdraw(world: Copy, request_id: UUID, verb: Any = lifts.lift) -> list[int]:
    with transaction(world.pool) as connection:
        return verb(connection, request_id, actor=world.actor, reason_code="contested_no_more")


def refused(world: Copy, request_id: UUID, verb: Any, says: str) -> None:
    before = world.rows("SELECT state, outcome FROM request_target ORDER BY request_id, model_id"), world.bounds()
    with transaction(world.pool) as connection, pytest.raises(ConflictError, match=says):
        verb(connection, request_id, actor=world.actor, reason_code="x")
    after = world.rows("SELECT state, outcome FROM request_target ORDER BY request_id, model_id"), world.bounds()
    assert after == before


def hold(world: Copy, subject: str, reason_code: str = "litigation") -> UUID:
    with transaction(world.pool) as connection:
        alias = world.line(0, subject, "x").owner
        return holds.place(connection, alias, actor=world.actor, reason_code=reason_code).hold_id


def release(world: Copy, hold_id: UUID) -> holds.Hold:
    with transaction(world.pool) as connection:
        return holds.release(connection, hold_id, actor=world.actor)


def stored(world: Copy, *, missing: bool = False) -> set[UUID]:
    """Records whose payloads lie in the cells' files; `missing`: which may be missing."""
    return {
        each.record.record_id
        for (name,) in world.rows("SELECT object_name FROM cell WHERE object_name IS NOT NULL")
        if not missing or world.context.artifacts.files.exists(name)
        for each in payloads.decode(world.context.artifacts.get(name))
    }


def record_id(world: Copy, name: str) -> UUID:
    return record_id_of(dataset_key(world.secrets.partition, world.dataset.dataset_id), name)
