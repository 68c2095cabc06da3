"""The model server with the real engine: what it answers is what the ensemble computes, bit for bit."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import Database
from serving_kit import Toy, serving, wait_until
from tiny import tiny_backbone, tiny_recipe, tiny_records

from shards.assembly import Assembly, Member
from shards.digest import sha256_hex
from shards.engine.backbone import Backbone
from shards.engine.determinism import prepare
from shards.engine.s3t import S3T
from shards.engine.stacked import StackedReader
from shards.errors import ArtifactDigestError
from shards.stages import chain

pytestmark = [pytest.mark.integration, pytest.mark.golden]


def test_the_real_engine_serves_deactivates_and_frees(database: Database, tmp_path: Path) -> None:
    prepare()
    recipe = tiny_recipe(tiny_backbone(tmp_path / "backbone"))
    trainer = S3T(recipe, Backbone.load(recipe))
    toy = Toy(database.owner_url, database.app_url, tmp_path / "artifacts", recipe=recipe)
    toy.create()
    trained: dict[str, tuple[str, bytes]] = {}
    for shard, name in enumerate("ab"):
        stage = chain(recipe.digest, shard, (0,), {0: f"{shard}" * 64})[0]
        data = trainer.train(stage, tiny_records(6, name), [])
        trained[name] = (stage.key, data)
        toy.add_stage(name, shard=shard, data=data, key=stage.key)
    toy.publish("a", "b", cause="train")

    texts = ["w1 w2 w3", "w7", "w9 " * 12]
    alone = StackedReader(recipe)
    members = []
    for key, data in trained.values():
        alone.load(sha256_hex(data), data)
        members.append(Member(key, (0,), (sha256_hex(data),)))
    both = alone.build(Assembly(recipe.digest, tuple(members))).logits(texts)
    first = alone.build(Assembly(recipe.digest, (members[0], None))).logits(texts)
    with pytest.raises(ArtifactDigestError):
        alone.load("0" * 64, data)

    with serving(toy, factory=partial(StackedReader, device="cpu")) as (client, _):
        assert client.predict(*texts).json()["outputs"] == expected(both)
        version = toy.publish("a", None, taint=1)
        wait_until(lambda: toy.leases()[0]["covers"] == version)
        assert client.predict(*texts).json()["outputs"] == expected(first)
        wait_until(lambda: toy.leases()[0]["freed"] == version)  # every tensor of the stage is gone


def expected(logits: np.ndarray) -> list[dict[str, object]]:
    shares = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return [
        {"label": ("no", "yes")[int(row.argmax())], "probabilities": {"no": round(row[0], 6), "yes": round(row[1], 6)}}
        for row in shares
    ]
