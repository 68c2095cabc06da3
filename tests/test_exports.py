"""Merged adapters: plain peft loads them, deletions leave no trace in them, and the register says where they went."""

import base64
import io
import itertools
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from api_client import Api, serving
from peft import PeftModel
from tiny import World as Memory
from tiny import tiny_backbone, tiny_recipe, tiny_records
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from world_copies import SUBJECTS, Copy

from service.cli.main import main
from service.store import api_keys, exports, models
from service.store.database import transaction
from shards.digest import sha256_hex
from shards.engine.registry import open_reader
from shards.engine.s3t import S3T
from shards.errors import ShardsError
from shards.merged import adapter_bytes, adapter_config, lora_scale, merge, tensors_of
from shards.partition import dataset_key, record_id_of
from shards.rebuild import Policy
from shards.recipe import Recipe
from workers import steps
from workers.training import train_queued

pytest_plugins = ["world_fixtures", "api_fixtures"]
TEXTS = ["w1 w2 w3", "w90", "w5 w6 w7 w8 w9 w10 w11"]


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Memory:
    recipe = tiny_recipe(tiny_backbone(tmp_path_factory.mktemp("backbone")), shards=3)
    records = tiny_records(36)
    cells = {(s, p): records[(s * 2 + p) * 6 : (s * 2 + p) * 6 + 6] for s in range(3) for p in range(2)}
    world = Memory(S3T(recipe), cells)
    world.rebuild()
    return world


def adapter(world: Memory, directory: Path) -> bytes:
    """Write the merged adapter of what is served; its weight file."""
    lines = [
        [tensors_of(world.artifacts[digest]) for digest in member.artifacts]
        for member in world.assembly().members
        if member
    ]
    merged = merge(lines, lora_scale(world.recipe))
    directory.mkdir()
    weights = adapter_bytes(merged)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    (directory / "adapter_config.json").write_bytes(adapter_config(world.recipe, merged))
    return weights


def plain_logits(recipe: Recipe, directory: Path) -> np.ndarray:
    source = recipe.pretrained.source
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(recipe.classes))
    model = PeftModel.from_pretrained(base, str(directory)).eval()
    tokens = AutoTokenizer.from_pretrained(source)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits.numpy()


def served_logits(world: Memory) -> np.ndarray:
    """What a model server answers where the recipe says `merged`."""
    reader = open_reader(world.recipe)
    for digest, data in world.artifacts.items():
        reader.load(digest, data)
    assembly = world.assembly()
    merged = type(assembly)(assembly.recipe, assembly.members, "merged")
    return reader.build(merged).logits(TEXTS)


# peft asks for a property that transformers has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("mixed", [False, True])
def test_plain_peft_loads_a_merged_adapter_and_agrees(memory: Memory, tmp_path: Path, mixed: bool) -> None:
    world = Memory(memory.engine, memory.cells)
    world.live, world.digests, world.artifacts = dict(memory.live), dict(memory.digests), dict(memory.artifacts)
    if mixed:
        world.delete({world.cells[0, 1][0].record_id, world.cells[2, 0][0].record_id, world.cells[2, 1][0].record_id})
        assert world.assembly().depths == (1, 2, 0)
    adapter(world, tmp_path / "adapter")
    assert np.abs(plain_logits(world.recipe, tmp_path / "adapter") - served_logits(world)).max() < 1e-5


def test_a_merged_adapter_after_a_deletion_is_the_one_made_from_nothing(memory: Memory, tmp_path: Path) -> None:
    gone = memory.cells[1, 0][2].record_id
    world = Memory(memory.engine, memory.cells)
    world.live, world.digests, world.artifacts = dict(memory.live), dict(memory.digests), dict(memory.artifacts)
    world.delete({gone})
    world.rebuild()
    cells = {cell: [r for r in rows if r.record_id != gone] for cell, rows in memory.cells.items()}
    fresh = Memory(memory.engine, cells)
    fresh.rebuild()
    assert adapter(world, tmp_path / "after") == adapter(fresh, tmp_path / "fresh")


def test_nothing_live_is_nothing_to_export() -> None:
    with pytest.raises(ShardsError, match="rebuilt"):
        merge([], 1.0)


@pytest.fixture
def client(world: Copy, valkey: str) -> Iterator[httpx.Client]:
    for name in ("pepper", "partition"):
        path = world.context.settings.keys_dir / name
        path.touch(mode=0o600)
        path.write_text(getattr(world.secrets, name).hex())
    with transaction(world.pool) as connection:
        token = api_keys.create(connection, "test", list(api_keys.Scope))
    with serving(world.context.settings.model_copy(update={"redis_url": valkey})) as url:
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
            yield client


def test_an_export_is_registered_and_shows_when_a_deletion_taints_it(world: Copy, client: httpx.Client) -> None:
    answer = client.post("/v1/models/tiny/exports", json={"recipient": "vllm-prod"})
    assert answer.status_code == 201
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        about = json.loads(archive.read("expunge.json"))
        assert sha256_hex(archive.read("adapter_model.safetensors")) == about["digest"]
        assert json.loads(archive.read("adapter_config.json"))["r"] == 2 * 4
    (entry,) = client.get("/v1/exports").json()["exports"]
    assert entry["digest"] == about["digest"] == answer.headers["X-Expunge-Digest"]
    assert (entry["recipient"], entry["version"], entry["tainted"], entry["open"]) == ("vllm-prod", 1, False, False)

    request_id = world.ask("s3")
    steps.plan_targets(world.context, world.model_id)
    (entry,) = client.get("/v1/exports", params={"model": "tiny"}).json()["exports"]
    assert entry["tainted"]
    assert entry["open"]
    world.finish(request_id)
    certificate = client.get(f"/v1/deletion-requests/{request_id}/certificate").text
    envelope = json.loads(certificate)
    assert "payload" in json.dumps(envelope)
    with transaction(world.pool) as connection:
        items = exports.open_items(connection, world.model_id, request_id)
    assert [name for name, _ in items] == [entry["export"]]

    assert client.post(f"/v1/exports/{entry['export']}/withdraw").status_code == 200
    assert client.post(f"/v1/exports/{entry['export']}/withdraw").status_code == 200
    (entry,) = client.get("/v1/exports").json()["exports"]
    assert entry["tainted"]
    assert not entry["open"]
    assert [event["export_id"] for event in world.events("export.withdrawn")] == [entry["export"]]


def test_exports_refuse_what_cannot_be(world: Copy, client: httpx.Client) -> None:
    assert client.post("/v1/models/tiny/exports", json={"recipient": "Ann Other"}).status_code == 422
    assert client.post("/v1/models/none/exports", json={"recipient": "x"}).status_code == 404
    assert client.post(f"/v1/exports/{world.model_id:032x}/withdraw").status_code == 404
    world.as_owner("UPDATE artifact SET digest = repeat('0', 64) WHERE kind = 'stage'")
    refused = client.post("/v1/models/tiny/exports", json={"recipient": "x"})
    assert refused.status_code == 409
    assert client.get("/v1/exports").json() == {"exports": [], "next": None}


def test_a_deletion_that_waits_for_its_replacement_lets_no_file_out(world: Copy, client: httpx.Client) -> None:
    """Under `rebuild_first` the model serves on with the record; a file with it would be out for good."""
    with transaction(world.pool) as connection:
        models.mark_policy(connection, world.model_id, Policy(kind="rebuild_first"))
    request_id = world.ask("s3")
    steps.plan_targets(world.context, world.model_id)
    assert world.states(request_id) == [("received", None)]
    refused = client.post("/v1/models/tiny/exports", json={"recipient": "vllm-prod"})
    assert (refused.status_code, "is being deleted" in refused.json()["detail"]) == (409, True)
    assert client.get("/v1/exports").json() == {"exports": [], "next": None}
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)
    steps.plan_targets(world.context, world.model_id)
    assert client.post("/v1/models/tiny/exports", json={"recipient": "vllm-prod"}).status_code == 201


def test_a_certificate_names_exports_of_stages_that_an_earlier_erasure_destroyed(
    world: Copy, client: httpx.Client
) -> None:
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    cells = {subject: world.row("SELECT cell_id FROM record WHERE record_id = %s", record_id_of(key, names[0]))
             for subject, names in SUBJECTS.items()}  # fmt: skip
    pair = next((a, b) for a, b in itertools.combinations(SUBJECTS, 2) if cells[a] == cells[b])
    assert client.post("/v1/models/tiny/exports", json={"recipient": "vllm-prod"}).status_code == 201
    requests = []
    for subject in pair:  # the second's plan finds the stages of the first's destroyed
        requests.append(world.ask(subject))
        steps.plan_targets(world.context, world.model_id)
        world.finish(requests[-1])
    for request_id in requests:
        (envelope,) = world.row("SELECT envelope FROM certificate WHERE request_id = %s", request_id)
        said = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
        codes = [item["code"] for item in said["open_items"]]
        assert codes == ["export_not_withdrawn", "late_upload_sweeps", "backups"]


def test_the_register_comes_in_pages(client: httpx.Client) -> None:
    made = [
        client.post("/v1/models/tiny/exports", json={"recipient": f"r{n}"}).headers["X-Expunge-Export"]
        for n in range(5)
    ]
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = client.get("/v1/exports", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        found += [entry["export"] for entry in page["exports"]]
        cursor = page["next"]
    assert found == made[::-1]
    assert client.get("/v1/exports", params={"cursor": "nonsense"}).status_code == 422


def test_the_register_needs_its_scope(api: Api) -> None:
    assert api.with_scopes(api_keys.Scope.DATA_WRITE).get("/v1/exports").status_code == 403


def test_the_command_line_writes_an_adapter_directory(
    world: Copy,
    client: httpx.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EXPUNGE_API_URL", str(client.base_url))
    monkeypatch.setenv("EXPUNGE_API_KEY", client.headers["Authorization"].removeprefix("Bearer "))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expunge", "model", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    out = tmp_path / "adapter"
    code, printed, _ = run("export", "tiny", "--out", str(out), "--recipient", "vllm", "--json")
    about = json.loads(printed)
    assert code == 0
    assert sha256_hex((out / "adapter_model.safetensors").read_bytes()) == about["digest"]
    code, _, complaint = run("export", "tiny", "--out", str(out), "--recipient", "vllm")
    assert (code, "not an empty directory" in complaint) == (1, True)
    assert run("exports", "tiny")[1].count("vllm") == 1
    world.ask("s5")
    steps.plan_targets(world.context, world.model_id)
    assert "OPEN" in run("exports")[1]
    assert run("withdraw", about["export"])[0] == 0
    assert "withdrawn" in run("exports")[1]
