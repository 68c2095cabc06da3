from uuid import UUID

import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from shards.digest import canonical, digest_of, keyed
from shards.merkle import root
from shards.partition import Cell, cell_of, dataset_key, record_id_of

# Leaves and roots of the certificate-transparency reference tests for RFC 6962, section 2.1.
LEAVES = ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
KEY = b"k" * 32


def test_merkle_roots_are_those_of_rfc_6962() -> None:
    leaves = [bytes.fromhex(leaf) for leaf in LEAVES]
    assert [root(leaves[:size]).hex() for size in range(1, 9)] == list(ROOTS)


def test_root_of_nothing_is_the_hash_of_the_empty_string() -> None:
    assert root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=40), st.data())
def test_any_changed_leaf_changes_the_root(leaves: list[bytes], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(leaves) - 1))
    changed = [*leaves[:place], leaves[place] + b"x", *leaves[place + 1 :]]
    assert root(changed) != root(leaves)
    assert root([*leaves, b""]) != root(leaves)


def test_canonical_json_knows_no_order_of_keys() -> None:
    assert canonical({"b": 1, "a": [True, None]}) == b'{"a":[true,null],"b":1}'
    assert digest_of({"x": 1, "y": 2}) == digest_of({"y": 2, "x": 1})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)


@given(JSON)
def test_canonical_json_is_that_of_rfc_8785(value: object) -> None:
    """Also where the standard library writes it, since texts are ASCII and numbers whole."""
    assert canonical(value) == rfc8785.dumps(value)


@given(
    st.recursive(
        st.text(st.characters(max_codepoint=127)),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(max_codepoint=127), max_size=4), inner),
    )
)
def test_canonical_json_escapes_every_ascii_character_as_rfc_8785_does(value: object) -> None:
    assert canonical(value) == rfc8785.dumps(value)


def test_keyed_parts_do_not_run_together() -> None:
    assert keyed(KEY, b"ab", b"c") != keyed(KEY, b"a", b"bc")
    assert keyed(KEY, b"ab") != keyed(KEY, b"ab", b"")


@given(st.uuids(), st.integers(1, 9), st.integers(1, 9))
def test_a_cell_lies_in_the_grid_and_never_moves(subject: UUID, shards: int, slices: int) -> None:
    cell = cell_of(KEY, subject, shards=shards, slices=slices)
    assert 0 <= cell.shard < shards
    assert 0 <= cell.slice < slices
    assert cell == cell_of(KEY, subject, shards=shards, slices=slices)


def test_subjects_spread_evenly_and_differently_per_dataset() -> None:
    subjects = [UUID(int=number) for number in range(6000)]
    places = {name: dataset_key(KEY, UUID(int=name)) for name in (1, 2)}
    cells = {name: [cell_of(key, s, shards=4, slices=3) for s in subjects] for name, key in places.items()}
    counts = [cells[1].count(Cell(shard, piece)) for shard in range(4) for piece in range(3)]
    assert sum((count - 500) ** 2 / 500 for count in counts) < 31.3  # chi-square, 11 degrees, p = 0.001
    assert sum(a == b for a, b in zip(cells[1], cells[2], strict=True)) < 700


def test_record_ids_hide_and_keep_apart_the_callers_ids() -> None:
    assert record_id_of(KEY, "alice@example.org") == record_id_of(KEY, "alice@example.org")
    assert record_id_of(KEY, "a") != record_id_of(KEY, "b") != record_id_of(b"q" * 32, "b")
