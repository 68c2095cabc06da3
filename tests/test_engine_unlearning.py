"""The crown test: a deletion and its rebuild end, bit for bit, in what training without the records gives."""

import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import World, tiny_backbone, tiny_recipe, tiny_record

from shards.digest import sha256_hex
from shards.engine.determinism import prepare
from shards.engine.replay import replay
from shards.engine.s3t import S3T
from shards.manifest import Record
from shards.partition import cell_of
from shards.plan import ancestry, canonical
from shards.recipe import Lora

pytestmark = pytest.mark.golden
KEY = b"partition key of the tests ....."
Cells = dict[tuple[int, int], list[Record]]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> S3T:
    prepare()
    entry = tiny_backbone(tmp_path_factory.mktemp("backbone"))
    lora = Lora(rank=2, alpha=4, dropout=0.1)
    return S3T(tiny_recipe(entry, lora=lora, backbone_dropout=True, precision=request.param))


def cells_of(owners: dict[str, int], gone: frozenset[str] = frozenset()) -> Cells:
    """Records of each owner in the owner's cell; `gone` owners never existed."""
    cells: Cells = {(shard, piece): [] for shard in range(2) for piece in range(2)}
    for owner, count in owners.items():
        cell = cell_of(KEY, uuid.uuid5(uuid.NAMESPACE_OID, owner), shards=2, slices=2)
        if owner not in gone:
            cells[cell.shard, cell.slice] += [tiny_record(f"{owner}-{number}") for number in range(count)]
    return cells


def records_of(owner: str, count: int) -> set[uuid.UUID]:
    return {tiny_record(f"{owner}-{number}").record_id for number in range(count)}


OWNERS = st.dictionaries(st.sampled_from([f"s{n}" for n in range(30)]), st.integers(1, 3), min_size=4, max_size=12)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(OWNERS, st.data())
def test_deleting_equals_never_having_had(engine: S3T, owners: dict[str, int], data: st.DataObject) -> None:
    gone = data.draw(st.lists(st.sampled_from(sorted(owners)), min_size=1, max_size=3, unique=True))
    ids = set().union(*(records_of(owner, owners[owner]) for owner in gone))
    world = World(engine, cells_of(owners))
    world.rebuild()
    for owner in gone:
        world.delete(records_of(owner, owners[owner]))
    check_clean(world, ids)

    without = World(engine, cells_of(owners, frozenset(gone)))
    engine.trunk.clear()
    without.rebuild()
    deactivated = {key: digest for key, digest in world.digests.items() if key in without.digests}
    assert deactivated == {key: without.digests[key] for key in deactivated}
    assert set(world.live) <= set(without.live)

    world.rebuild()
    check_clean(world, ids)
    assert world.digests == without.digests
    assert world.assembly().digest == without.assembly().digest
    assert canonical(world.assembly(), engine.recipe, world.roots)


def check_clean(world: World, ids: set[uuid.UUID]) -> None:
    """Nothing that is served has any of the ids in its lineage."""
    for member in world.assembly().members:
        for stage in ancestry(world.live[member.stage], world.live) or () if member else ():
            assert not any(world.manifests[root] & ids for root in stage.lineage)


def test_order_of_deletions_does_not_show(engine: S3T) -> None:
    owners = {f"s{number}": 1 + number % 3 for number in range(10)}
    batches = [["s1"], ["s4", "s7"], ["s2"]]
    digests: set[str] = set()
    for sequence in (batches, batches[::-1], [["s1", "s4", "s7", "s2"]]):
        world = World(engine, cells_of(owners))
        world.rebuild()
        for batch in sequence:
            world.delete(set().union(*(records_of(owner, owners[owner]) for owner in batch)))
            if "s2" in batch:
                world.rebuild()
        world.rebuild()
        digests.add(world.assembly().digest)
    assert len(digests) == 1


def test_served_stages_replay_right_after_a_deletion(engine: S3T) -> None:
    owners = {f"s{number}": 2 for number in range(9)}
    world = World(engine, cells_of(owners))
    world.rebuild()
    world.delete(records_of("s3", 2))
    for member in world.assembly().members:
        if member is not None:
            line = ancestry(world.live[member.stage], world.live) or ()
            slices = {piece: world.cells[line[0].shard, piece] for piece in member.prefix}
            assert replay(engine, line, slices) == list(member.artifacts)
            assert [sha256_hex(world.artifacts[digest]) for digest in member.artifacts] == list(member.artifacts)
