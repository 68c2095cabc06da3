"""Random histories of gate, canary and rollback: deletions wait for none of them, and nothing tainted ever serves."""

import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
from releases import (
    PASSING,
    REFUSING,
    build,
    delete,
    depth,
    evaluated,
    model_of,
    receive,
    served,
    set_canary,
    set_gate,
)
from serving_kit import serving, wait_until
from world_copies import SUBJECTS, Copy

from service.domain.errors import ConflictError
from service.domain.release import Canary
from service.settings import Settings
from service.store import api_keys, canaries, models, overrides, rollbacks
from service.store.database import Connection, transaction
from shards.engine.registry import open_reader
from workers import steps
from workers.barrier import Barrier
from workers.gate import evaluate_model

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration

STEPS = 18
TAINTED = """
SELECT sc.stage_key FROM stage_cell sc JOIN tombstone t ON t.cell_id = sc.cell_id AND t.lifted_at IS NULL
WHERE sc.stage_key = ANY(%s) AND t.added <= sc.generation AND (t.removed IS NULL OR t.removed > sc.generation)
"""


@pytest.fixture(autouse=True)
def _no_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SPACING_SECONDS", 0)


@dataclass
class History:
    world: Copy
    choice: random.Random
    left: list[str] = field(default_factory=lambda: sorted(SUBJECTS))
    bounds: tuple[int, int] = (0, 0)
    seen: set[str] = field(default_factory=set)
    """What really happened, so that a history of refusals does not pass for one."""

    def delete(self) -> None:
        subject = self.left.pop(self.choice.randrange(len(self.left)))
        delete(self.world, subject)  # says `deactivated` though nothing but planner and barrier ran
        model = model_of(self.world)
        assert (model.stable, model.floor) == (None, model.version)

    def evaluate(self) -> None:
        if evaluate_model(self.world.context, self.world.model_id) is not None:
            self.seen.add("passed")

    def release(self) -> None:
        build(self.world)
        self.evaluate()

    def publish(self) -> None:
        steps.publish_model(self.world.context, self.world.model_id)

    def gate(self) -> None:
        set_gate(self.world, self.choice.choice([None, REFUSING, PASSING, PASSING]))

    def canary(self) -> None:
        policy = self.choice.choice([None, Canary(20), Canary(50, 0.0001)])
        self.attempt("canary policy", lambda _: set_canary(self.world, policy))

    def attempt(self, name: str, verb: Callable[[Connection], object]) -> None:
        """An operator's word, which may come at the wrong time."""
        try:
            with transaction(self.world.pool) as connection:
                verb(connection)
        except ConflictError:
            return
        self.seen.add(name)

    def promote(self) -> None:
        about = {"actor": self.world.actor, "reason_code": "good"}
        self.attempt("promoted", lambda c: canaries.promote(c, models.lock_model(c, self.world.model_id), **about))

    def abort(self) -> None:
        about = {"actor": self.world.actor, "reason_code": "bad"}
        self.attempt("aborted", lambda c: canaries.abort(c, models.lock_model(c, self.world.model_id), **about))

    def override(self) -> None:
        about = {"actor": self.world.actor, "reason_code": "known"}
        self.attempt("overridden", lambda c: overrides.override(c, "tiny", **about))

    def serve(self) -> None:
        version = self.choice.randint(1, model_of(self.world).version)
        about = {"actor": self.world.actor, "reason_code": "regression"}
        self.attempt("rolled back", lambda c: rollbacks.serve(c, "tiny", version, **about))

    def unpin(self) -> None:
        about = {"actor": self.world.actor, "reason_code": "fixed"}
        self.attempt("unpinned", lambda c: rollbacks.unpin(c, "tiny", **about))

    def check(self) -> None:
        model = model_of(self.world)
        assert self.bounds <= (model.version, model.floor)
        assert model.floor >= self.bounds[1]
        self.bounds = (model.version, model.floor)
        if model.stable is not None:
            self.seen.add("canary")
        for version in {model.version, model.stable or model.version}:
            keys = [member.stage for member in served(self.world, version).members if member]
            assert self.world.rows(TAINTED, keys) == []
        a, b = self.choice.sample(self.left, 2)
        orders = {self.after([[a], [b]]), self.after([[b], [a]]), self.after([[a, b]])}
        assert len(orders) == 1

    def after(self, batches: Sequence[Sequence[str]]) -> str | None:
        """What would serve after these deletions; nothing of it stays."""
        with transaction(self.world.pool) as connection, connection.transaction(force_rollback=True):
            for batch in batches:
                for subject in batch:
                    receive(connection, self.world, subject)
                assert steps.plan_batch(connection, self.world.model_id, counted=True) == len(batch)
            model = models.get_model_by_id(connection, self.world.model_id)
            assert model.floor == model.version
            return models.find_served(connection, model.model_id, model.version)


@pytest.mark.parametrize("seed", range(4))
def test_no_deletion_waits_and_nothing_tainted_serves(world: Copy, seed: int) -> None:
    evaluated(world)
    history = History(world, random.Random(seed))
    set_gate(world, PASSING)
    set_canary(world, Canary(20))
    things: list[tuple[Callable[[], object], int]] = [
        (history.delete, 4),
        (lambda: build(world), 1),
        (history.evaluate, 1),
        (history.release, 6),
        (history.publish, 2),
        (history.gate, 2),
        (history.canary, 1),
        (history.promote, 2),
        (history.abort, 2),
        (history.override, 2),
        (history.serve, 2),
        (history.unpin, 1),
    ]
    for _ in range(STEPS):
        (thing,) = history.choice.choices([each for each, _ in things], [weight for _, weight in things])
        thing()
        history.check()
    assert len(history.seen) >= 2, history.seen
    # Whatever the state: without gate, canary and pin all that is clean serves again, at full depth.
    history.unpin()
    history.abort()
    set_canary(world, None)
    set_gate(world, None)
    Barrier(world.pool, margin=0.05).look()
    build(world)
    history.publish()
    history.check()
    assert depth(world) == 4
    assert world.row("SELECT canonical FROM model_version ORDER BY version DESC LIMIT 1") == (True,)


@dataclass
class Front:
    """What `serving_kit` needs to know of a world."""

    found: Settings
    token: str
    name: str = "tiny"

    def settings(self) -> Settings:
        return self.found


def test_through_planner_worker_and_model_server(world: Copy) -> None:
    """A rebuilt version passes its gate, answers its share, is promoted; the next is ended by a deletion; then back."""
    evaluated(world)
    set_gate(world, PASSING)
    set_canary(world, Canary(50))
    with transaction(world.pool) as connection:
        token = api_keys.create(connection, "front", [api_keys.Scope.MODEL_PREDICT])
    settings = world.context.settings.model_copy(update={"lease_ttl_ms": 4000, "drain_ms": 0})
    texts = ("w1 w2 w3", "w7")
    barrier = Barrier(world.pool, margin=0.05)
    with serving(Front(settings, token), factory=partial(open_reader, device="cpu")) as (client, _):  # type: ignore[arg-type]

        def answered(wish: str) -> tuple[int, str]:
            answer = client.predict(*texts, x_expunge_canary=wish)
            assert answer.status_code == 200, answer.text
            return int(answer.headers["x-expunge-version"]), answer.headers["x-expunge-assembly"]

        def ask_and_plan(subject: str) -> int:
            request_id = world.ask(subject)
            steps.plan_targets(world.context, world.model_id)

            def deactivated() -> bool:
                barrier.look()
                return world.states(request_id) == [("deactivated", None)]

            wait_until(deactivated)
            return model_of(world).floor

        assert answered("true") == answered("false") == (1, served(world).digest)
        floor = ask_and_plan("s1")
        build(world)
        assert answered("true")[0] == floor  # at its gate it answers nothing
        evaluate_model(world.context, world.model_id)
        wait_until(lambda: answered("true") == (3, served(world, 3).digest))
        assert answered("false") == (2, served(world, 2).digest)
        with transaction(world.pool) as connection:
            model = models.lock_model(connection, world.model_id)
            canaries.promote(connection, model, actor=world.actor, reason_code="good")
        wait_until(lambda: answered("false")[0] == 3)
        ask_and_plan("s2")
        build(world)
        evaluate_model(world.context, world.model_id)
        wait_until(lambda: answered("true")[0] == 5)
        assert answered("false")[0] == 4
        floor = ask_and_plan("s3")
        assert {answered(wish)[0] for wish in ("true", "false")} == {floor}
        with transaction(world.pool) as connection:
            about = {"actor": world.actor, "reason_code": secrets.token_hex(4)}
            with pytest.raises(ConflictError):
                rollbacks.serve(connection, "tiny", 5, **about)
            back = rollbacks.serve(connection, "tiny", floor, **about)
        wait_until(lambda: answered("true") == (back, served(world, floor).digest))
