"""Every step killed at every boundary and run again: the end is the same as without a crash.

A boundary is where a process can die with an effect outside it: around each commit and each object put or deleted.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from conftest import Database
from test_workers_path import build, served
from tiny import tiny_backbone
from world import World, make_world

from service.evidence.verify import verify
from service.store import database
from service.store.artifacts import Artifacts
from shards.recipe import Backbone
from workers import certify, erase, evaluation, reaper, rebuild, steps, training
from workers.barrier import Barrier
from workers.reaper import Reaper
from workers.training import train_queued

pytestmark = pytest.mark.integration


class KilledError(BaseException):
    """The process is gone: nothing catches this but the test."""


class Killer:
    """Kills at the boundary with a given number; counts them all otherwise."""

    def __init__(self) -> None:
        self.at: int | None = None
        self.seen = 0

    def boundary(self) -> None:
        self.seen += 1
        if self.at is not None and self.seen == self.at:
            self.at = None
            raise KilledError

    def arm(self, at: int) -> None:
        self.at, self.seen = at, 0


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    found = Killer()

    @contextmanager
    def transaction(pool: Any) -> Iterator[Any]:
        with database.transaction(pool) as connection:
            yield connection
            found.boundary()  # before the commit: rolled back
        found.boundary()  # after it: committed, and nobody knows

    for module in (steps, rebuild, erase, certify, training, evaluation, reaper):
        if hasattr(module, "transaction"):
            monkeypatch.setattr(module, "transaction", transaction)
    for name in ("put", "delete"):
        real: Callable[..., None] = getattr(Artifacts, name)

        def around(self: Artifacts, *args: Any, real: Callable[..., None] = real) -> None:
            found.boundary()
            real(self, *args)
            found.boundary()

        monkeypatch.setattr(Artifacts, name, around)
    return found


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2, width=16)


@pytest.fixture
def world(database: Database, tmp_path: Path, backbone: Backbone) -> Iterator[World]:
    made = make_world(database, tmp_path, backbone, shards=1, slices=2, orders=2)
    yield made
    made.pool.close()


def way(world: World, request_id: UUID) -> None:
    """What workers do for one request, in the order of the bells; begun anew after each death."""
    steps.plan_targets(world.context, world.model_id)
    Barrier(world.pool, margin=0.1).look()
    steps.erase_target(world.context, request_id, world.model_id)
    Reaper(world.pool, world.context.artifacts, job_attempts=99).look()
    steps.erase_target(world.context, request_id, world.model_id)
    world.log()
    steps.certify_target(world.context, request_id, world.model_id)
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)


def revive(world: World) -> None:
    """Time passes: what the dead process held is given up by the reaper's clocks."""
    with database.transaction(world.pool) as connection:
        connection.execute("UPDATE stage_job SET beat_at = beat_at - interval '1 hour' WHERE state <> 'done'")
        connection.execute("UPDATE model SET published_at = published_at - interval '1 hour'")
    Reaper(world.pool, world.context.artifacts, job_attempts=99).look()


def check(world: World, request_id: UUID) -> None:
    states = world.rows("SELECT state, outcome FROM request_target WHERE request_id = %s", request_id)
    assert states == [("completed", "erased")], (states, world.rows("SELECT * FROM stage_job"))
    (envelope,) = world.row("SELECT envelope FROM certificate WHERE request_id = %s", request_id)
    checks = verify(envelope, world.public_key, artifacts=world.context.artifacts.files.root)
    assert [each for each in checks if not each.passed] == []
    _, _, depths = served(world)
    assert depths == (2,)
    with database.transaction(world.pool) as connection:  # what a dead writer left is given up after ten minutes
        connection.execute("UPDATE artifact SET created_at = created_at - interval '1 hour' WHERE state = 'writing'")
    Reaper(world.pool, world.context.artifacts, job_attempts=99).look()
    rows = {name for (name,) in world.rows("SELECT object_name FROM artifact WHERE state = 'live'")}
    there = set(world.context.artifacts.names(older_than=-60))
    assert {name for name in there if not name.startswith("ledger/")} == rows
    assert world.rows("SELECT 1 FROM artifact WHERE state NOT IN ('live', 'destroyed')") == []
    erased = world.row("SELECT count(*) FROM tombstone t JOIN record r USING (record_id)")
    assert erased == (0,)


@pytest.mark.parametrize("part", range(4))
def test_killed_at_each_boundary_the_path_ends_the_same(world: World, killer: Killer, part: int) -> None:
    world.add({f"s{number}": [f"s{number}a", f"s{number}b"] for number in range(90)})
    build(world)
    request_id = world.ask("s0")
    killer.arm(10**9)
    way(world, request_id)
    boundaries = killer.seen
    check(world, request_id)
    assert boundaries > 40
    chosen = [at for at in range(1, boundaries + 1) if at % 4 == part]
    for number, at in zip(itertools.count(1), chosen, strict=False):
        request_id = world.ask(f"s{number}")
        killer.arm(at)
        killed = False
        try:
            way(world, request_id)
        except KilledError:
            killed = True
            revive(world)
            way(world, request_id)
        finally:
            killer.at = None
        if world.row("SELECT state FROM request_target WHERE request_id = %s", request_id) != ("completed",):
            revive(world)
            way(world, request_id)
        check(world, request_id)
        assert killed or at > killer.seen


def test_each_step_run_twice_changes_nothing(world: World) -> None:
    world.add({f"s{number}": [f"s{number}a"] for number in range(12)})
    build(world)
    request_id = world.ask("s3")
    way(world, request_id)
    check(world, request_id)
    before = world.rows("SELECT id FROM event_pending ORDER BY id"), served(world)
    way(world, request_id)
    assert (world.rows("SELECT id FROM event_pending ORDER BY id"), served(world)) == before
