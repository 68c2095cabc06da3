from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.assembly import Assembly
from shards.plan import ancestry, assemble, canonical, missing, tainted
from shards.recipe import Recipe
from shards.stages import CellRoot, Stage, chain

Hit = tuple[int, int]


def recipe(shards: int, slices: int, orders: int, engine: str = "s3t") -> Recipe:
    return Recipe.from_json(
        {
            "backbone": {"source": "/somewhere", "digest": "d" * 64},
            "classes": ["no", "yes"],
            "shards": shards,
            "slices": slices,
            "orders": orders,
            "engine": engine,
        }
    )


@dataclass
class Ledger:
    """Stages and manifests as values: training is a digest of the key."""

    recipe: Recipe
    version: dict[Hit, int] = field(default_factory=dict)
    live: dict[str, Stage] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        return self.recipe.shards

    @property
    def slices(self) -> int:
        return self.recipe.slices

    @property
    def roots(self) -> dict[int, dict[int, str]]:
        return {s: {p: self.root(s, p) for p in range(self.slices)} for s in range(self.shards)}

    def root(self, shard: int, piece: int) -> str:
        return f"root-{shard}-{piece}-{self.version.get((shard, piece), 0)}"

    def train(self) -> None:
        self.live |= {stage.key: stage for stage in missing(self.recipe, self.roots, self.live.keys())}

    def delete(self, hits: Iterable[Hit]) -> set[CellRoot]:
        touched = {CellRoot(s, p, f"root-{s}-{p}-{v}") for s, p in hits for v in range(self.version.get((s, p), 0) + 1)}
        for key in tainted(self.live.values(), touched):
            del self.live[key]
        for hit in hits:
            self.version[hit] = self.version.get(hit, 0) + 1
        return touched

    def assembly(self) -> Assembly:
        digests = {key: f"artefact of {key}" for key in self.live}
        return assemble(self.recipe, self.live, digests, self.roots)


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    slices = draw(st.integers(1, 4))
    ledger = Ledger(recipe(draw(st.integers(1, 3)), slices, draw(st.integers(1, slices))))
    ledger.train()
    return ledger


def hits(ledger: Ledger) -> st.SearchStrategy[set[Hit]]:
    return st.sets(st.tuples(st.integers(0, ledger.shards - 1), st.integers(0, ledger.slices - 1)), max_size=4)


@given(ledgers(), st.data())
def test_deletions_in_any_order_or_at_once_give_one_assembly(ledger: Ledger, data: st.DataObject) -> None:
    a, b = data.draw(hits(ledger)), data.draw(hits(ledger)) - set()
    b -= a  # a second deletion from the same cell bumps its version twice, at once it bumps it once
    copies = [replace(ledger, version={}, live=dict(ledger.live)) for _ in range(3)]
    for copy, batches in zip(copies, ([a, b], [b, a], [a | b]), strict=True):
        for batch in batches:
            copy.delete(batch)
    digests = {copy.assembly().digest for copy in copies}
    assert len(digests) == 1
    for copy in copies:
        copy.train()
    assert {copy.assembly().digest for copy in copies} == {copies[0].assembly().digest}


@given(ledgers(), st.data())
def test_no_tainted_stage_is_served_nor_stood_on(ledger: Ledger, data: st.DataObject) -> None:
    everything = dict(ledger.live)
    out: set[CellRoot] = set()
    for _ in range(data.draw(st.integers(1, 3))):
        out |= ledger.delete(data.draw(hits(ledger)))
        if data.draw(st.booleans()):
            ledger.train()
            everything |= ledger.live
        for member in ledger.assembly().members:
            if member is not None:
                line = ancestry(everything[member.stage], everything)
                assert line is not None
                assert not out & set().union(*(stage.lineage for stage in line))
                assert len(member.artifacts) == len(member.prefix)


@given(ledgers(), st.data())
def test_the_longest_clean_prefix_serves(ledger: Ledger, data: st.DataObject) -> None:
    hit = data.draw(hits(ledger))
    ledger.delete(hit)
    for shard, depth in enumerate(ledger.assembly().depths):
        dirty = {piece for s, piece in hit if s == shard}
        clean = [
            next((i for i, piece in enumerate(order) if piece in dirty), ledger.slices)
            for order in ledger.recipe.slice_orders
        ]
        assert depth == max(clean)


@given(ledgers(), st.data())
def test_missing_names_parents_first_and_rebuilding_it_is_canonical(ledger: Ledger, data: st.DataObject) -> None:
    ledger.delete(data.draw(hits(ledger)))
    known = set(ledger.live)
    for stage in missing(ledger.recipe, ledger.roots, known):
        assert stage.key not in known
        assert stage.parent is None or stage.parent in known
        known.add(stage.key)
    ledger.train()
    assert canonical(ledger.assembly(), ledger.recipe, ledger.roots)
    assert missing(ledger.recipe, ledger.roots, ledger.live.keys()) == ()


def test_a_stage_without_its_parent_does_not_serve() -> None:
    ledger = Ledger(recipe(1, 3, 1))
    ledger.train()
    first = next(stage for stage in ledger.live.values() if stage.depth == 1)
    del ledger.live[first.key]
    assert ledger.assembly().depths == (0,)
    assert not canonical(ledger.assembly(), ledger.recipe, ledger.roots)


def test_of_two_stages_of_one_prefix_the_fresher_serves() -> None:
    ledger = Ledger(recipe(1, 2, 1))
    ledger.train()
    ledger.version[0, 1] = 1  # records came in; nothing is tainted
    ledger.train()
    member = ledger.assembly().members[0]
    assert member is not None
    assert member.stage == chain(ledger.recipe.digest, 0, (0, 1), ledger.roots[0])[-1].key


def test_an_assembly_survives_json() -> None:
    ledger = Ledger(recipe(2, 2, 2))
    ledger.train()
    ledger.delete({(1, 0), (1, 1)})
    body = ledger.assembly()
    assert body.depths == (2, 0)
    assert Assembly.from_json(body.to_json()).digest == body.digest


@pytest.mark.parametrize(
    "change", [{"recipe": "other"}, {"shard": 1}, {"roots": ("a", "c")}, {"prefix": (1, 0)}, {"parent": None}]
)
def test_a_stage_key_covers_all_that_decides_the_stage(change: dict[str, object]) -> None:
    stage = chain("recipe", 0, (0, 1), {0: "a", 1: "b"})[-1]
    assert replace(stage, **change).key != stage.key  # type: ignore[arg-type]


def test_a_chain_is_linked_by_keys() -> None:
    stages = chain("recipe", 0, (2, 0, 1), {0: "a", 1: "b", 2: "c"})
    assert [stage.parent for stage in stages] == [None, stages[0].key, stages[1].key]
    assert [stage.roots for stage in stages] == [("c",), ("c", "a"), ("c", "a", "b")]
    assert stages[1].lineage == {CellRoot(0, 2, "c"), CellRoot(0, 0, "a")}


@given(st.integers(1, 3), st.integers(1, 4), st.data())
def test_of_engine_ridge_every_clean_cell_serves(shards: int, slices: int, data: st.DataObject) -> None:
    ledger = Ledger(recipe(shards, slices, 1, "ridge"))
    ledger.train()
    assert canonical(ledger.assembly(), ledger.recipe, ledger.roots)
    gone = data.draw(hits(ledger))
    ledger.delete(gone)
    served = ledger.assembly()
    assert served.aggregation == "sums"
    assert [member is None for member in served.members] == [
        (shard, piece) in gone for shard in range(shards) for piece in range(slices)
    ]
    assert canonical(served, ledger.recipe, ledger.roots) == (not gone)
    ledger.train()
    assert canonical(ledger.assembly(), ledger.recipe, ledger.roots)
