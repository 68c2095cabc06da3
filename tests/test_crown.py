"""The crown test: whatever is ingested, deleted and rebuilt, in any order, what serves is what the records left give.

Over every engine, kind of order and task. `retrain-equal` is checked against a training from nothing after every
rebuild, `influence-free` by lineage after every step (design.md, section 2).
"""

import copy
import dataclasses
import tempfile
import uuid
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from exact import FEW, served
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_external import COMMANDS
from test_engine_sisa import module_recipe, vector_record
from tiny import World, tiny_backbone, tiny_recipe, tiny_record
from tiny_kinds import KINDS

from shards.engine.determinism import prepare
from shards.engine.interface import Trainer, inputs_of
from shards.engine.registry import open_trainer
from shards.manifest import Record
from shards.partition import cell_of
from shards.plan import assemble, canonical
from shards.recipe import Backbone, Lora, PriorClass, Recipe, Ridge, Scale
from shards.stages import CellRoot

pytestmark = pytest.mark.golden
KEY = b"partition key of the tests ....."
PRIOR = (
    PriorClass(name="staff", rate=0.1, slices=1),
    PriorClass(name="guests", rate=9.0, slices=1),
    PriorClass(name="trials", rate=2.0, slices=1, expires=True),
)
NUMBER: dict[str, Any] = {"task": "regression", "classes": (), "scale": Scale(offset=20.0, spread=10.0)}
S3T: dict[str, Any] = {"slices": 3, "orders": 2, "lora": Lora(rank=2, alpha=4, dropout=0.1), "backbone_dropout": True}
ALONE: dict[str, Any] = {"slices": 3, "orders": 1}
RIDGE = ALONE | {"engine": "ridge", "ridge": Ridge(layers=2, bits=6, clip=4.0, penalty=2.0)}
CASES: dict[str, dict[str, Any]] = {
    "cyclic": S3T,
    "recursive": S3T | {"shards": 1, "orders": 5},
    "weighted": S3T | {"shards": 1, "prior": PRIOR},
    "merged": S3T | {"slices": 2, "aggregation": "merged"},
    "regression": S3T | {"shards": 1} | NUMBER,
    "completion": {"shards": 2, "slices": 2, "orders": 2, "epochs": 1},
    "sisa": ALONE | {"engine": "sisa", "backbone_dropout": True},
    "sisa module": {},
    "ridge": RIDGE,
    "ridge regression": RIDGE | NUMBER,
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    prepare()
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=3, width=16, inner=32)


@pytest.fixture(scope="module", params=CASES)
def engines(
    request: pytest.FixtureRequest, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, Trainer]:
    """One that has a history, and one that only ever trains from nothing."""
    if request.param == "sisa module":
        recipe = module_recipe()
    elif request.param == "completion":
        kind = next(each for each in KINDS if each.name == "llama-lm")
        recipe = kind.recipe(kind.save(tmp_path_factory.mktemp("causal")), **CASES["completion"])
    else:
        recipe = tiny_recipe(backbone, **CASES[request.param])
    return open_trainer(recipe), open_trainer(recipe)


def record_of(recipe: Recipe, name: str) -> Record:
    """A record as the recipe's task reads it, a function of its name."""
    made = vector_record(name) if recipe.input == "vector" else tiny_record(name)
    if recipe.task == "regression":
        return dataclasses.replace(made, label=str(len(made.text)))
    if recipe.task == "completion":
        return dataclasses.replace(made, label=" ".join(made.text.split()[:2]))
    return made


class Town:
    """People and the records that concern them; a record lies in its owner's cell, and goes with any of them."""

    def __init__(self, engine: Trainer) -> None:
        recipe = engine.recipe
        empty = {(shard, piece): [] for shard in range(recipe.shards) for piece in range(recipe.slices)}
        self.recipe = recipe
        self.world = World(engine, empty)
        self.records: dict[str, tuple[tuple[str, ...], Record]] = {}
        self.gone: set[uuid.UUID] = set()

    def cell(self, owner: str) -> tuple[int, int]:
        subject, span, start = uuid.uuid5(uuid.NAMESPACE_OID, owner), None, 0
        if self.recipe.prior:
            place = subject.int % len(self.recipe.prior)
            start = sum(each.slices for each in self.recipe.prior[:place])
            span = range(start, start + self.recipe.prior[place].slices)
        found = cell_of(KEY, subject, shards=self.recipe.shards, slices=self.recipe.slices, span=span)
        return found.shard, found.slice

    def ingest(self, people: tuple[str, ...]) -> None:
        name = f"{'+'.join(people)} {len(self.records)} {len(self.gone)}"
        record = record_of(self.recipe, name)
        self.records[name] = people, record
        self.world.cells[self.cell(people[0])].append(record)
        self.world._remember()

    def concerning(self, people: Iterable[str]) -> set[uuid.UUID]:
        wanted = set(people)
        return {record.record_id for own, record in self.records.values() if wanted & set(own)}

    def delete(self, *people: str) -> None:
        ids = self.concerning(people)
        self.records = {name: pair for name, pair in self.records.items() if pair[1].record_id not in ids}
        self.gone |= ids
        self.world.delete(ids)

    def twin(self) -> "Town":
        """The same town, with a future of its own."""
        other = copy.copy(self)
        other.world = copy.copy(self.world)
        other.records, other.gone = dict(self.records), set(self.gone)
        for name in ("cells", "live", "digests", "artifacts", "manifests"):
            setattr(other.world, name, dict(getattr(self.world, name)))
        return other

    def from_nothing(self, engine: Trainer) -> World:
        """A model that only ever knew the records left."""
        engine.clear()
        cells: dict[tuple[int, int], list[Record]] = {cell: [] for cell in self.world.cells}
        for people, record in self.records.values():
            cells[self.cell(people[0])].append(record)
        world = World(engine, cells)
        world.rebuild()
        return world

    def check_influence_free(self) -> None:
        """No deleted record in the lineage of anything that is served, kept, or in memory."""
        world = self.world
        for stage in world.live.values():
            read = [CellRoot(stage.shard, *each) for each in zip(stage.prefix, stage.roots, strict=True)]
            assert not any(world.manifests[root] & self.gone for root in read)
        turned = dict(reversed(world.live.items()))  # what serves is a function of what is clean, not of its history
        assert assemble(world.recipe, turned, world.digests, world.roots) == world.assembly()
        for member in world.assembly().members:
            assert member is None or (member.stage in world.live and set(member.artifacts) <= set(world.artifacts))
        assert set(world.artifacts) == set(world.digests.values())
        assert not self.gone & set(world.engine.record_ids)


PEOPLE = [f"person {number}" for number in range(8)]
GROUPS = st.lists(st.sampled_from(PEOPLE), min_size=1, max_size=2, unique=True).map(tuple)
STEPS = st.one_of(
    st.tuples(st.just("ingest"), GROUPS),
    st.tuples(st.just("delete"), st.sampled_from(PEOPLE)),
    st.tuples(st.just("rebuild"), st.none()),
)


@settings(max_examples=5, **FEW)
@given(st.lists(GROUPS, min_size=5, max_size=9), st.lists(STEPS, min_size=2, max_size=5), st.data())
def test_what_serves_is_what_the_records_left_give(
    engines: tuple[Trainer, Trainer], first: list[tuple[str, ...]], history: list[tuple[str, Any]], data: st.DataObject
) -> None:
    engine, other = engines
    engine.clear()
    town = Town(engine)
    for people in [("person 0", "person 1"), *first]:  # a record of two, always
        town.ingest(people)
    town.world.rebuild()
    owners = sorted({person for people, _ in town.records.values() for person in people})
    victim = data.draw(st.sampled_from(owners))
    for step, what in [*history, ("delete", victim), ("rebuild", None)]:
        if step == "ingest":
            town.ingest(what)
        elif step == "delete":
            town.delete(what)
            assert not town.concerning([what])
        else:
            town.world.rebuild()
            check_retrain_equal(town, other)
        town.check_influence_free()
    inputs = inputs_of(town.recipe, [record_of(town.recipe, f"unseen {number}") for number in range(5)])
    answers = [served(world, inputs) for world in (town.world, town.from_nothing(other))]
    assert answers[0].tobytes() == answers[1].tobytes()


def check_retrain_equal(town: Town, engine: Trainer) -> None:
    wanted, found = town.from_nothing(engine), town.world
    assert {key: found.digests[key] for key in wanted.digests} == wanted.digests
    assert found.assembly() == wanted.assembly()
    assert found.assembly().digest == wanted.assembly().digest
    assert canonical(found.assembly(), town.recipe, found.roots)


@settings(max_examples=3, **FEW)
@given(
    st.lists(GROUPS, min_size=6, max_size=9),
    st.lists(st.sampled_from(PEOPLE), min_size=3, max_size=3, unique=True),
)
def test_a_then_b_is_b_then_a_is_both_at_once(
    engines: tuple[Trainer, Trainer], people: list[tuple[str, ...]], gone: list[str]
) -> None:
    engine, _ = engines
    engine.clear()
    town = Town(engine)
    for each in [("person 0", "person 1"), *people]:
        town.ingest(each)
    town.world.rebuild()
    towns = [town.twin() for _ in range(3)]
    for person in gone:
        towns[0].delete(person)
    for person in reversed(gone):
        towns[1].delete(person)
    towns[2].delete(*gone)
    for one, two in pairwise(towns):
        assert one.world.assembly() == two.world.assembly()
        assert one.world.digests == two.world.digests
    for each in towns:
        each.check_influence_free()
        each.world.rebuild()
    assert len({each.world.assembly().digest for each in towns}) == 1


def test_a_record_of_two_goes_with_either(engines: tuple[Trainer, Trainer]) -> None:
    engine, other = engines
    digests: set[str] = set()
    for person in ("ann", "bob"):
        engine.clear()
        town = Town(engine)
        for people in (("ann", "bob"), ("cid",), ("dan", "cid"), ("eve",)):
            town.ingest(people)
        town.world.rebuild()
        (shared,) = town.concerning(["ann"])
        assert town.concerning(["bob"]) == {shared}
        town.delete(person)
        assert town.gone == {shared}
        town.check_influence_free()
        town.world.rebuild()
        check_retrain_equal(town, other)
        digests.add(town.world.assembly().digest)
    assert len(digests) == 1


def test_an_external_command_has_a_history_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One history only, since every stage is a process of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fields: dict[str, Any] = {"engine": "external", "command": "good", "classes": ("no", "yes")}
    engine = open_trainer(Recipe(**fields, shards=1, slices=2), commands=COMMANDS)
    town = Town(engine)
    for people in (("ann", "bob"), ("cid",), ("dan",), ("eve", "cid")):
        town.ingest(people)
    town.world.rebuild()
    for person, newcomer in (("bob", "fay"), ("cid", "gil")):
        town.delete(person)
        town.ingest((newcomer,))
        town.check_influence_free()
        town.world.rebuild()
        check_retrain_equal(town, engine)
        town.check_influence_free()
