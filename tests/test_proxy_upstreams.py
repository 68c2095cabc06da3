"""The proxy before other kinds of servers: Open Inference Protocol with real adapters, and an operator's hook."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Database
from proxy_kit import make_toy, proxy, upstream
from serving_kit import Client, Toy, serving, wait_until
from serving_talk import complete
from tiny import tiny_backbone, tiny_recipe, tiny_records

from shards.assembly import Assembly, Member
from shards.digest import sha256_hex
from shards.engine.backbone import Backbone
from shards.engine.determinism import prepare
from shards.engine.s3t import S3T
from shards.engine.stacked import StackedReader
from shards.stages import chain

pytestmark = pytest.mark.integration
TEXTS = ["w1 w2 w3", "w7", "w9 w3 w1 w20 w21"]


def infer(client: Client, path: str = "/v2/models/toy/infer") -> dict[str, object]:
    tensor = {"name": "text", "shape": [len(TEXTS)], "datatype": "BYTES", "data": TEXTS}
    answer = client.post(path, json={"id": "7", "inputs": [tensor]})
    return answer.json() | {"status": answer.status_code, "header": answer.headers.get("x-expunge-version")}


@pytest.mark.golden
def test_plain_peft_behind_the_proxy_answers_as_the_merged_model_does(database: Database, tmp_path: Path) -> None:
    prepare()
    recipe = tiny_recipe(tiny_backbone(tmp_path / "backbone"), aggregation="merged")
    trainer = S3T(recipe, Backbone.load(recipe))
    toy = Toy(database.owner_url, database.app_url, tmp_path / "artifacts", recipe=recipe)
    toy.create()
    alone = StackedReader(recipe)
    members = []
    for shard, name in enumerate("ab"):
        stage = chain(recipe.digest, shard, (0,), {0: f"{shard}" * 64})[0]
        data = trainer.train(stage, tiny_records(6, name), [])
        toy.add_stage(name, shard=shard, data=data, key=stage.key)
        alone.load(sha256_hex(data), data)
        members.append(Member(stage.key, (0,), (sha256_hex(data),)))
    toy.publish("a", "b", cause="train")
    with (
        upstream(tmp_path / "adapters", recipe.pretrained.source) as behind,
        proxy(toy, behind, "--speaks", "oip", "--unload-frees") as (client, _),
    ):
        answer = infer(client)
        assert (answer["status"], answer["header"], answer["id"]) == (200, "1", "7")
        assert (answer["model_name"], answer["model_version"]) == ("toy", "1")
        assert np.abs(shares(answer) - expected(alone, recipe.digest, *members)).max() < 1e-5
        assert client.get("/v2/models/toy").json()["versions"] == ["1"]
        assert client.get("/v2/models/toy/ready").status_code == 200
        assert infer(client, "/v2/models/toy/versions/9/infer")["status"] == 404
        assert complete(client).status_code == 501
        floor = toy.publish("a", None, taint=1)
        answer = infer(client)
        while answer["header"] != str(floor):  # the call may have come before the floor
            assert answer["status"] == 200
            answer = infer(client)
        assert np.abs(shares(answer) - expected(alone, recipe.digest, members[0], None)).max() < 1e-5
        wait_until(lambda: toy.leases()[0]["freed"] == floor)
        with serving(toy, factory=StackedReader) as (server, _):  # and as a model server does
            served = infer(server)
        assert np.abs(shares(served, 1) - shares(answer)).max() < 1e-5


def shares(answer: dict[str, object], place: int = 0) -> np.ndarray:
    outputs = answer["outputs"]
    assert isinstance(outputs, list)
    return np.array(outputs[place]["data"]).reshape(-1, 2)


def expected(reader: StackedReader, recipe: str, *members: Member | None) -> np.ndarray:
    logits = reader.build(Assembly(recipe, members, "merged")).logits(TEXTS).astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_a_hook_loads_and_unloads_where_the_server_has_no_addresses_for_it(database: Database, tmp_path: Path) -> None:
    """As for a server that takes adapters at its start only, and whose answers name its base model."""
    toy = make_toy(database, tmp_path)
    with upstream(tmp_path / "adapters") as behind:
        hook = tmp_path / "hook"
        hook.write_text(
            f"""#!{sys.executable}
import sys, httpx
verb, name, directory = (*sys.argv[1:], "", "")[:3]
with httpx.Client(base_url="{behind.base_url}", trust_env=False) as client:
    if verb == "list":
        print(*(each["id"] for each in client.get("/v1/models").json()["data"]), sep="\\n")
    else:
        body = dict(lora_name=name, lora_path=directory)
        client.post(f"/v1/{{verb}}_lora_adapter", json=body).raise_for_status()
"""
        )
        hook.chmod(stat.S_IRWXU)
        behind.fault(**{"as": "base"})
        with proxy(toy, behind, "--hook", str(hook), "--answers-as", "base", "--unload-frees") as (client, _):
            assert complete(client, max_tokens=1).json()["model"] == "toy"
            floor = toy.publish("a", None, taint=1)
            wait_until(lambda: toy.leases()[0]["freed"] == floor, seconds=60)
            wait_until(lambda: behind.names() == {f"toy@{floor}"}, seconds=60)
        hook.write_text("#!/bin/sh\nexit 1\n")
        with proxy(toy, behind, "--hook", str(hook), ready=False) as (client, _):
            wait_until(lambda: fails(client), seconds=60)


def fails(client: Client) -> bool:
    try:
        models = client.get("/readyz").json()["models"]
    except OSError:
        return False
    except Exception as error:  # noqa: BLE001 - the server is not there yet
        assert type(error).__module__.startswith("httpx")  # noqa: PT017
        return False
    return bool(models) and "hook failed at list" in models[0]["problem"]


def test_the_proxy_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, service.proxy.program as p; sys.exit(bool({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False).returncode == 0
