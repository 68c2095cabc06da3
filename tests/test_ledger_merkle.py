"""The tree and its signed heads: RFC 6962's own answers, a naive tree, C2SP's examples, and what is not accepted."""

import base64
import hashlib
import json
import math
from datetime import UTC, datetime
from types import SimpleNamespace
from uuid import UUID

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from service.evidence import leaves, note
from service.evidence.merkle import (
    CompactRange,
    Tree,
    leaf_hash,
    node_hash,
    root_of_hashes,
    verify_consistency,
    verify_inclusion,
)
from service.evidence.tiles import Tile, added_tiles, read_bundle, write_bundle
from service.evidence.tree_head import (
    TreeHead,
    TreeHeadError,
    check_proof,
    open_head,
    read_head,
    sign_head,
    write_proof,
)
from shards.merkle import root

# The leaves and answers of certificate-transparency's tests of RFC 6962.
LEAVES = [bytes.fromhex(each) for each in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
ROOTS = [bytes.fromhex(each) for each in (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)]  # fmt: skip
INCLUSION = {  # (index, size): proof
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
CONSISTENCY = {  # (old, new): proof
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
HASHES = [leaf_hash(leaf) for leaf in LEAVES]
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def tree_of(hashes: list[bytes]) -> Tree:
    """A tree that reads its tiles as a log's are: each level's hashes are the roots of the full tiles below."""
    levels = [hashes]
    while len(levels[-1]) >= 256:
        below = levels[-1]
        levels.append([naive(below[k : k + 256]) for k in range(0, len(below) - 255, 256)])
    return Tree(len(hashes), lambda level, tile, width: levels[level][tile * 256 : tile * 256 + width])


def naive(hashes: list[bytes]) -> bytes:
    """MTH by its definition."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    if len(hashes) == 1:
        return hashes[0]
    k = 2 ** (math.ceil(math.log2(len(hashes))) - 1)
    return node_hash(naive(hashes[:k]), naive(hashes[k:]))


def naive_path(index: int, hashes: list[bytes]) -> list[bytes]:
    """PATH by its definition."""
    if len(hashes) == 1:
        return []
    k = 2 ** (math.ceil(math.log2(len(hashes))) - 1)
    if index < k:
        return [*naive_path(index, hashes[:k]), naive(hashes[k:])]
    return [*naive_path(index - k, hashes[k:]), naive(hashes[:k])]


def naive_proof(old: int, hashes: list[bytes], *, whole: bool = True) -> list[bytes]:
    """SUBPROOF by its definition."""
    if old == len(hashes):
        return [] if whole else [naive(hashes)]
    k = 2 ** (math.ceil(math.log2(len(hashes))) - 1)
    if old <= k:
        return [*naive_proof(old, hashes[:k], whole=whole), naive(hashes[k:])]
    return [*naive_proof(old - k, hashes[k:], whole=False), naive(hashes[:k])]


def made(count: int) -> list[bytes]:
    return [leaf_hash(b"%d" % k) for k in range(count)]


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_of_rfc_6962(size: int) -> None:
    assert root(LEAVES[:size]) == ROOTS[size - 1]
    assert CompactRange().extend(HASHES[:size])[0].root == ROOTS[size - 1]
    assert tree_of(HASHES[:size]).root() == ROOTS[size - 1]


def test_the_root_of_nothing() -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert root([]).hex() == CompactRange().root.hex() == tree_of([]).root().hex() == empty


@pytest.mark.parametrize(("place", "proof"), INCLUSION.items())
def test_inclusion_proofs_of_rfc_6962(place: tuple[int, int], proof: list[str]) -> None:
    index, size = place
    found = tree_of(HASHES[:size]).inclusion(index)
    assert [each.hex() for each in found] == proof
    assert verify_inclusion(HASHES[index], index, size, found, ROOTS[size - 1])


@pytest.mark.parametrize(("sizes", "proof"), CONSISTENCY.items())
def test_consistency_proofs_of_rfc_6962(sizes: tuple[int, int], proof: list[str]) -> None:
    old, new = sizes
    found = tree_of(HASHES[:new]).consistency(old)
    assert [each.hex() for each in found] == proof
    assert verify_consistency(old, new, found, ROOTS[old - 1], ROOTS[new - 1])


@given(st.integers(1, 700), st.data())
def test_proofs_are_those_of_the_definitions(size: int, data: st.DataObject) -> None:
    hashes = made(size)
    tree, index, old = tree_of(hashes), data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    assert tree.root() == naive(hashes)
    assert tree.inclusion(index) == naive_path(index, hashes)
    assert tree.consistency(old) == naive_proof(old, hashes)
    assert tree.subtree(0, old) == naive(hashes[:old])
    assert verify_inclusion(hashes[index], index, size, tree.inclusion(index), tree.root())
    assert verify_consistency(old, size, tree.consistency(old), naive(hashes[:old]), tree.root())


@given(st.lists(st.integers(0, 300), max_size=6))
def test_growing_in_steps_is_growing_at_once(steps: list[int]) -> None:
    hashes = made(sum(steps))
    grown, nodes, at = CompactRange(), [], 0
    for step in steps:
        grown, added = grown.extend(hashes[at : at + step])
        nodes += added
        at += step
    assert (grown, grown.root) == (CompactRange().extend(hashes)[0], naive(hashes))
    assert [(n.level, n.position) for n in nodes] == [(1, k) for k in range(len(hashes) // 256)]
    assert [n.hash for n in nodes] == [naive(hashes[k * 256 : (k + 1) * 256]) for k in range(len(hashes) // 256)]


def test_nodes_of_the_second_level() -> None:
    grown, nodes = CompactRange().extend(made(1) * 65536)
    assert [(n.level, n.position) for n in nodes if n.level > 1] == [(2, 0)]
    assert nodes[-1].hash == grown.root
    with pytest.raises(ValueError, match="2 peaks"):
        CompactRange(3, (grown.root,))


@given(st.integers(2, 300), st.data())
def test_what_is_not_so_is_not_proved(size: int, data: st.DataObject) -> None:
    hashes = made(size)
    tree, index, old = tree_of(hashes), data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size - 1))
    proof, top = tree.inclusion(index), tree.root()
    other = (index + data.draw(st.integers(1, size - 1))) % size
    assert not verify_inclusion(hashes[index], other, size, proof, top)
    assert not verify_inclusion(hashes[other], index, size, proof, top)
    assert not verify_inclusion(hashes[index], index, size, proof[:-1], top)
    assert not verify_inclusion(hashes[index], index, size, [*proof, top], top)
    steps = tree.consistency(old)
    before = naive(hashes[:old])
    assert not verify_consistency(old, size, steps, node_hash(before, before), top)
    assert not verify_consistency(old, size, steps, before, before)
    assert not verify_consistency(old, size, [*steps, top], before, top)
    place = data.draw(st.integers(0, len(steps) - 1))
    edited = [*steps[:place], bytes(32), *steps[place + 1 :]]
    assert not verify_consistency(old, size, edited, before, top)


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 4), (4, 4)])
def test_no_proof_of_what_is_not_there(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="no leaf"):
        tree_of(made(size)).inclusion(index)
    assert not verify_inclusion(made(1)[0], index, size, [], made(1)[0])
    with pytest.raises(ValueError, match="beginning"):
        tree_of(made(size)).consistency(0)
    assert not verify_consistency(0, size + 1, [], root([]), root([]))


def test_a_tile_that_was_cut_makes_no_root() -> None:
    with pytest.raises(ValueError, match="3 hashes instead of 5"):
        Tree(5, lambda _level, _tile, _width: made(3)).root()


def test_tile_names_and_the_example_of_c2sp() -> None:
    assert Tile(0, 1234067, 256).path == "tile/0/x001/x234/067"
    assert Tile(1, 0, 17).path == "tile/1/000.p/17"
    assert Tile(-1, 273, 112).path == "tile/entries/273.p/112"
    tiles = added_tiles(0, 70_000)
    assert len([tile for tile in tiles if tile.level == 0 and tile.width == 256]) == 273
    partial = [tuple(tile) for tile in tiles if tile.width < 256]
    assert partial == [(0, 273, 112), (1, 1, 17), (2, 0, 1)]
    assert [tuple(tile) for tile in added_tiles(255, 256)] == [(0, 0, 256), (1, 0, 1)]
    assert added_tiles(7, 7) == []


@given(st.lists(st.binary(max_size=400), max_size=10), st.integers(0, 5))
def test_bundles(entries: list[bytes], cut: int) -> None:
    data = write_bundle(entries)
    assert read_bundle(data) == entries
    assert read_bundle(data[: len(data) - cut]) == entries[: len(read_bundle(data[: len(data) - cut]))]


def test_a_checkpoint_is_a_signed_note_that_other_tools_read() -> None:
    """The known answer of C2SP signed-note and Go's sumdb/note: a verifier key, and a note under it."""
    key = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    known = note.parse(
        "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n"
        "\u2014 PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"  # noqa: E501
    )
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key.split("+", 2)[2])[1:])
    assert note.vkey("PeterNeumann", public) == key
    note.require_signature(known, "PeterNeumann", public)
    with pytest.raises(note.NoteError, match="no signature"):
        note.require_signature(note.Note(known.text + "x\n", known.signatures), "PeterNeumann", public)


def test_tree_heads() -> None:
    head = TreeHead("log.example/one", 8, ROOTS[7])
    checkpoint = sign_head(head, KEY)
    assert checkpoint == sign_head(head, KEY)
    assert checkpoint.startswith(
        "log.example/one\n8\nXcnaeacGWamtVZy3Ad7ZoqudgjqtL0lgz+Nw7/RgQyg=\n\n\u2014 log.example/one "
    )
    assert open_head(checkpoint, KEY.public_key()) == head
    with pytest.raises(TreeHeadError, match="take the key"):
        open_head(checkpoint, Ed25519PrivateKey.generate().public_key())
    with pytest.raises(TreeHeadError, match=r"of the log log\.example/one, not of log\.example/two"):
        open_head(checkpoint, KEY.public_key(), origin="log.example/two")
    with pytest.raises(TreeHeadError, match="take the key"):
        open_head(checkpoint.replace("\n8\n", "\n9\n"), KEY.public_key())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "a\n\n",
        "a\nb\nc\n\n\u2014 a !\n",
        "a\n08\nAA==\n\n\u2014 a AAAAAAAA\n",
        "a\n8\nAA==\n\n\u2014 a AAAAAAAA\n",
        "a b\n8\n" + "A" * 43 + "=\n\n\u2014 a AAAAAAAA\n",
        "a\n8\n" + "A" * 43 + "=\n\n- a AAAAAAAA\n",
    ],
)
def test_what_is_no_checkpoint(text: str) -> None:
    with pytest.raises(TreeHeadError):
        read_head(text)


def test_cosignatures() -> None:
    witness = Ed25519PrivateKey.from_private_bytes(bytes(32))
    signed = note.parse(sign_head(TreeHead("log.example/one", 8, ROOTS[7]), KEY))
    both = note.parse(str(note.cosign(signed, "w.example", witness, 1679315147)))
    assert note.get_cosignature_time(both, "w.example", witness.public_key()) == 1679315147
    note.require_signature(both, "log.example/one", KEY.public_key())
    assert (
        both.signatures[1].key_id
        == hashlib.sha256(b"w.example\n\x04" + witness.public_key().public_bytes_raw()).digest()[:4]
    )
    later = note.cosign(both, "w.example", witness, 1679315148)
    assert len(later.signatures) == 2
    moved = note.Note(both.text.replace("8", "9"), both.signatures)
    with pytest.raises(note.NoteError, match="no cosignature"):
        note.get_cosignature_time(moved, "w.example", witness.public_key())
    with pytest.raises(ValueError, match="plus sign"):
        note.cosign(signed, "a+b", witness, 1)


def test_proofs_as_one_text() -> None:
    head = TreeHead("log.example/one", 8, ROOTS[7])
    proof = write_proof(5, tree_of(HASHES).inclusion(5), sign_head(head, KEY))
    assert proof.startswith("c2sp.org/tlog-proof@v1\nindex 5\nvBoGQ7EuTS18d5GPROD095qDi2z57FtcKD4fTYhZnms=\n")
    assert check_proof(proof, HASHES[5], KEY.public_key()) == (5, head)
    extra = proof.replace("\nindex", "\nextra AAAA\nindex")
    assert check_proof(extra, HASHES[5], KEY.public_key()) == (5, head)
    wrong = [
        (proof, HASHES[4]),
        (proof.replace("index 5", "index 4"), HASHES[5]),
        (proof.replace("@v1", "@v2"), HASHES[5]),
        (proof.replace("index 5", "index five"), HASHES[5]),
        (proof.replace("nms=", "nm"), HASHES[5]),
        ("", HASHES[5]),
    ]
    for text, leaf in wrong:
        with pytest.raises(TreeHeadError):
            check_proof(text, leaf, KEY.public_key())
    alone = TreeHead("log.example/one", 1, ROOTS[0])
    assert check_proof(write_proof(0, [], sign_head(alone, KEY)), HASHES[0], KEY.public_key()) == (0, alone)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)


@given(st.dictionaries(st.text(max_size=6), JSON, max_size=5))
def test_leaves_and_openings_are_canonical_whatever_the_body(body: dict[str, object]) -> None:
    body = json.loads(json.dumps(body))
    event = SimpleNamespace(
        event_id=UUID(int=7),
        kind="request.received",
        request_id=None,
        model_id=3,
        body=body,
        created_at=datetime(2026, 11, 22, tzinfo=UTC),
    )
    (sealed,) = leaves.seal([event], 41)
    assert sealed.leaf == rfc8785.dumps(json.loads(sealed.leaf))
    # A float that is whole and large is written without a point; read again it is a float to RFC 8785.
    again = json.loads(sealed.opening, parse_int=lambda text: int(text) if abs(int(text)) < 2**53 else float(text))
    assert sealed.opening == rfc8785.dumps(again)
    leaf = leaves.parse_leaf(sealed.leaf)
    assert (leaf.index, leaf.kind, leaf.time) == (41, "request.received", "2026-11-22T00:00:00.000000Z")
    assert leaves.open_leaf(leaf, sealed.opening)["model_id"] == 3
    with pytest.raises(ValueError, match="does not open leaf 41"):
        leaves.open_leaf(leaf, next(leaves.seal([event], 41)).opening)
    with pytest.raises(ValueError, match="not a leaf"):
        leaves.parse_leaf(sealed.leaf + b" ")


def test_a_leaf_says_nothing_but_kind_and_time() -> None:
    event = SimpleNamespace(
        event_id=UUID(int=7), kind="target.erasing", request_id=UUID(int=9), model_id=3, body={"artifacts": 4},
        created_at=datetime(2026, 11, 22, tzinfo=UTC),
    )  # fmt: skip
    (one,), (other,) = leaves.seal([event], 0), leaves.seal([event], 0)
    said = json.loads(one.leaf)
    assert said.keys() == {"type", "index", "event_id", "kind", "time", "commitment"}
    assert said["commitment"] != json.loads(other.leaf)["commitment"]
    assert root_of_hashes([leaf_hash(one.leaf)]) == leaf_hash(one.leaf)
