"""Random histories of erasures that wait for their replacement, beside restrictions, holds, withdrawals and changes of
policy: what counts as deleted is never served, and nothing waits for nobody.
"""

import random
from contextlib import suppress
from uuid import UUID

import pytest
from world_copies import Copy
from world_requests import deactivate, hold, release, served, withdraw

from service.domain.errors import ConflictError
from service.domain.requests import Kind
from service.store import deferrals, lifts, models, stages
from service.store.database import transaction
from service.store.policies import set_policy
from shards.rebuild import Kind as PolicyKind
from shards.rebuild import Policy
from workers import steps
from workers.barrier import Barrier
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration

PEOPLE = ("ann", "bob", "bob", "cid", "s1", "s2")  # one record concerns the first three, and bob has one of his own
STEPS = 30
DEFERRED_FOR_NOBODY = """
SELECT d.record_id FROM deferral d
WHERE NOT EXISTS (
    SELECT FROM deletion_request_record q JOIN request_target t USING (request_id)
    WHERE q.record_id = d.record_id AND t.state = 'received' AND t.deferred_until IS NOT NULL)
"""
OUT = """
SELECT q.record_id FROM deletion_request_record q JOIN request_target t USING (request_id)
WHERE t.version IS NOT NULL AND t.state NOT IN ('lifted', 'revoked')
"""
SERVED_THOUGH_OUT = (
    """
SELECT sc.stage_key
FROM model m JOIN model_version v USING (model_id, version) JOIN assembly a ON a.digest = v.assembly
CROSS JOIN jsonb_array_elements(a.body -> 'members') e (member)
JOIN stage_cell sc ON sc.stage_key = e.member ->> 'stage'
JOIN tombstone t ON t.cell_id = sc.cell_id
WHERE t.record_id IN ("""
    + OUT
    + ") AND "
    + stages.HOLDS
)


class History:
    """Does things to a world under `rebuild_first`, and looks after each."""

    def __init__(self, world: Copy, seed: int) -> None:
        self.world = world
        self.choice = random.Random(seed)
        self.asked: list[tuple[UUID, Kind]] = []
        self.held: list[UUID] = []
        self.policy("rebuild_first")

    def step(self) -> None:
        """One of many things; each is allowed at any time, or refused."""
        ways = (self.ask, self.ask, self.ask, self.withdraw, self.withdraw, self.train, self.swap, self.finish)
        self.choice.choice((*ways, self.hold, self.release, self.change, self.end_waiting))()
        self.check()

    def check(self) -> None:
        """Nothing that is out of service serves; what is deferred is asked for, and is not out."""
        assert self.world.rows(SERVED_THOUGH_OUT) == []
        assert self.world.rows(DEFERRED_FOR_NOBODY) == []
        assert self.world.rows("SELECT 1 FROM deferral WHERE record_id IN (" + OUT + ")") == []
        assert self.world.row("SELECT deferring = EXISTS (SELECT FROM deferral) FROM model") == (True,)

    def ask(self) -> None:
        kind = self.choice.choice((Kind.ERASE, Kind.ERASE, Kind.RESTRICT))
        self.asked.append((deactivate(self.world, self.choice.choice(PEOPLE), kind), kind))

    def withdraw(self) -> None:
        if self.asked:
            request_id, kind = self.choice.choice(self.asked)
            with suppress(ConflictError):
                withdraw(self.world, request_id, lifts.revoke if kind is Kind.ERASE else lifts.lift)

    def train(self) -> None:
        """Perhaps no more than the queueing."""
        steps.rebuild_model(self.world.context, self.world.model_id)
        if self.choice.random() < 0.7:
            train_queued(self.world.context)

    def swap(self) -> None:
        steps.publish_model(self.world.context, self.world.model_id)
        steps.plan_targets(self.world.context, self.world.model_id)
        Barrier(self.world.pool, margin=0.05).look()

    def finish(self) -> None:
        if self.asked:
            self.world.finish(self.choice.choice(self.asked)[0])

    def hold(self) -> None:
        with suppress(ConflictError):  # nobody is left to hold
            self.held.append(hold(self.world, self.choice.choice(PEOPLE)))

    def release(self) -> None:
        if self.held:
            with suppress(ConflictError):  # placed twice
                release(self.world, self.held.pop())

    def change(self) -> None:
        kinds: tuple[PolicyKind, ...] = ("now", "rebuild_first")
        self.policy(self.choice.choice(kinds))

    def end_waiting(self) -> None:
        with transaction(self.world.pool) as connection:
            deferrals.end(connection, self.world.model_id)
        steps.plan_targets(self.world.context, self.world.model_id)

    def policy(self, kind: PolicyKind) -> None:
        with transaction(self.world.pool) as connection:
            set_policy(connection, "tiny", Policy(kind=kind), actor=self.world.actor)


@pytest.mark.parametrize("seed", range(4))
def test_what_waits_beside_everything_else(world: Copy, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(steps, "SPACING_SECONDS", 0)
    monkeypatch.setattr(deferrals, "LOAD_SECONDS", 0)
    before = served(world)
    history = History(world, seed)
    for _ in range(STEPS):
        history.step()
    while history.held:
        history.release()
    for request_id, kind in history.asked:
        with suppress(ConflictError):
            withdraw(world, request_id, lifts.revoke if kind is Kind.ERASE else lifts.lift)
    history.policy("now")
    with transaction(world.pool) as connection:
        models.mark_rebuild_wanted(connection, world.model_id, forced=True)
    history.swap()
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    history.swap()
    world.finish(*(request_id for request_id, _ in history.asked))
    history.check()
    assert world.row("SELECT canonical FROM model_version ORDER BY version DESC LIMIT 1") == (True,)
    assert {world.shown(request_id)[0] for request_id, _ in history.asked} <= {"completed", "lifted", "revoked"}
    if not world.rows("SELECT 1 FROM tombstone WHERE erased_at IS NOT NULL"):
        assert served(world) == before
