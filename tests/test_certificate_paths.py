"""Merkle paths in a certificate: into manifests, into the ledger, from one tree head to the next."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from certificate_ledger import Log, log_of, with_ledger
from certificate_sample import (
    HURT,
    KEY,
    OTHER_KEY,
    PEM,
    RECIPE,
    artifact_digest,
    at,
    commitments,
    manifest,
    manifest_row,
    resigned,
    sample,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from service.evidence import holdings, log_check, merkle
from service.evidence.certificate import build, issue
from service.evidence.keys import public_pem
from service.evidence.membership import Paths, show
from service.evidence.opening import Key, Refused, Trusted
from service.evidence.rows import Evidence, EvidenceError, ManifestRow, RecordRow
from service.evidence.tree_head import TreeHead, sign_head
from service.evidence.verify import Check, verify
from shards.assembly import Assembly, Member
from shards.merkle import leaf_hash, root
from shards.stages import CellRoot, chain


def failed(envelope: Any, pem: bytes = PEM) -> list[Check]:
    return [check for check in verify(envelope, pem) if not check.passed]


def lines(envelope: Any, pem: bytes = PEM) -> list[str]:
    return [check.name for check in failed(envelope, pem)]


def tree_of(hashes: Sequence[bytes]) -> merkle.Tree:
    return merkle.Tree(len(hashes), lambda _level, _tile, width: hashes[:width])


# The proof formulas, written twice


@settings(deadline=None)
@given(st.integers(1, 200), st.data())
def test_both_programs_agree_on_inclusion(size: int, data: st.DataObject) -> None:
    hashes = [leaf_hash(str(number).encode()) for number in range(size)]
    index = data.draw(st.integers(0, size - 1))
    path, head = tree_of(hashes).inclusion(index), root([str(number).encode() for number in range(size)])
    assert log_check.root_above(hashes[index], index, size, path) == head
    other = data.draw(st.integers(0, size - 1))
    longer = [*path, hashes[0]]
    for wrong in (
        log_check.root_above(hashes[index], index, size, longer),
        log_check.root_above(hashes[index], index, size, path[1:]) if path else None,
        log_check.root_above(hashes[other], index, size, path) if other != index else None,
        log_check.root_above(hashes[index], size, size, path),
        log_check.root_above(hashes[index], -1, size, path),
    ):
        assert wrong != head


@settings(deadline=None)
@given(st.integers(1, 200), st.data())
def test_both_programs_agree_on_consistency(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, size))
    hashes = [leaf_hash(str(number).encode()) for number in range(size)]
    path = tree_of(hashes).consistency(old)
    before = log_check.Head("o", old, merkle.root_of_hashes(hashes[:old]))
    after = log_check.Head("o", size, merkle.root_of_hashes(hashes))
    assert log_check.continues(before, after, path)
    assert merkle.verify_consistency(old, size, path, before.root, after.root)
    forged = log_check.Head("o", old, hashes[0][::-1])
    assert not log_check.continues(forged, after, path)
    assert not log_check.continues(before, dataclasses.replace(after, root=forged.root), path)
    assert not log_check.continues(before, after, [*path, hashes[0]])
    assert not path or not log_check.continues(before, after, path[:-1])
    assert old == size or not log_check.continues(after, before, path)


def test_a_tree_head_is_read_as_the_signed_note_that_it_is() -> None:
    note = sign_head(TreeHead("log.example/one", 7, bytes(32)), KEY)
    assert log_check.open_head(note, [Key(KEY.public_key())]) == log_check.Head("log.example/one", 7, bytes(32))
    assert log_check.open_head(note, [Key(OTHER_KEY.public_key()), Key(KEY.public_key())]).size == 7
    for broken in (
        "",
        note.replace("\n7\n", "\n8\n"),
        note.replace("\n7\n", "\n07\n"),
        note.replace("log.example/one", "log.example/two"),
        note.replace("— log.example/one", "— other"),
        note.split("\n\n", maxsplit=1)[0],
        note.replace("AAAA", "AAA"),
        note[:-3] + "\n",
    ):
        with pytest.raises(Refused):
            log_check.open_head(broken, [Key(KEY.public_key())])
    with pytest.raises(Refused, match=r"no signature of log\.example/one under the tree head of size 7"):
        log_check.open_head(note, [Key(OTHER_KEY.public_key())])


# Into manifests


@settings(deadline=None)
@given(st.sets(st.binary(min_size=32, max_size=32), max_size=40), st.binary(min_size=32, max_size=32))
def test_every_commitment_is_shown_held_or_lacking(held: set[bytes], asked: bytes) -> None:
    found = tuple(sorted(held))
    row = ManifestRow(shard=0, slice=0, root=root(found).hex(), commitments=found)
    record = RecordRow(record_id=sample().records[0].record_id, commitment=asked, shard=0, slice=0)
    said = show(row, (record,))
    holds, lacks = holdings.examine([said])
    place = (0, 0, row.root)
    assert (asked.hex() in holds[place], asked.hex() in lacks[place]) == (asked in held, asked not in held)
    assert Paths(row).root == row.root


@settings(deadline=None)
@given(st.sets(st.binary(min_size=32, max_size=32), min_size=1, max_size=40), st.data())
def test_nobody_can_show_that_a_manifest_lacks_what_it_holds(held: set[bytes], data: st.DataObject) -> None:
    """Any two leaves that it holds, any claimed number of rows and any indexes: never accepted for a held one."""
    found = tuple(sorted(held))
    row = ManifestRow(shard=0, slice=0, root=root(found).hex(), commitments=found)
    paths, asked = Paths(row), data.draw(st.sampled_from(found))
    places = [None, *(paths.place(each) for each in found)]
    before, after = data.draw(st.sampled_from(places)), data.draw(st.sampled_from(places))
    rows = data.draw(st.integers(0, 2 * len(found)))
    shift = data.draw(st.integers(-2, 2))
    if before is not None:
        before = before | {"index": before["index"] + shift}
    if after is not None:
        after = after | {"index": after["index"] + data.draw(st.sampled_from((0, shift)))}
    gap = {"commitment": asked.hex(), "before": before, "after": after}
    said = {"shard": 0, "slice": 0, "root": row.root, "rows": rows, "holds": [], "lacks": [gap]}
    with pytest.raises(Refused):
        holdings.examine([said])


@pytest.mark.parametrize("size", range(1, 6))
def test_no_pair_of_neighbours_shows_that_a_held_commitment_is_lacking(size: int) -> None:
    found = tuple(bytes([8 * number] * 32) for number in range(size))
    row = ManifestRow(shard=0, slice=0, root=root(found).hex(), commitments=found)
    paths = Paths(row)
    places = [None, *(paths.place(each) | {"index": at} for at in range(size + 2) for each in found)]
    for asked, before, after, rows in itertools.product(found, places, places, range(size + 3)):
        gap = {"commitment": asked.hex(), "before": before, "after": after}
        said = {"shard": 0, "slice": 0, "root": row.root, "rows": rows, "holds": [], "lacks": [gap]}
        with pytest.raises(Refused):
            holdings.examine([said])


def test_rows_that_do_not_give_the_root_make_no_certificate() -> None:
    rows = sample().manifests
    wrong = dataclasses.replace(rows[0], commitments=rows[0].commitments[1:])
    with pytest.raises(EvidenceError, match="changed by hand"):
        build(dataclasses.replace(sample(), manifests=(wrong, *rows[1:])))


def at_path(path: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def tamper(statement: dict[str, Any]) -> None:
        *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
        holder: Any = statement["predicate"]
        for step in steps:
            holder = holder[step]
        holder[last] = change(holder[last])

    return tamper


def place_of(moment: str) -> str:
    """The manifest of the cell before or after."""
    said = build(sample())["predicate"]
    roots = [each["root"] for each in said["manifests"]]
    return f"manifests.{roots.index(said['cells'][0][moment])}"


HOLDS, LACKS = place_of("before"), place_of("after")
ZERO = "0" * 64


@pytest.mark.parametrize(
    ("line", "tamper"),
    [
        ("membership", at_path(f"{HOLDS}.holds.0.path.0", lambda _: ZERO)),
        ("membership", at_path(f"{HOLDS}.holds.0.path", lambda path: path[:-1])),
        ("membership", at_path(f"{HOLDS}.holds.0.index", lambda index: index + 1)),
        ("membership", at_path(f"{HOLDS}.holds.0.commitment", lambda _: ZERO)),
        ("membership", at_path(f"{HOLDS}.holds", lambda _: [])),
        ("membership", at_path(f"{HOLDS}.root", lambda _: ZERO)),
        ("membership", at_path("manifests", lambda listed: [each for each in listed if not each["holds"]])),
        ("membership", at_path("manifests", lambda listed: [*listed, listed[0]])),
        ("non-membership", at_path(f"{LACKS}.lacks.0.after.path.0", lambda _: ZERO)),
        ("non-membership", at_path(f"{LACKS}.lacks.0.before", lambda _: None)),
        ("non-membership", at_path(f"{LACKS}.lacks.0.after", lambda _: None)),
        ("non-membership", at_path(f"{LACKS}.lacks.0.commitment", lambda _: ZERO)),
        ("non-membership", at_path(f"{LACKS}.lacks", lambda _: [])),
        ("non-membership", at_path("manifests", lambda listed: [each for each in listed if not each["lacks"]])),
        ("tree head", at_path("ledger.checkpoint", lambda text: text.replace("sample\n", "sample2\n"))),
        ("tree head", at_path("ledger.checkpoint", lambda text: text[:-5])),
        ("ledger entries", at_path("ledger.entries.0.path.0", lambda _: ZERO)),
        ("ledger entries", at_path("ledger.entries.1.leaf", lambda leaf: leaf.replace("2026", "2025"))),
        ("ledger entries", at_path("ledger.entries.1.opening", lambda opening: opening.replace("5a5a", "5b5a", 1))),
        ("ledger entries", at_path("ledger.entries.1.opening", lambda _: "{")),
        ("ledger entries", at_path("ledger.entries.1.leaf", lambda _: "[]")),
        ("ledger entries", at_path("ledger.entries", lambda entries: entries[::-1])),
        ("ledger entries", at_path("ledger.entries", lambda entries: [*entries, entries[-1]])),
        ("events", at_path("ledger.entries", lambda entries: entries[:-1])),
        ("events", at_path("ledger.entries", lambda es: [e for e in es if "replica.ended" not in e["leaf"]])),
        ("events", at_path("replicas.0.process_id", lambda _: "00000000-0000-0000-0000-000000000009")),
        ("events", at_path("tainted.0.artifacts.0.digest", lambda _: ZERO)),
        ("events", at_path("payloads.0.object_name", lambda name: f"{name}x")),
        ("events", at_path("request.subject_commitment", lambda _: "1" * 64)),
        ("times", at_path("ledger.entries", lambda entries: entries[1:])),
        ("times", at_path("times.1.at", lambda text: text.replace(".005", ".006"))),
        ("times", at_path("clock_back_microseconds", lambda _: 5)),
    ],
)
def test_a_lying_operator_is_caught_at_the_right_line(line: str, tamper: Callable[[dict[str, Any]], None]) -> None:
    assert line in lines(resigned(tamper))


def test_each_record_and_each_tainted_stage_needs_its_own_path() -> None:
    def more(statement: dict[str, Any]) -> None:
        """A record that nothing shows, beside one that is shown."""
        first = statement["predicate"]["records"][0]
        second = first | {"record_id": "00000000-0000-0000-0000-000000000064", "commitment": "7" * 64}
        statement["predicate"]["records"].append(second)

    def unread(statement: dict[str, Any]) -> None:
        """A tainted stage whose manifest is touched, as is said, but shown by no path."""
        said, older = statement["predicate"], manifest(*HURT, deleted=True, generation=1)
        stage = next(each["stage"] for each in said["tainted"] if each["stage"]["prefix"] == [1])
        stage["roots"] = [older]
        said["manifests"] = [each for each in said["manifests"] if each["root"] != older]

    for tamper, words in ((more, "lay in its cell"), (unread, "read one of the records")):
        details = [check.detail for check in failed(resigned(tamper)) if check.name == "membership"]
        assert len(details) == 1
        assert words in details[0]


def test_a_served_manifest_that_held_the_record_cannot_be_hidden() -> None:
    """Without its root under `touched`, only the path tells: and there is none."""
    rows = sample()
    hurt = {0: manifest(0, 0), 1: manifest(*HURT, deleted=True, generation=1)}
    line = chain(RECIPE, 0, (0, 1), hurt)
    second = rows.served_stages[1:]
    members = (
        Member(line[-1].key, (0, 1), tuple(artifact_digest(stage) for stage in line)),
        Member(second[-1].key, second[-1].prefix, tuple(artifact_digest(stage) for stage in second)),
    )
    served = (*line, *second)
    platform = dataclasses.replace(rows.platforms[0], stages=tuple(stage.key for stage in served))
    lying = dataclasses.replace(
        rows,
        served_stages=served,
        platforms=(platform,),
        replays=(),
        assembly_after=Assembly(RECIPE, members).to_json(),
        touched=(CellRoot(*HURT, manifest(*HURT, deleted=True, generation=2)),),
        manifests=rows.manifests[1:],
    )
    found = failed(issue(with_ledger(lying), KEY))
    assert [check.name for check in found] == ["non-membership"]
    assert "nothing shows that served manifest" in found[0].detail
    shown = dataclasses.replace(lying, manifests=rows.manifests)
    assert lines(issue(with_ledger(shown), KEY)) == ["membership", "non-membership"]


def test_a_served_manifest_of_the_records_cell_is_shown_to_lack_it() -> None:
    rows = sample()
    hurt = {0: manifest(0, 0), 1: manifest(*HURT, generation=3)}
    line = chain(RECIPE, 0, (0, 1), hurt)
    second = rows.served_stages[1:]
    members = (
        Member(line[-1].key, (0, 1), tuple(artifact_digest(stage) for stage in line)),
        Member(second[-1].key, second[-1].prefix, tuple(artifact_digest(stage) for stage in second)),
    )
    served = (*line, *second)
    rebuilt = dataclasses.replace(
        rows,
        served_stages=served,
        platforms=(dataclasses.replace(rows.platforms[0], stages=tuple(stage.key for stage in served)),),
        replays=(),
        assembly_after=Assembly(RECIPE, members).to_json(),
        manifests=(*rows.manifests, manifest_row(*HURT, generation=3)),
    )
    checks = verify(issue(with_ledger(rebuilt), KEY), PEM)
    assert all(check.passed for check in checks), checks
    (line_of,) = [check.detail for check in checks if check.name == "non-membership"]
    assert "1 served manifests lack the records" in line_of


def test_neighbours_say_nothing_of_others_but_commitments() -> None:
    """What a path gives away of other records: their salted commitments and hashes above them."""
    said = build(sample())["predicate"]["manifests"]
    others = {each.hex() for each in commitments(*HURT, generation=2)}
    shown = {
        place["commitment"]
        for each in said
        for gap in each["lacks"]
        for place in (gap["before"], gap["after"])
        if place
    }
    assert shown
    assert shown <= others


# Into the ledger


def test_an_event_of_another_request_is_refused() -> None:
    rows = sample()
    log, about, size = log_of(rows)
    mixed = dataclasses.replace(rows, ledger=log.rows(size, [0, *about]))
    assert lines(issue(mixed, KEY)) == ["ledger entries", "events", "times"]


def test_a_tree_head_of_another_key_is_refused() -> None:
    rows = sample()
    log, _, size = log_of(rows)
    other = dataclasses.replace(
        rows, ledger=dataclasses.replace(rows.ledger, checkpoint=log.checkpoint(size, OTHER_KEY))
    )
    assert "tree head" in lines(issue(other, KEY))
    both = [Trusted(PEM), Trusted(public_pem(OTHER_KEY))]
    assert [check.name for check in verify(issue(other, KEY), both) if not check.passed] == []


def test_another_version_than_the_ledgers_is_refused_without_its_publication_too() -> None:
    def renumber(statement: dict[str, Any]) -> None:
        said = statement["predicate"]
        said["after"] |= {"version": 6, "floor": 6}
        statement["subject"][0]["name"] = "reviews@6"
        for row in said["replicas"]:
            row["covers"] = 6
        said["ledger"]["entries"] = [e for e in said["ledger"]["entries"] if "version.published" not in e["leaf"]]

    assert lines(resigned(renumber)) == ["events"]


def test_a_key_signs_tree_heads_of_its_time_alone() -> None:
    """Handed over at a size: what is larger is the next key's, also where the old one was stolen since."""
    rows = sample()
    log, _, size = log_of(rows)
    old, envelope = Trusted(PEM, until=size), issue(rows, KEY)
    new = Trusted(public_pem(OTHER_KEY), since=size)
    assert [check.name for check in verify(envelope, [old, new]) if not check.passed] == []
    stolen = [dataclasses.replace(old, until=size - 1), dataclasses.replace(new, since=size - 1)]
    assert "tree head" in {check.name for check in verify(envelope, stolen) if not check.passed}
    early = dataclasses.replace(
        rows, ledger=dataclasses.replace(rows.ledger, checkpoint=log.checkpoint(size, OTHER_KEY))
    )
    assert "tree head" in {check.name for check in verify(issue(early, KEY), [old, new]) if not check.passed}


def test_a_body_that_is_not_of_its_kind_fails_and_nothing_breaks() -> None:
    rows = sample()
    log, about, size = log_of(rows)
    for kind in ("request.received", "target.deactivating", "version.published", "replica.ended", "artifact.destroyed"):
        told = [dataclasses.replace(each, body={"stages": [[1]]}) if each.kind == kind else each for each in log.told]
        broken = dataclasses.replace(rows, ledger=Log(told).rows(size, about))
        assert "events" in lines(issue(broken, KEY)), kind


def stepped(milliseconds: int) -> Evidence:
    """The clock is set back between `deactivating` and `deactivated`."""
    rows = sample()
    times = tuple(
        dataclasses.replace(row, at=at(5 - milliseconds)) if row.state == "deactivated" else row for row in rows.times
    )
    replicas = tuple(dataclasses.replace(row, at=at(5 - milliseconds)) for row in rows.replicas)
    return with_ledger(dataclasses.replace(rows, times=times, replicas=replicas))


def test_a_clock_that_goes_back_is_told_and_not_hidden() -> None:
    for milliseconds in (4, 4000):
        checks = {check.name: check for check in verify(issue(stepped(milliseconds), KEY), PEM)}
        assert all(check.passed for check in checks.values()), checks
        assert f"the clock went back by {milliseconds / 1000:.6f} s" in checks["times"].detail
        assert ("clock_went_back" in checks["open items"].detail) == (milliseconds >= 1000)
    silent = at_path("clock_back_microseconds", lambda _: 0)
    assert "times" in lines(resigned(silent, stepped(4000)))

    def unnamed(statement: dict[str, Any]) -> None:
        statement["predicate"]["open_items"] = [
            item for item in statement["predicate"]["open_items"] if item["code"] != "clock_went_back"
        ]

    assert lines(resigned(unnamed, stepped(4000))) == ["open items"]


def test_a_certificate_of_version_1_is_refused_by_name() -> None:
    def old(statement: dict[str, Any]) -> None:
        statement["predicateType"] = "https://expunge.dev/deletion-certificate/v1"

    (check,) = failed(resigned(old))
    assert (check.name, "version 1" in check.detail) == ("closed schema", True)


def test_an_old_receipt_whose_opening_was_erased_is_no_contradiction() -> None:
    """Openings are kept for a month at least: an older event may be gone, a younger one may not."""
    rows = sample()
    log, about, size = log_of(rows)
    without = dataclasses.replace(rows, ledger=log.rows(size, about[1:]))
    assert lines(issue(without, KEY)) == ["times"]
    times = tuple(
        dataclasses.replace(row, at=at(-31 * 86_400_000)) if row.state == "received" else row for row in rows.times
    )
    aged = dataclasses.replace(without, times=times)
    assert lines(issue(aged, KEY)) == []
