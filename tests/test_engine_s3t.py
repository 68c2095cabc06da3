import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import manifest_root, tiny_backbone, tiny_recipe, tiny_record, tiny_records, tiny_tokenizer

from shards.digest import sha256_hex
from shards.engine.artifacts import decode, decode_verified, encode
from shards.engine.determinism import prepare
from shards.engine.files import backbone_digest
from shards.engine.interface import check_lineage
from shards.engine.replay import compare, replay
from shards.engine.s3t import S3T
from shards.engine.tasks import loss
from shards.errors import ArtifactDigestError, ManifestMismatchError, RecipeError, ReplayMismatchError, ShardsError
from shards.manifest import Record
from shards.recipe import Lora
from shards.stages import Stage, chain

pytestmark = pytest.mark.golden
DROPOUT = {"lora": Lora(rank=4, alpha=8, dropout=0.1), "backbone_dropout": True}
HEAD = ("base_model.model.classifier.weight", "base_model.model.classifier.bias")
CELLS = {0: tiny_records(6, "a"), 1: tiny_records(7, "b")}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> S3T:
    prepare()
    return S3T(tiny_recipe(tiny_backbone(tmp_path_factory.mktemp("backbone")), epochs=2, **DROPOUT))


def stages_of(engine: S3T, cells: Mapping[int, list[Record]], order: tuple[int, ...] = (0, 1)) -> tuple[Stage, ...]:
    return chain(engine.recipe.digest, 0, order, {piece: manifest_root(rs) for piece, rs in cells.items()})


def train(engine: S3T, cells: Mapping[int, list[Record]], order: tuple[int, ...] = (0, 1)) -> list[bytes]:
    artifacts: list[bytes] = []
    for stage in stages_of(engine, cells, order):
        records = [record for piece in stage.prefix for record in cells[piece]]
        artifacts.append(engine.train(stage, records, artifacts))
    return artifacts


def test_a_stage_is_a_function_of_its_record_set(engine: S3T) -> None:
    once = train(engine, CELLS)
    torch.manual_seed(99)
    engine.trunk.clear()
    turned = {piece: list(reversed(records)) for piece, records in CELLS.items()}
    train(engine, {0: tiny_records(3, "z"), 1: tiny_records(2, "y")}, (1, 0))
    assert train(engine, turned) == once


def test_resuming_at_a_stage_boundary_changes_nothing(engine: S3T) -> None:
    first, second = train(engine, CELLS)
    fresh = S3T(engine.recipe, engine.backbone)
    records = [*CELLS[0], *CELLS[1]]
    assert fresh.train(stages_of(engine, CELLS)[1], records, [first]) == second


def test_stages_are_equal_in_another_process(engine: S3T) -> None:
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_engine_s3t as t\n"
        "t.prepare(); r = t.tiny_recipe(t.tiny_backbone(t.Path(sys.argv[2])), epochs=2, **t.DROPOUT)\n"
        "print(json.dumps([t.sha256_hex(a) for a in t.train(t.S3T(r), t.CELLS)]))"
    )
    directory = str(Path(__file__).parent)
    source = engine.recipe.backbone.source
    out = subprocess.run([sys.executable, "-c", program, directory, source], check=True, capture_output=True, text=True)
    assert json.loads(out.stdout.splitlines()[-1]) == [sha256_hex(artifact) for artifact in train(engine, CELLS)]


def test_removing_a_record_of_slice_1_leaves_the_stages_without_it(engine: S3T) -> None:
    less = {0: CELLS[0], 1: CELLS[1][1:]}
    whole, rest = train(engine, CELLS), train(engine, less)
    assert rest[0] == whole[0]
    assert rest[1] != whole[1]
    assert train(engine, less, (1, 0))[0] != train(engine, CELLS, (1, 0))[0]


def test_features_are_functions_of_the_record_alone(engine: S3T) -> None:
    trunk, boundary = engine.trunk, engine.trunk.boundaries[0]
    ids = [record.record_id for record in CELLS[0]]
    trunk.clear()
    trunk.warm(CELLS[0], boundary)
    together, _ = trunk.rows(ids, boundary)
    trunk.clear()
    trunk.warm([*CELLS[1], *CELLS[0][3:]], boundary)
    fewer, _ = trunk.rows(ids[3:], boundary)
    assert torch.equal(together[3:], fewer)
    assert trunk.purity == "batched"


def test_features_resume_from_a_lower_boundary_to_the_same_bits(engine: S3T) -> None:
    trunk, (top, low) = engine.trunk, engine.trunk.boundaries
    ids = [record.record_id for record in CELLS[0]]
    trunk.clear()
    trunk.warm(CELLS[0], top)
    direct, _ = trunk.rows(ids, top)
    trunk.clear()
    trunk.warm(CELLS[0], low)
    trunk.warm(CELLS[0], top)
    assert torch.equal(trunk.rows(ids, top)[0], direct)


@pytest.mark.parametrize("cache", [0, 5000])
def test_a_memory_cap_costs_time_but_no_bit(engine: S3T, cache: int) -> None:
    capped = S3T(engine.recipe, engine.backbone, cache_bytes=cache)
    assert train(capped, CELLS) == train(engine, CELLS)
    assert capped.trunk.held_bytes <= cache


def test_features_are_forgotten_with_the_record(engine: S3T) -> None:
    engine.trunk.clear()
    train(engine, CELLS)
    assert engine.trunk.held_bytes > 0
    engine.trunk.forget(record.record_id for record in (*CELLS[0], *CELLS[1]))
    assert engine.trunk.held_bytes == 0
    with pytest.raises(KeyError):
        engine.trunk.rows([CELLS[0][0].record_id], engine.trunk.boundaries[0])


def test_the_same_id_with_another_text_gets_features_of_its_own(engine: S3T) -> None:
    changed = {0: [dataclasses.replace(CELLS[0][0], text="w9 w8 w7"), *CELLS[0][1:]], 1: CELLS[1]}
    train(engine, CELLS)
    kept = train(engine, changed)
    engine.trunk.clear()
    assert train(engine, changed) == kept != train(engine, CELLS)


def test_only_the_block_and_the_head_are_in_an_artefact_and_both_moved(engine: S3T) -> None:
    first, second = (decode(artifact) for artifact in train(engine, CELLS))
    assert {name.split(".")[5] for name in first.lora} == {"3"}
    assert {name.split(".")[5] for name in second.lora} == {"2"}
    assert set(first.head) == set(second.head) == set(HEAD)
    assert all(tensor.any() for name, tensor in second.lora.items() if "lora_B" in name)
    assert not torch.equal(first.head[HEAD[0]], second.head[HEAD[0]])


def test_the_head_goes_on_from_the_parents_snapshot(engine: S3T) -> None:
    stage = stages_of(engine, CELLS)[1]
    first = train(engine, CELLS)[0]
    part = decode(first)
    moved = {**part.lora, **{name: tensor + 1 for name, tensor in part.head.items()}}
    records = [*CELLS[0], *CELLS[1]]
    assert engine.train(stage, records, [first]) != engine.train(stage, records, [encode(part.stage, moved)])


def test_layer_1_is_not_layer_10_or_11(tmp_path: Path) -> None:
    engine = S3T(tiny_recipe(tiny_backbone(tmp_path, layers=12), slices=11, orders=1))
    cells = {piece: tiny_records(2, "x") if piece == 10 else [] for piece in range(11)}
    artifacts = train(engine, cells, tuple(range(11)))
    layers = [{name.split(".")[5] for name in decode(artifact).lora} for artifact in artifacts]
    assert layers == [{str(index)} for index in range(11, 0, -1)]
    untouched = [decode(artifact) for artifact in artifacts[:10]]
    assert not any(tensor.any() for part in untouched for name, tensor in part.lora.items() if "lora_B" in name)


def test_no_records_give_the_stage_as_it_begins(engine: S3T) -> None:
    cells = {0: [], 1: CELLS[1]}
    first, second = train(engine, cells)
    assert all(("lora_B" in name) != bool(tensor.any()) for name, tensor in decode(first).lora.items())
    assert train(engine, cells) == [first, second]


def test_a_cell_of_one_class_trains(engine: S3T) -> None:
    cells = {0: [tiny_record(f"one{n}", label="yes") for n in range(5)], 1: CELLS[1]}
    assert train(engine, cells) == train(engine, cells)


def test_a_frozen_tensor_that_moves_stops_the_stage(engine: S3T, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(engine, CELLS)[0]
    adapters, optimizer = engine._adapters, engine._optimizer
    monkeypatch.setattr(engine, "_optimizer", lambda _block: optimizer(adapters.block(2, 4)))
    monkeypatch.setattr(adapters, "unfreeze", lambda *_, **__: adapters.model.requires_grad_(True))  # noqa: FBT003
    with pytest.raises(ShardsError, match="moved a frozen tensor"):
        engine.train(stages_of(engine, CELLS)[1], [*CELLS[0], *CELLS[1]], [first])
    monkeypatch.undo()
    assert train(engine, CELLS)[0] == first


@pytest.mark.parametrize("way", ["left out of the optimizer", "no learning rate", "cut off from the loss"])
def test_an_adapter_that_stays_though_its_gradient_is_not_zero_stops_the_stage(
    engine: S3T, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """One of two, while the other moves."""
    fresh = engine._optimizer

    def optimizer(block: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        name = next(name for name in block if ".value.lora_B." in name)
        if way == "cut off from the loss":
            block[name].requires_grad_(False)  # noqa: FBT003
        if way != "no learning rate":
            return fresh({other: tensor for other, tensor in block.items() if other != name})
        found = fresh(block)
        found.param_groups[0]["params"] = [tensor for other, tensor in block.items() if other != name]
        found.add_param_group({"params": [block[name]], "lr": 0.0})
        return found

    monkeypatch.setattr(engine, "_optimizer", optimizer)
    with pytest.raises(ShardsError, match="left its block unmoved"):
        train(engine, CELLS)


def test_a_query_has_no_gradient_where_every_text_is_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is no error: its adapter stays as it began, and the values' moves. Unless none moves."""
    plain = tiny_backbone(tmp_path)
    tiny_tokenizer(completion=True).save_pretrained(tmp_path)  # [CLS], and no [SEP] behind it
    engine = S3T(tiny_recipe(dataclasses.replace(plain, digest=backbone_digest(tmp_path)), epochs=2, **DROPOUT))
    cells = {piece: [tiny_record(f"{piece}{n}", words=[]) for n in range(5)] for piece in (0, 1)}
    lora = decode(train(engine, cells)[1]).lora
    moved = {name.split(".")[-3]: bool(tensor.any()) for name, tensor in lora.items() if ".lora_B." in name}
    assert moved == {"query": False, "value": True}
    monkeypatch.setattr("shards.engine.s3t.loss", lambda *given: loss(*given) * 0)
    with pytest.raises(ShardsError, match="left its block unmoved"):
        train(engine, cells)


def test_progress_counts_every_step(engine: S3T) -> None:
    seen: list[tuple[int, int]] = []
    engine.train(stages_of(engine, CELLS)[0], CELLS[0], [], lambda done, total: seen.append((done, total)))
    assert seen == [(step, 4) for step in range(1, 5)]  # 6 records in batches of 4, 2 epochs


def test_an_undeclared_label_is_refused(engine: S3T) -> None:
    """In words that do not quote it: it is payload."""
    with pytest.raises(RecipeError, match="label is not among them") as caught:
        engine.train(stages_of(engine, CELLS)[0], [tiny_record("q", label="maybe")], [])
    assert "maybe" not in str(caught.value)


def test_a_stage_of_another_recipe_is_refused(engine: S3T) -> None:
    with pytest.raises(RecipeError, match="of recipe"):
        engine.train(dataclasses.replace(stages_of(engine, CELLS)[0], recipe="0" * 64), CELLS[0], [])


def test_parents_must_be_the_stages_own(engine: S3T) -> None:
    stage = stages_of(engine, CELLS)[1]
    first, second = train(engine, CELLS)
    strange = train(engine, {0: CELLS[0][1:], 1: CELLS[1]})[0]
    for parents in ([], [strange], [second], [first, second]):
        with pytest.raises(ArtifactDigestError, match="ancestors"):
            engine.train(stage, CELLS[0], parents)


def test_each_ancestor_must_stand_on_the_one_before(engine: S3T) -> None:
    """Also one far up the chain, of the same slices and manifests under another recipe."""
    deep = S3T(dataclasses.replace(engine.recipe, slices=3, orders=1), engine.backbone)
    cells: dict[int, list[Record]] = CELLS | {2: []}
    stages = stages_of(deep, cells, (0, 1, 2))
    first = deep.train(stages[0], CELLS[0], [])
    second = deep.train(stages[1], CELLS[0] + CELLS[1], [first])
    artifact = decode(first)
    strange = encode(dataclasses.replace(artifact.stage, recipe="0" * 64), artifact.tensors)
    with pytest.raises(ArtifactDigestError, match="ancestors"):
        deep.train(stages[2], CELLS[0] + CELLS[1], [strange, second])


def test_lineage_is_checked_per_slice(engine: S3T) -> None:
    stage = stages_of(engine, CELLS)[1]
    assert check_lineage(stage, CELLS) == [*CELLS[0], *CELLS[1]]
    for wrong in ({0: CELLS[0]}, {0: CELLS[1], 1: CELLS[0]}, {0: CELLS[0], 1: CELLS[1][1:]}):
        with pytest.raises(ManifestMismatchError):
            check_lineage(stage, wrong)


def test_artefacts_are_canonical_and_checked(engine: S3T) -> None:
    data = train(engine, CELLS)[0]
    artifact = decode_verified(data, sha256_hex(data))
    assert artifact.stage == stages_of(engine, CELLS)[0]
    assert encode(artifact.stage, dict(reversed(artifact.tensors.items()))) == data
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == ["expunge"]
    with pytest.raises(ArtifactDigestError, match="damaged"):
        decode_verified(data[:-1] + b"\x00", sha256_hex(data))
    for broken in (b"", b"\x00" * 7, b"\xff" * 64, data[:40], data[:-9]):
        with pytest.raises(ArtifactDigestError, match="not an artefact"):
            decode(broken)


def test_replay_finds_the_digests_and_a_difference(engine: S3T) -> None:
    stages = stages_of(engine, CELLS)
    served = [sha256_hex(artifact) for artifact in train(engine, CELLS)]
    found = replay(engine, stages, CELLS)
    assert engine.trunk.held_bytes == 0
    for comparison in compare(stages, served, found, {"isa": "x"}):
        assert comparison.equal
        comparison.check()
    wrong = compare(stages, [served[0], "0" * 64], found, {"isa": "x"})[1]
    assert wrong.to_json()["equal"] is False
    with pytest.raises(ReplayMismatchError, match="served as 00000"):
        wrong.check()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_cells_of_any_sizes_train_to_one_digest(engine: S3T, data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(0, 9)) for _ in range(2)]
    cells = {piece: tiny_records(size, f"h{piece}") for piece, size in enumerate(sizes)}
    shuffled = {piece: data.draw(st.permutations(records)) for piece, records in cells.items()}
    assert train(engine, cells) == train(engine, shuffled)
