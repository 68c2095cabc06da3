"""Holds: whatever is held is deactivated, but not erased; released, it is."""

from typing import Any
from uuid import UUID

import pytest
from test_erasure import verified
from world_copies import Copy
from world_requests import DONE, deactivate, hold, record_id, release, stored

from service.domain.errors import ConflictError, NotFoundError
from service.domain.requests import Kind
from service.store import holds, work
from service.store.database import transaction
from workers import erase, steps
from workers.relay import Relay

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _no_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SPACING_SECONDS", 0)


def test_a_hold_keeps_what_others_own_too_and_its_release_lets_it_go(world: Copy) -> None:
    held = hold(world, "cid")
    assert hold(world, "cid") == held  # asked again
    other = hold(world, "cid", "audit")
    request_id = deactivate(world, "ann", Kind.ERASE)  # her record concerns cid
    world.finish(request_id)
    assert world.shown(request_id) == ("deactivated", None)
    assert world.active("ann") == 0
    with transaction(world.pool) as connection:
        assert holds.get(connection, held).waiting == 1
        assert work.list_to_erase(connection) == []
    assert release(world, held).waiting == 0
    with transaction(world.pool) as connection, pytest.raises(ConflictError, match="released before"):
        holds.release(connection, held, actor=world.actor)
    with transaction(world.pool) as connection, pytest.raises(NotFoundError):
        holds.release(connection, UUID(int=0), actor=world.actor)
    world.finish(request_id)
    assert world.shown(request_id) == ("deactivated", None)  # the other one stands
    release(world, other)
    Relay(world.pool, world.context.bell).look()
    assert ("target.erase", (str(request_id), world.model_id)) in world.context.bell.rung  # type: ignore[attr-defined]
    world.finish(request_id)
    assert world.states(request_id) == DONE
    assert verified(world, request_id)
    placed = {"hold_id": str(held), "actor": world.actor, "reason_code": "litigation"}
    assert world.events("hold.placed")[0] == placed
    assert world.events("hold.released")[0] == placed
    with transaction(world.pool) as connection:
        found = holds.list_holds(connection, is_open=None, before=None, limit=9)
        assert [each.hold_id for each in found] == [other, held]
        assert holds.list_holds(connection, is_open=True, before=None, limit=9) == []


def test_there_is_nothing_to_hold_of_somebody_unknown(world: Copy) -> None:
    with pytest.raises(ConflictError, match="nothing to hold"):
        hold(world, "nobody")


def test_a_hold_placed_while_a_cell_is_rewritten_keeps_the_payload(
    world: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = deactivate(world, "s1", Kind.ERASE)
    mine = {record_id(world, name) for name in ("s1r0", "s1r1")}
    real = erase._write_without
    placed: list[UUID] = []

    def slow(*arguments: Any) -> Any:
        written = real(*arguments)
        if not placed:
            placed.append(hold(world, "s1"))
        return written

    monkeypatch.setattr(erase, "_write_without", slow)
    assert not steps.erase_target(world.context, request_id, world.model_id)
    assert mine <= stored(world)
    assert world.states(request_id) == [("erasing", None)]
    assert (
        world.rows("SELECT 1 FROM artifact WHERE kind = 'cell' AND state NOT IN ('live', 'destroyed', 'doomed')") == []
    )
    release(world, placed[0])
    world.finish(request_id)
    assert world.states(request_id) == DONE
    assert verified(world, request_id)


def test_a_hold_during_the_time_to_revoke_outlasts_it(world: Copy) -> None:
    world.as_owner("UPDATE model SET erase_after = interval '30 days'")
    request_id = deactivate(world, "s1", Kind.ERASE)
    held = hold(world, "s1")
    world.as_owner("UPDATE request_target SET deactivated_at = deactivated_at - interval '31 days'")
    world.finish(request_id)
    assert world.states(request_id) == [("deactivated", None)]
    release(world, held)
    world.finish(request_id)
    assert world.states(request_id) == DONE
