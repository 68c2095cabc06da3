import json
import random
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_recipe

from shards.engine.determinism import epoch_order, fingerprint, stage_seed
from shards.recipe import Backbone

RECIPE = tiny_recipe(Backbone(source="", digest="d" * 64))
IDS = [uuid.UUID(int=number) for number in range(30)]


@given(st.permutations(IDS), st.integers(0, 2**63 - 1), st.integers(0, 9), st.sets(st.sampled_from(IDS)))
def test_taking_records_out_leaves_the_order_of_the_others(
    shuffled: list[uuid.UUID], seed: int, epoch: int, gone: set[uuid.UUID]
) -> None:
    before = epoch_order(seed, epoch, IDS)
    after = epoch_order(seed, epoch, [record_id for record_id in shuffled if record_id not in gone])
    assert after == [record_id for record_id in before if record_id not in gone]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(seed, epoch, IDS)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(IDS) not in orders


def test_the_order_is_known_for_ever() -> None:
    # Every artefact in every installation hangs on these few hashes: they may never change.
    assert [record_id.int for record_id in epoch_order(7, 0, IDS[:6])] == [5, 3, 1, 2, 0, 4]
    assert stage_seed(RECIPE, 0, (0, 1)) == 8424339379222425983


def test_seeds_come_from_seed_shard_and_prefix_alone() -> None:
    places = [(0, (0,)), (0, (1,)), (0, (0, 1)), (0, (1, 0)), (1, (0,)), (0, (10,)), (0, (1, 0, 0))]
    assert len({stage_seed(RECIPE, shard, prefix) for shard, prefix in places}) == len(places)
    other = tiny_recipe(Backbone(source="", digest="e" * 64), epochs=9)
    assert stage_seed(other, 0, (0,)) == stage_seed(RECIPE, 0, (0,))
    assert all(0 <= stage_seed(RECIPE, shard, prefix) < 2**63 for shard, prefix in places)


def test_the_global_generators_do_not_matter() -> None:
    random.seed(1)
    one = stage_seed(RECIPE, 0, (0,)), epoch_order(1, 1, IDS)
    random.seed(2)
    assert (stage_seed(RECIPE, 0, (0,)), epoch_order(1, 1, IDS)) == one


@pytest.mark.golden
def test_the_fingerprint_names_what_decides_bits() -> None:
    found = fingerprint("cpu", "bfloat16")
    assert json.loads(json.dumps(found)) == found
    assert {"torch", "transformers", "peft", "numpy", "tokenizers", "isa", "threads", "dtype", "build"} <= set(found)
    assert fingerprint("cpu", "float32") != found
