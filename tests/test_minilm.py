"""The demo's real encoder and real reviews: exactness where rounding, kernels and bf16 are the real ones."""

import uuid
from dataclasses import replace

import numpy as np
import pytest

from service.cli.demo import sample
from service.cli.demo.assets import Assets, cache_directory, fetch
from service.cli.demo.command import ENCODER_DIGEST, recipe
from shards.assembly import Member
from shards.digest import keyed, sha256_hex
from shards.engine.determinism import prepare
from shards.engine.ensemble import StageTensors, stage_logits
from shards.engine.files import backbone_digest
from shards.engine.replay import replay
from shards.engine.s3t import S3T
from shards.engine.skeleton import Skeleton
from shards.manifest import Manifest, Record
from shards.recipe import Recipe
from shards.stages import chain

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def assets() -> Assets:
    return fetch(cache_directory(), lambda _text: None)


@pytest.fixture(scope="module")
def records(assets: Assets) -> list[Record]:
    reviews = sample.read(assets.reviews)[:48]
    found: list[Record] = []
    for number, review in enumerate(reviews):
        salt = keyed(b"test", str(number).encode())
        found.append(Record(uuid.UUID(bytes=salt[:16]), salt, review.text, review.label))
    return found


def test_the_pinned_digest_is_the_encoders(assets: Assets) -> None:
    assert backbone_digest(assets.encoder) == ENCODER_DIGEST


def test_a_deletion_leaves_what_training_without_the_record_gives(assets: Assets, records: list[Record]) -> None:
    prepare()
    chosen = replace(Recipe.from_json(recipe(assets.encoder)), shards=1, orders=1, epochs=1)
    engine = S3T(chosen)
    slices = {index: records[index::3] for index in range(3)}

    def trained(by_slice: dict[int, list[Record]]) -> tuple[list[str], list[bytes]]:
        roots = {index: Manifest.of(r.commitment for r in rows).root for index, rows in by_slice.items()}
        artifacts: list[bytes] = []
        stages = chain(chosen.digest, 0, (0, 1, 2), roots)
        for stage in stages:
            rows = [record for index in stage.prefix for record in by_slice[index]]
            artifacts.append(engine.train(stage, rows, artifacts))
        assert replay(S3T(chosen, engine.backbone), stages, by_slice) == [sha256_hex(data) for data in artifacts]
        return [stage.key for stage in stages], artifacts

    keys, with_all = trained(slices)
    fewer = {**slices, 1: slices[1][:5] + slices[1][6:]}
    keys_after, without = trained(fewer)
    assert keys_after[0] == keys[0]
    assert without[0] == with_all[0], "a stage that never read the record is untouched, bit for bit"
    assert keys_after[1:] != keys[1:]
    assert without[1] != with_all[1]
    # Rows come in another order, from another list: the same bits.
    shuffled = {index: rows[::-1] for index, rows in fewer.items()}
    assert trained(shuffled)[1] == without
    _check_answers(chosen, engine, keys_after, without, [record.text for record in records])


def _check_answers(chosen: Recipe, engine: S3T, keys: list[str], artifacts: list[bytes], texts: list[str]) -> None:
    """An answer's bits depend on its own text alone, in bf16, whatever stands beside it."""
    skeleton = Skeleton(chosen, engine.backbone)
    tensors = StageTensors(chosen)
    digests = tuple(sha256_hex(data) for data in artifacts)
    for digest, data in zip(digests, artifacts, strict=True):
        tensors.add(digest, data)
    lines = [Member(keys[depth - 1], (0, 1, 2)[:depth], digests[:depth]) for depth in (1, 2, 3)]
    together = stage_logits(skeleton, tensors, lines, texts)
    prepared = skeleton.answer([tensors.member(line) for line in lines], skeleton.prepare(texts))
    for place in (0, 7, 41):
        alone = stage_logits(skeleton, tensors, lines[::-1], [texts[place]])[::-1]
        for whole, kept, single in zip(together, prepared, alone, strict=True):
            assert np.array_equal(whole[place], single[0])
            assert np.array_equal(kept[place], single[0])
