import dataclasses
import hashlib
import json
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import World, manifest_root, tiny_backbone, tiny_recipe, tiny_record, tiny_records
from tiny_kinds import KINDS, Kind

from shards.digest import sha256_hex
from shards.engine import schedule
from shards.engine.artifacts import decode, encode
from shards.engine.determinism import prepare
from shards.engine.interface import inputs_of
from shards.engine.modules import source_digest
from shards.engine.replay import replay
from shards.engine.sisa import Sisa
from shards.engine.sisa_reader import SisaReader
from shards.engine.window import Batch
from shards.errors import ArtifactDigestError, DivergedError, MemoryShortageError, ModuleError, RecipeError, ShardsError
from shards.logits import mean_of_logits
from shards.manifest import Record
from shards.plan import ancestry, canonical
from shards.recipe import Module, Recipe, Scale
from shards.stages import Stage, chain

pytestmark = pytest.mark.golden
SEVERAL = {"orders": 1, "slices": 3, "shards": 2, "epochs": 2, "engine": "sisa", "seed": 7}
Cells = Mapping[int, Sequence[Record]]


def module_of(name: str, **arguments: Any) -> Module:
    path = f"toy_module:{name}"
    return Module(path=path, digest=source_digest(path), width=6, arguments=arguments)


def module_recipe(name: str = "Plain", **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "module": module_of(name),
        "input": "vector",
        "classes": ("no", "yes"),
        "batch_size": 4,
        "learning_rate": 1e-2,
    }
    return Recipe(**(SEVERAL | fields | changes))


def vector_record(name: str, label: str | None = None, width: int = 6) -> Record:
    """A record that is a function of its name: numbers about the label, and noise."""
    made = tiny_record(name, label=label)
    noise = np.frombuffer(hashlib.sha512(name.encode()).digest()[:width], np.uint8) / 256
    shift = 0.5 if made.label == "yes" else 0.0
    return dataclasses.replace(made, text=json.dumps([round(float(each) + shift, 4) for each in noise]))


def vectors(count: int, tag: str) -> list[Record]:
    return [vector_record(f"{tag}{number}") for number in range(count)]


CELLS = {0: vectors(6, "a"), 1: vectors(7, "b"), 2: vectors(5, "c")}
TEXTS = {0: tiny_records(6, "a"), 1: tiny_records(7, "b"), 2: tiny_records(5, "c")}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    prepare()


@pytest.fixture(scope="module", params=["Plain", "Normed", "regression"])
def engine(request: pytest.FixtureRequest) -> Sisa:
    if request.param == "regression":
        module = module_of("Plain", outputs=1)
        return Sisa(module_recipe(module=module, classes=(), task="regression", scale=Scale(offset=2.0, spread=4.0)))
    return Sisa(module_recipe(request.param))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def texts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sisa:
    backbone = tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2, width=16, inner=32)
    return Sisa(tiny_recipe(backbone, **SEVERAL, backbone_dropout=True, precision=request.param))


def of_task(engine: Sisa, cells: Cells = CELLS) -> dict[int, list[Record]]:
    """The records with labels that the engine's task reads."""
    if engine.recipe.task != "regression":
        return {piece: list(records) for piece, records in cells.items()}
    return {piece: [dataclasses.replace(r, label=str(3 * len(r.text))) for r in rs] for piece, rs in cells.items()}


def stages_of(engine: Sisa, cells: Cells, shard: int = 0) -> tuple[Stage, ...]:
    return chain(
        engine.recipe.digest, shard, range(len(cells)), {p: manifest_root(list(rs)) for p, rs in cells.items()}
    )


def train(engine: Sisa, cells: Cells, shard: int = 0) -> list[bytes]:
    artifacts: list[bytes] = []
    for stage in stages_of(engine, cells, shard):
        records = [record for piece in stage.prefix for record in cells[piece]]
        artifacts.append(engine.train(stage, records, artifacts))
    return artifacts


def test_a_stage_is_a_function_of_its_record_set(engine: Sisa) -> None:
    cells = of_task(engine)
    once = train(engine, cells)
    torch.manual_seed(99)
    train(engine, of_task(engine, {0: vectors(3, "z"), 1: vectors(2, "y")}), shard=1)
    turned = {piece: list(reversed(records)) for piece, records in cells.items()}
    state = torch.get_rng_state()
    assert train(engine, turned) == once
    assert torch.equal(torch.get_rng_state(), state)
    fresh = Sisa(engine.recipe, cache_bytes=100)
    assert train(fresh, cells) == once
    assert 0 < fresh.held_bytes <= 100


def test_a_pretrained_model_is_a_function_of_its_record_set(texts: Sisa) -> None:
    once = train(texts, TEXTS)
    texts.clear()
    assert train(texts, {piece: list(reversed(records)) for piece, records in TEXTS.items()}) == once
    first, last = decode(once[0]).tensors, decode(once[2]).tensors
    moved = {name for name, tensor in last.items() if not torch.equal(tensor, first[name])}
    frozen = {name for name in last if "position_ids" in name or "token_type_ids" in name}
    assert set(last) - moved <= frozen | {name for name in last if name.endswith("key.bias")}
    assert all(tensor.dtype in {torch.float32, torch.int64} for tensor in last.values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.task == "classification"], ids=lambda kind: kind.name)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_every_kind_of_backbone_is_trained_whole_and_served(kind: Kind, task: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"engine": "sisa", "precision": "bfloat16" if task == "classification" else "float32"}
    if task == "regression":
        changes |= {"task": task, "classes": (), "scale": Scale(offset=12.0, spread=8.0)}
    recipe = kind.recipe(kind.save(tmp_path), learning_rate=1e-3, **changes)
    engine = Sisa(recipe)
    labels = {} if task == "classification" else {"label": "7.5"}
    cells = {piece: [kind.record(f"k{piece}{number}", **labels) for number in range(4)] for piece in range(2)}
    made = train(engine, cells)
    assert train(engine, cells) == made
    first, second = (decode(artifact).tensors for artifact in made)
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    assert len(moved) > 0.7 * len(first)
    assert any(kind.layers + ".0." in name for name in moved)
    assert any(name.startswith(tuple(head + "." for head in engine.backbone.heads)) for name in moved)  # type: ignore[union-attr]
    reader, ensemble = served(engine, {0: made}, cells, depth=2)
    inputs = inputs_of(recipe, [record for records in cells.values() for record in records] * 5)
    together = ensemble.logits(inputs)
    assert together.shape == (40, recipe.outputs)
    assert len(np.unique(together[:8], axis=0)) > 3  # bfloat16 has few numbers
    assert np.array_equal(ensemble.logits(inputs[::-1])[::-1], together)
    assert np.array_equal(ensemble.logits(inputs[3:4]), together[3:4])
    assert reader.purity == "batched"


def test_resuming_at_a_stage_boundary_changes_nothing(engine: Sisa) -> None:
    cells = of_task(engine)
    first, second, third = train(engine, cells)
    stage = stages_of(engine, cells)[2]
    assert Sisa(engine.recipe).train(stage, [r for rs in cells.values() for r in rs], [first, second]) == third


def test_stages_are_equal_in_another_process(texts: Sisa) -> None:
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_engine_sisa as t\n"
        "t.prepare(); backbone = t.tiny_backbone(t.Path(sys.argv[2]), layers=2, width=16, inner=32)\n"
        "own = t.Sisa(t.module_recipe('Normed'))\n"
        "hf = t.Sisa(t.tiny_recipe(backbone, **t.SEVERAL, backbone_dropout=True, precision=sys.argv[3]))\n"
        "print(json.dumps([t.sha256_hex(a) for a in t.train(own, t.CELLS) + t.train(hf, t.TEXTS)]))"
    )
    backbone = texts.recipe.pretrained
    argv = [sys.executable, "-c", program, str(Path(__file__).parent), backbone.source, texts.recipe.precision]
    out = subprocess.run(argv, check=True, capture_output=True, text=True)
    here = train(Sisa(module_recipe("Normed")), CELLS) + train(texts, TEXTS)
    assert json.loads(out.stdout.splitlines()[-1]) == [sha256_hex(artifact) for artifact in here]


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_removing_a_record_changes_exactly_the_stages_that_read_its_slice(engine: Sisa, piece: int) -> None:
    cells = of_task(engine)
    whole, less = train(engine, cells), train(engine, cells | {piece: cells[piece][1:]})
    assert [a == b for a, b in zip(whole, less, strict=True)] == [depth < piece for depth in range(3)]


def test_shards_begin_differently_and_never_from_data(engine: Sisa) -> None:
    empty: Cells = {0: [], 1: [], 2: []}
    here, there = train(engine, empty), train(engine, empty, shard=1)
    assert all(same(decode(a).tensors, decode(here[0]).tensors) for a in here)
    assert not same(decode(here[0]).tensors, decode(there[0]).tensors)


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_buffers_and_frozen_parameters_are_part_of_the_artefact() -> None:
    engine = Sisa(module_recipe("Normed"))
    first, *_, last = (decode(artifact).tensors for artifact in train(engine, CELLS))
    assert {"norm.running_mean", "norm.num_batches_tracked", "offset", "fixed", "first.weight"} <= set(last)
    assert "again.weight" not in last  # tied to the first's
    assert not torch.equal(first["norm.running_mean"], last["norm.running_mean"])
    assert torch.equal(first["fixed"], last["fixed"])
    assert torch.equal(first["offset"], last["offset"])


def test_a_buffer_may_hold_infinities() -> None:
    assert decode(train(Sisa(module_recipe("Masked")), CELLS)[2]).tensors["mask"].isinf().any()


@pytest.mark.parametrize("count", [1, 5, 9])
def test_batch_normalisation_trains_on_any_number_of_records(count: int) -> None:
    cells = {0: CELLS[1][:count], 1: [], 2: []}
    engine = Sisa(module_recipe("Normed", batch_size=4))
    assert train(engine, cells) == train(engine, cells)


OWNERS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=4, max_size=14)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(OWNERS, st.data())
def test_deletions_and_rebuilds_end_in_training_from_nothing(engine: Sisa, places: list[Any], data: Any) -> None:
    """The crown test: random cells, a random history of deletions and rebuilds."""
    made = of_task(engine, {0: vectors(len(places), "h")})[0]
    cells = {(s, i): [r for r, p in zip(made, places, strict=True) if p == (s, i)] for s in range(2) for i in range(3)}
    gone = data.draw(st.lists(st.sampled_from(made), min_size=1, max_size=4, unique=True))
    world = World(engine, cells)
    world.rebuild()
    for record in gone:
        world.delete({record.record_id})
        assert record.record_id not in engine.record_ids
        if data.draw(st.booleans()):
            world.rebuild()
    for member in world.assembly().members:
        line = ancestry(world.live[member.stage], world.live) or () if member else ()
        assert not any(world.manifests[root] & {r.record_id for r in gone} for stage in line for root in stage.lineage)
    world.rebuild()
    without = World(Sisa(engine.recipe), {cell: [r for r in rs if r not in gone] for cell, rs in cells.items()})
    without.rebuild()
    assert world.digests == without.digests
    assert world.assembly().digest == without.assembly().digest
    assert canonical(world.assembly(), engine.recipe, world.roots)


def test_a_deletion_keeps_the_stages_before_the_slice_and_replays(texts: Sisa) -> None:
    cells = {(0, piece): records for piece, records in TEXTS.items()} | {(1, piece): [] for piece in range(3)}
    world = World(texts, cells)
    world.rebuild()
    before = world.assembly().members[0]
    world.delete({TEXTS[2][1].record_id})
    after = world.assembly().members[0]
    assert before is not None
    assert after is not None
    assert after.artifacts == before.artifacts[:2]
    line = ancestry(world.live[after.stage], world.live) or ()
    assert replay(texts, line, {piece: world.cells[0, piece] for piece in (0, 1)}) == list(after.artifacts)
    assert texts.record_ids == []


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.lists(st.integers(0, 50), min_size=12, max_size=12))
def test_the_epochs_of_all_stages_add_up(epochs: int, slices: int, sizes: list[int]) -> None:
    recipe = module_recipe(epochs=epochs, slices=slices)
    passes = schedule.stage_epochs(recipe)
    equal = 30
    assert sum(passes * equal * depth for depth in range(1, slices + 1)) == epochs * equal * slices
    seen = Fraction(0)
    for depth in range(1, slices + 1):
        ids = [record.record_id for record in tiny_records(sum(sizes[:depth]))]
        shown = [len(order) for order in schedule.epochs(depth, ids, passes)]
        assert 0 <= sum(shown) - passes * len(ids) < 1
        seen += sum(shown) - passes * len(ids)
        cut = [len(batch) for order in schedule.epochs(depth, ids, passes) for batch in schedule.batches(order, 4)]
        assert sum(cut) == sum(shown)
        assert len(cut) == schedule.steps(len(ids), passes, 4)
        assert all(1 <= size <= 4 for size in cut)
    assert seen < slices


def test_taking_a_record_out_leaves_the_order_of_the_others() -> None:
    ids = [record.record_id for record in tiny_records(20)]
    whole = list(schedule.epochs(3, ids, Fraction(5, 2)))
    less = list(schedule.epochs(3, ids[1:], Fraction(5, 2)))
    assert [len(order) for order in whole] == [20, 20, 10]
    for before, after in zip(whole, less, strict=True):
        rest = [record_id for record_id in before if record_id != ids[0]]
        assert after[: len(rest)] == rest


def test_it_learns() -> None:
    recipe = module_recipe(shards=1, epochs=30)
    engine = Sisa(recipe)
    cells = {piece: vectors(30, f"l{piece}") for piece in range(3)}
    reader, ensemble = served(engine, {0: train(engine, cells)}, cells)
    unseen = vectors(60, "u")
    found = ensemble.logits(inputs_of(recipe, unseen)).argmax(1)
    right = [recipe.classes[place] == record.label for place, record in zip(found, unseen, strict=True)]
    assert np.mean(right) > 0.85
    assert reader.purity == "batched"


def served(engine: Sisa, artifacts: Mapping[int, list[bytes]], cells: Cells, depth: int = 3) -> tuple[SisaReader, Any]:
    """A reader with the first `depth` stages of each shard, and their ensemble."""
    shards = range(engine.recipe.shards)
    world = World(engine, {(shard, piece): list(rs) for shard in shards for piece, rs in cells.items()})
    for shard, made in artifacts.items():
        for stage, data in list(zip(stages_of(engine, cells, shard), made, strict=True))[:depth]:
            world.live[stage.key], world.digests[stage.key] = stage, sha256_hex(data)
    reader = SisaReader(engine.recipe, engine.backbone)
    for made in artifacts.values():
        for data in made[:depth]:
            reader.load(sha256_hex(data), data)
    return reader, reader.build(world.assembly())


@pytest.mark.parametrize("kind", ["Plain", "Normed", "BatchBound", "texts"])
def test_an_answer_depends_on_its_input_alone(texts: Sisa, kind: str) -> None:
    engine, cells = (texts, TEXTS) if kind == "texts" else (Sisa(module_recipe(kind)), CELLS)
    reader, ensemble = served(engine, {shard: train(engine, cells, shard) for shard in (0, 1)}, cells)
    inputs = inputs_of(engine.recipe, [record for records in cells.values() for record in records] * 2)
    together = ensemble.logits(inputs)
    assert together.shape == (36, 2)
    order = np.random.default_rng(0).permutation(36)
    assert np.array_equal(ensemble.logits([inputs[place] for place in order]), together[order])
    for count in (1, 3, 17):
        assert np.array_equal(ensemble.logits(inputs[:count]), together[:count])
    assert reader.purity == ("single" if kind == "BatchBound" else "batched")
    assert np.array_equal(ensemble.answer(reader.prepare(inputs)), together)


def test_the_probe_meets_every_size_of_a_pass(texts: Sisa, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    inner = SisaReader._forward

    def spied(self: SisaReader, batch: Batch, tensors: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        seen.add(batch.rows)
        return inner(self, batch, tensors)

    monkeypatch.setattr(SisaReader, "_forward", spied)
    SisaReader(texts.recipe, texts.backbone)
    assert seen == set(texts._network.sizes)


def test_the_ensemble_is_the_mean_of_its_members_as_previewed(engine: Sisa) -> None:
    cells = of_task(engine)
    made = {shard: train(engine, cells, shard) for shard in (0, 1)}
    inputs = inputs_of(engine.recipe, cells[1])
    singles = [served(engine, {shard: made[shard]}, cells)[1] for shard in (0, 1)]
    both = served(engine, made, cells)[1]
    assert (both.live, singles[0].live) == (2, 1)
    assert np.array_equal(both.logits(inputs), mean_of_logits([single.logits(inputs) for single in singles]))


def test_a_regression_answers_in_its_own_unit() -> None:
    module = module_of("Plain", outputs=1)
    recipe = module_recipe(
        module=module, classes=(), task="regression", scale=Scale(offset=1000.0, spread=50.0), epochs=20, shards=1
    )
    engine = Sisa(recipe)
    cells = {
        piece: [dataclasses.replace(r, label=str(1000 + 40 * json.loads(r.text)[0])) for r in vectors(30, f"q{piece}")]
        for piece in range(3)
    }
    found = served(engine, {0: train(engine, cells)}, cells)[1].logits(inputs_of(recipe, cells[0]))
    wanted = np.array([float(record.label) for record in cells[0]])
    assert np.abs(found[:, 0] - wanted).mean() < 8


def test_weights_leave_the_memory_with_their_artefact() -> None:
    engine = Sisa(module_recipe(shards=1))
    made = train(engine, CELLS)
    reader, ensemble = served(engine, {0: made}, CELLS)
    gone = weakref.ref(ensemble)
    references = reader.drop([sha256_hex(made[2])])
    assert reader.held() == {sha256_hex(data) for data in made[:2]}
    assert any(reference() is not None for reference in references)  # the predictor still has them
    del ensemble
    assert gone() is None
    assert not any(reference() is not None for reference in references)


def test_what_does_not_fit_together_is_refused(engine: Sisa) -> None:
    cells = of_task(engine)
    made = train(engine, cells)
    stage = stages_of(engine, cells)[2]
    records = [record for rs in cells.values() for record in rs]
    strange = train(engine, cells | {0: cells[0][1:]})
    for parents in ([], [made[0]], [made[0], strange[1]], [made[1], made[0]], made):
        with pytest.raises(ArtifactDigestError, match="ancestors"):
            engine.train(stage, records, parents)
    part = decode(made[1])
    cut = {name: tensor[:1] for name, tensor in part.tensors.items() if tensor.dim()}
    with pytest.raises(ArtifactDigestError, match="tensors are not the module's"):
        engine.train(stage, records, [made[0], encode(part.stage, cut)])
    with pytest.raises(RecipeError, match="of recipe"):
        engine.train(dataclasses.replace(stage, recipe="0" * 64), records, made[:2])
    reader = SisaReader(engine.recipe)
    with pytest.raises(ArtifactDigestError, match="damaged"):
        reader.load("0" * 64, made[0])
    foreign = encode(dataclasses.replace(part.stage, recipe="0" * 64), part.tensors)
    with pytest.raises(ArtifactDigestError, match="of recipe"):
        reader.load(sha256_hex(foreign), foreign)
    short = encode(part.stage, cut)
    with pytest.raises(ArtifactDigestError, match="other tensors"):
        reader.load(sha256_hex(short), short)
    with pytest.raises(ArtifactDigestError, match="not in memory"):
        reader.build(served(engine, {0: made}, cells)[1].assembly)
    dead = served(engine, {}, cells)[1]
    with pytest.raises(ShardsError, match="no shard"):
        dead.logits([])


@pytest.mark.parametrize("text", ["w1 w2", "[]", "[1, null]", "[true, 1]", '{"a": 1}', "[NaN]", "[1e999]", "[" * 9999])
def test_an_input_that_is_no_vector_is_refused_without_quoting_it(text: str) -> None:
    engine = Sisa(module_recipe())
    cells = {0: [dataclasses.replace(CELLS[0][0], text=text)]}
    with pytest.raises(RecipeError, match="not a JSON array of 6 finite numbers") as refusal:
        train(engine, cells)
    assert text[:5] not in str(refusal.value) or text == "[]"


def test_vectors_of_another_width_are_refused() -> None:
    engine = Sisa(module_recipe())
    with pytest.raises(RecipeError, match="not a JSON array of 6 finite numbers"):
        train(engine, {0: [CELLS[0][0], vector_record("short", width=5)]})
    narrow = dataclasses.replace(module_of("Plain"), width=5)
    with pytest.raises(ModuleError, match=r"fails on rows of shape \(16, 5\)"):
        Sisa(module_recipe(module=narrow))
    with pytest.raises(RecipeError, match=r"module\.width"):
        module_recipe(module=dataclasses.replace(narrow, width=0))


def test_labels_that_do_not_fit_are_refused(engine: Sisa) -> None:
    with pytest.raises(RecipeError):
        train(engine, {0: [vector_record("q", label="maybe")]})


def test_a_loss_that_is_no_number_names_its_step() -> None:
    with pytest.raises(DivergedError, match="at step 1: lower learning_rate"):
        train(Sisa(module_recipe("Exploding")), CELLS)
    with pytest.raises(DivergedError, match="lower learning_rate"):
        train(Sisa(module_recipe(learning_rate=1e38)), CELLS)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_names_the_fields(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Sisa(module_recipe())

    def forward(_self: object, _rows: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr("toy_module.Plain.forward", forward)
    with pytest.raises(MemoryShortageError, match="turn down batch_size or max_tokens as"):
        train(engine, CELLS)


def test_a_module_that_cannot_be_used_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleError, match=r"gives \(16, 3\) where the recipe needs a tensor of shape \(16, 2\)"):
        Sisa(module_recipe("Wide"))
    with pytest.raises(ModuleError, match="not a subclass"):
        Sisa(module_recipe("NoModule"))
    with pytest.raises(ModuleError, match="lazy layers"):
        Sisa(module_recipe("Lazy"))
    with pytest.raises(ModuleError, match="cannot be built from them: TypeError"):
        Sisa(module_recipe(module=module_of("Plain", depth=3)))
    with pytest.raises(ModuleError, match="ValueError") as refusal:
        train(Sisa(module_recipe("Talkative")), CELLS)
    assert "bad rows" not in str(refusal.value)
    for path, problem in (
        ("toy_module", "package.module:Class"),
        ("no_such_thing:Net", "no source of no_such_thing"),
        ("no.such.thing:Net", "cannot be found"),
        ("json:loads", "digest"),
        ("os:system", "no source of os"),
        ("torch.nn:Linear", "digest"),
    ):
        with pytest.raises(ModuleError, match=problem):
            Sisa(module_recipe(module=Module(path=path, digest="0" * 64, width=6)))
    linear = "torch.nn:Linear"
    with pytest.raises(ModuleError, match=r"is defined in torch\.nn\.modules\.linear"):
        Sisa(module_recipe(module=Module(path=linear, digest=source_digest(linear), width=6)))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module.py").write_text("raise OSError('no weights')\n")
    broken = "broken_module:Net"
    with pytest.raises(ModuleError, match="cannot be imported: OSError: no weights"):
        Sisa(module_recipe(module=Module(path=broken, digest=source_digest(broken), width=6)))


def test_another_source_than_the_recipes_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "my_module.py"
    source.write_text("from toy_module import Plain\nclass Net(Plain): pass\n")
    recipe = module_recipe(module=Module(path="my_module:Net", digest=source_digest("my_module:Net"), width=6))
    source.write_text("open(__file__ + '.ran', 'w')\n")
    with pytest.raises(ModuleError, match="has digest"):
        Sisa(recipe)
    assert not (tmp_path / "my_module.py.ran").exists()
    source.write_text("from toy_module import Plain\nclass Net(Plain): pass\n")
    Sisa(recipe)
    source.write_text("from toy_module import Plain\nclass Net(Plain): new = True\n")
    newer = module_recipe(module=Module(path="my_module:Net", digest=source_digest("my_module:Net"), width=6))
    with pytest.raises(ModuleError, match="runs an earlier source"):
        Sisa(newer)


def test_progress_counts_every_step() -> None:
    engine = Sisa(module_recipe(epochs=3))  # 3/2 epochs of 6 records in batches of 4: 2 + 1 steps
    seen: list[tuple[int, int]] = []
    engine.train(stages_of(engine, CELLS)[0], CELLS[0], [], lambda done, total: seen.append((done, total)))
    assert seen == [(step, 3) for step in (1, 2, 3)]
