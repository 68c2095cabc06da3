"""Random histories of restrict, object, lift, erase, revoke, hold and release: what serves is a function of the active
records alone, and nothing that is held is ever erased."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

import pytest
from world_copies import Copy

from service.domain.errors import ConflictError
from service.domain.requests import Kind
from service.evidence.verify import verify
from service.store import holds, leases, lifts, models, payloads, publish, stages
from service.store.database import transaction
from shards import plan
from shards.manifest import Manifest
from shards.stages import CellRoot, Stage
from workers import steps
from workers.barrier import Barrier
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration

PEOPLE = ("ann", "bob", "cid", "s1", "s2", "s3")
STEPS = 16


@dataclass(frozen=True)
class Row:
    """A record as it was ingested."""

    cell_id: int
    place: tuple[int, int]
    commitment: bytes
    subjects: frozenset[UUID]


@dataclass
class History:
    """Does things to a world, and knows by other means than the code under test what must then be true."""

    world: Copy
    choice: random.Random
    rows: dict[UUID, Row] = field(default_factory=dict)
    standing: dict[UUID, tuple[Kind, frozenset[UUID]]] = field(default_factory=dict)
    """Requests that were planned and not withdrawn: kind and records."""
    held: dict[UUID, UUID] = field(default_factory=dict)
    """Open holds -> subject."""
    members: dict[CellRoot, frozenset[UUID]] = field(default_factory=dict)
    """What each manifest that ever was the active records' holds."""
    erased: set[UUID] = field(default_factory=set)

    def __post_init__(self) -> None:
        query = """
            SELECT r.record_id, r.cell_id, c.shard, c.slice, r.commitment,
                   (SELECT array_agg(s.subject_id) FROM record_subject s WHERE s.record_id = r.record_id)
            FROM record r JOIN cell c USING (cell_id)"""
        for record_id, cell_id, shard, piece, commitment, subjects in self.world.rows(query):
            self.rows[record_id] = Row(cell_id, (shard, piece), bytes(commitment), frozenset(subjects))
        self.check()

    @property
    def active(self) -> frozenset[UUID]:
        out = {record_id for _, about in self.standing.values() for record_id in about}
        return frozenset(self.rows.keys() - out - self.erased)

    def subject(self, name: str) -> UUID:
        alias = self.world.line(0, name, "x").owner
        return self.world.row("SELECT subject_id FROM subject_alias WHERE digest = %s", alias.digest)[0]

    # What can happen.

    def ask(self, kind: Kind, name: str | None = None) -> UUID:
        if name is None and self.choice.random() < 0.25:  # by record ids
            about = frozenset(self.choice.sample(sorted(self.rows.keys() - self.erased), 3))
            request_id = self.world.ask(kind=kind, record_ids=sorted(about), dataset_id=self.world.dataset.dataset_id)
        else:
            name = name or self.choice.choice(PEOPLE)
            subject_id = self.subject(name)
            about = frozenset(i for i, row in self.rows.items() if subject_id in row.subjects) - self.erased
            request_id = self.world.ask(name, kind=kind)
        steps.plan_targets(self.world.context, self.world.model_id)
        Barrier(self.world.pool, margin=0.05).look()
        if about:
            assert self.world.shown(request_id) == ("deactivated", None)
            self.standing[request_id] = (kind, about)
        return request_id

    def withdraw(self, request_id: UUID) -> None:
        kind = self.standing[request_id][0]
        verb, other = (lifts.revoke, lifts.lift) if kind is Kind.ERASE else (lifts.lift, lifts.revoke)
        about = {"actor": self.world.actor, "reason_code": "withdrawn"}
        with transaction(self.world.pool) as connection, pytest.raises(ConflictError):
            other(connection, request_id, **about)
        with transaction(self.world.pool) as connection:
            verb(connection, request_id, **about)
        assert self.world.shown(request_id) == ("revoked" if kind is Kind.ERASE else "lifted", None)
        del self.standing[request_id]

    def withdraw_one(self) -> None:
        """Any that can be: not an erasure that has begun."""
        states = {i: self.world.shown(i)[0] for i in self.standing}
        can = [i for i, (kind, _) in self.standing.items() if kind is not Kind.ERASE or states[i] == "deactivated"]
        for request_id in self.standing.keys() - set(can):
            with transaction(self.world.pool) as connection, pytest.raises(ConflictError, match="no way back from it"):
                lifts.revoke(connection, request_id, actor=self.world.actor, reason_code="late")
        if can:
            self.withdraw(self.choice.choice(can))

    def hold(self) -> None:
        name = self.choice.choice(PEOPLE)
        with transaction(self.world.pool) as connection:
            alias = self.world.line(0, name, "x").owner
            found = holds.place(connection, alias, actor=self.world.actor, reason_code="litigation")
        self.held[found.hold_id] = self.subject(name)

    def release(self) -> None:
        if self.held:
            hold_id = self.choice.choice(sorted(self.held))
            with transaction(self.world.pool) as connection:
                holds.release(connection, hold_id, actor=self.world.actor)
            del self.held[hold_id]

    def rebuild(self) -> None:
        steps.rebuild_model(self.world.context, self.world.model_id)
        train_queued(self.world.context)
        steps.publish_model(self.world.context, self.world.model_id)

    def finish(self) -> None:
        """Erasures and certificates, as the relay would ring for them."""
        protected = {i for i, row in self.rows.items() if row.subjects & set(self.held.values())}
        self.world.finish(*self.standing)
        for request_id, (kind, about) in self.standing.items():
            if kind is not Kind.ERASE:
                assert self.world.shown(request_id) == ("completed", "restricted")
            elif about & protected - self.erased:
                assert self.world.shown(request_id) == ("deactivated", None)
            else:
                assert self.world.shown(request_id) == ("completed", "erased")
        for kind, about in self.standing.values():
            if kind is Kind.ERASE and not about & protected - self.erased:
                self.erased |= about

    # What must be true.

    def roots(self) -> dict[int, dict[int, str]]:
        """Roots of the active records, hashed anew."""
        grid: dict[int, dict[int, str]] = {}
        for shard in range(self.world.recipe.shards):
            for piece in range(self.world.recipe.slices):
                inside = frozenset(i for i in self.active if self.rows[i].place == (shard, piece))
                root = Manifest.of(self.rows[i].commitment for i in inside).root
                grid.setdefault(shard, {})[piece] = root
                self.members[CellRoot(shard, piece, root)] = inside
        return grid

    def check(self) -> None:
        roots, active = self.roots(), self.active
        with transaction(self.world.pool) as connection:
            model = models.get_model_by_id(connection, self.world.model_id)
            found = stages.list_open(connection, model.model_id, model.recipe_digest)
            served = models.find_served(connection, model.model_id, model.version)
            offered = {each.digest for each in leases.list_clean_artifacts(connection, model.model_id)}
            candidate = publish.candidate(connection, model)

        def clean(stage: Stage) -> bool:
            return all(self.members[root] <= active for root in stage.lineage)

        live = {key: stage for key, stage in found.live().items() if clean(stage)}
        expected = plan.assemble(self.world.recipe, live, found.digests, roots)
        assert served == candidate.assembly.digest == expected.digest
        assert offered == {found.digests[key] for key in live}
        assert not self.world.rows("SELECT 1 FROM record WHERE record_id = ANY(%s)", list(self.erased))
        there = {
            stored.record.record_id
            for (name,) in self.world.rows("SELECT object_name FROM cell WHERE object_name IS NOT NULL")
            for stored in payloads.decode(self.world.context.artifacts.get(name))
        }
        assert there == self.rows.keys() - self.erased  # whatever is held or restricted lies there, sealed


@pytest.fixture(autouse=True)
def _no_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SPACING_SECONDS", 0)


@pytest.mark.parametrize("seed", range(4))
def test_what_serves_is_a_function_of_the_active_records(world: Copy, seed: int) -> None:
    history = History(world, random.Random(seed))
    before = history.world.row("SELECT assembly FROM model_version ORDER BY version DESC LIMIT 1")
    things: list[tuple[Callable[[], object], int]] = [
        (lambda: history.ask(Kind.RESTRICT), 5),
        (lambda: history.ask(Kind.OBJECT), 2),
        (lambda: history.ask(Kind.ERASE), 2),
        (history.withdraw_one, 7),
        (history.hold, 2),
        (history.release, 1),
        (history.rebuild, 4),
        (history.finish, 1),
    ]
    for _ in range(STEPS):
        (thing,) = history.choice.choices([each for each, _ in things], [weight for _, weight in things])
        thing()
        history.check()
    while history.held:
        history.release()
    for request_id in [i for i, (kind, _) in history.standing.items() if kind is not Kind.ERASE]:
        history.withdraw(request_id)
        history.check()
    history.finish()
    history.check()
    assert not history.standing or {kind for kind, _ in history.standing.values()} == {Kind.ERASE}
    history.rebuild()
    history.check()
    assert world.row("SELECT canonical FROM model_version ORDER BY version DESC LIMIT 1") == (True,)
    if not history.erased:
        assert world.row("SELECT assembly FROM model_version ORDER BY version DESC LIMIT 1") == before
    for (envelope,) in world.rows("SELECT envelope FROM certificate"):
        assert [check for check in verify(envelope, world.public_key) if not check.passed] == []
