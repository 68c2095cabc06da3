"""The whole path of a deletion through the workers' steps, on real Postgres and files with the tiny model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Database
from tiny import tiny_backbone
from world import World, make_world

from service.evidence.verify import verify
from service.store import models, preview, publish, work
from service.store.database import transaction
from shards.recipe import Backbone
from workers import steps
from workers.barrier import Barrier
from workers.reaper import Reaper
from workers.training import train_queued

pytestmark = pytest.mark.integration

SUBJECTS = {f"person{number}": [f"p{number}r{row}" for row in range(1 + number % 3)] for number in range(16)}
RECORDS_OF = """
SELECT record_id FROM record r JOIN subject_alias a ON a.subject_id = r.owner_id WHERE a.digest = %s
"""


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=3, width=16)


@pytest.fixture
def world(database: Database, tmp_path: Path, backbone: Backbone) -> Iterator[World]:
    made = make_world(database, tmp_path, backbone)
    made.add(SUBJECTS)
    yield made
    made.pool.close()


def build(world: World) -> None:
    """Train what is missing and serve it."""
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)


def served(world: World) -> tuple[int, str, tuple[int, ...]]:
    with transaction(world.pool) as connection:
        model = models.get_model_by_id(connection, world.model_id)
        found = publish.candidate(connection, model)
    assert found.served == found.assembly.digest
    return model.version, found.assembly.digest, found.assembly.depths


def settle(world: World) -> None:
    """Let barrier, erasure and certification run, as the relay would ring for them."""
    barrier = Barrier(world.pool, margin=0.1)
    barrier.look()
    with transaction(world.pool) as connection:
        waiting = work.list_to_erase(connection)
    for ref in waiting:
        steps.erase_target(world.context, ref.request_id, ref.model_id)
        world.log()
        steps.certify_target(world.context, ref.request_id, ref.model_id)


def test_a_deletion_goes_from_received_to_completed_and_back_to_full_depth(world: World) -> None:
    build(world)
    version, before, depths = served(world)
    assert (version, depths) == (1, (2, 2))
    with transaction(world.pool) as connection:
        model = models.get_model_by_id(connection, world.model_id)
        ids = [row[0] for row in connection.execute(RECORDS_OF, [world.line(1, "person2", "x").owner.digest])]
        foreseen = preview.preview(connection, model, ids).measured(world.context.artifacts)
    request_id = world.ask("person2")
    assert steps.plan_targets(world.context, world.model_id) == 1
    version, after, depths = served(world)
    assert version == 2
    assert after != before
    assert list(depths) == foreseen.depth_after
    assert sum(depths) < 4
    settle(world)
    state, outcome = world.row("SELECT state, outcome FROM deletion_request WHERE request_id = %s", request_id)
    assert (state, outcome) == ("completed", "erased"), world.rows("SELECT * FROM request_target")
    (envelope,) = world.row("SELECT envelope FROM certificate WHERE request_id = %s", request_id)
    checks = verify(envelope, world.public_key, artifacts=world.context.artifacts.files.root)
    assert [check for check in checks if not check.passed] == []
    assert world.rows("SELECT 1 FROM record WHERE record_id = ANY(%s)", ids) == []
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    version, rebuilt, depths = served(world)
    assert (version, depths) == (3, (2, 2))
    assert rebuilt not in {before, after}
    assert world.row("SELECT canonical FROM model_version WHERE version = 3") == (True,)
    Reaper(world.pool, world.context.artifacts, job_attempts=2).look()
    assert {state for (state,) in world.rows("SELECT DISTINCT state FROM artifact")} == {"live", "destroyed"}
