"""Random histories of two models on one dataset, one of which waits for replacements: what must hold at each moment."""

import random
from uuid import UUID

import pytest
from test_erasure import add_model, verified
from test_rebuild_first import FIRST
from world_copies import SUBJECTS, Copy

from service.domain.errors import ConflictError
from service.domain.requests import Kind
from service.store import lifts, models, stages, work
from service.store.database import transaction
from shards import plan
from shards.stages import CellRoot
from workers import steps
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration

STANDS = "state IN ('deactivating', 'deactivated', 'erasing', 'completed') AND outcome IS DISTINCT FROM 'no_match'"

STEPS = (
    *("ask", "rebuild", "train", "publish") * 2,
    *("plan", "plan", "plan", "finish", "expire", "grow", "restrict", "revoke"),
)


class History:
    """Does one thing at a time, in any order that bells might ring."""

    def __init__(self, world: Copy, other: int, seed: int) -> None:
        self.world = world
        self.both = (world.model_id, other)
        self.random = random.Random(seed)
        self.people = list(SUBJECTS)
        self.random.shuffle(self.people)
        self.asked: list[UUID] = []
        self.live = self.trained()
        self.count = 0

    def trained(self) -> set[str]:
        return {key for (key,) in self.world.rows(
            "SELECT stage_key FROM artifact WHERE kind = 'stage' AND state = 'live'")}  # fmt: skip

    def step(self) -> str:
        name = self.random.choice(STEPS)
        getattr(self, name)()
        self.check(name)
        return name

    def model(self) -> int:
        return self.random.choice(self.both)

    def ask(self, kind: Kind = Kind.ERASE) -> None:
        if self.people:
            self.asked.append(self.world.ask(self.people.pop(), kind=kind))

    def restrict(self) -> None:
        if self.random.random() < 0.5:
            self.ask(Kind.RESTRICT)

    def plan(self) -> None:
        with transaction(self.world.pool) as connection:
            connection.execute("UPDATE model SET published_at = published_at - interval '1 hour'")
        steps.plan_targets(self.world.context, self.model())

    def rebuild(self) -> None:
        with transaction(self.world.pool) as connection:
            ready = work.list_to_rebuild(connection)
        for model_id in ready:
            steps.rebuild_model(self.world.context, model_id)

    def train(self) -> None:
        train_queued(self.world.context)

    def publish(self) -> None:
        steps.publish_model(self.world.context, self.model())

    def finish(self) -> None:
        self.world.finish(*self.asked)

    def expire(self) -> None:
        if self.random.random() < 0.3:
            with transaction(self.world.pool) as connection:
                connection.execute(
                    "UPDATE request_target SET deferred_until = now() WHERE deferred_until > now() AND request_id ="
                    " (SELECT request_id FROM request_target WHERE deferred_until > now() ORDER BY request_id LIMIT 1)"
                )

    def grow(self) -> None:
        self.count += 1
        self.world.add({f"late{self.count}": [f"late{self.count}"]})

    def revoke(self) -> None:
        if self.asked and self.random.random() < 0.3:
            request_id = self.random.choice(self.asked)
            try:
                with transaction(self.world.pool) as connection:
                    lifts.revoke(connection, request_id, actor=self.world.actor, reason_code="withdrawn")
            except ConflictError:
                return

    def check(self, name: str) -> None:
        """No model serves what is out of it; nothing is trained on what is out of the dataset."""
        with transaction(self.world.pool) as connection:
            for model_id in self.both:
                model = models.get_model_by_id(connection, model_id)
                found = stages.list_by_key(connection, self.serving(model_id), model.recipe_digest)
                about = self.world.rows(
                    f"SELECT request_id FROM request_target WHERE model_id = %s AND {STANDS}", model_id
                )
                out = stages.list_touched_by(connection, found, [request_id for (request_id,) in about])
                touched = frozenset[CellRoot]().union(*out.values())
                assert not plan.tainted(found.values(), touched), name
                waits = self.world.rows("SELECT 1 FROM deferral WHERE model_id = %s", model_id)
                assert model.deferring == bool(waits)
                assert not (waits and model_id != self.world.model_id)
            live = self.trained()
            fresh = live - self.live
            assert not stages.list_touched(connection, fresh), name
            self.live = live

    def serving(self, model_id: int) -> set[str]:
        (body,) = self.world.row(
            "SELECT a.body FROM model m JOIN model_version v USING (model_id, version)"
            " JOIN assembly a ON a.digest = v.assembly WHERE m.model_id = %s",
            model_id,
        )
        return {member["stage"] for member in body["members"] if member}

    def settle(self) -> None:
        """All bells, until nothing rings."""
        for _ in range(12):
            for model_id in self.both:
                with transaction(self.world.pool) as connection:
                    connection.execute("UPDATE model SET published_at = published_at - interval '1 hour'")
                steps.plan_targets(self.world.context, model_id)
            self.finish()
            self.rebuild()
            self.train()
            for model_id in self.both:
                steps.publish_model(self.world.context, model_id)
            self.check("settle")


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_a_random_history(world: Copy, seed: int) -> None:
    other = add_model(world, "other")
    steps.rebuild_model(world.context, other)
    train_queued(world.context)
    steps.publish_model(world.context, other)
    with transaction(world.pool) as connection:
        models.mark_policy(connection, world.model_id, FIRST)
    history = History(world, other, seed)
    for _ in range(60):
        history.step()
    history.settle()
    assert world.events("target.deferred")
    ended = world.rows("SELECT DISTINCT state::text FROM request_target")
    assert {state for (state,) in ended} <= {"completed", "revoked", "deactivated"}  # a restriction stays deactivated
    for request_id in history.asked:
        if world.states(request_id) == [("completed", "erased")] * 2:
            assert verified(world, request_id)
            world.no_trace_of(request_id)
    assert world.rows("SELECT 1 FROM deferral") == []
    for model_id in history.both:
        assert world.row("SELECT v.canonical FROM model m JOIN model_version v USING (model_id, version)"
                         " WHERE m.model_id = %s", model_id) == (True,)  # fmt: skip
