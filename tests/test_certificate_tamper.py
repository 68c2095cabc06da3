"""Each way to change a certificate fails at the line that is about it."""

import base64
import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from certificate_sample import (
    KEY,
    OTHER_KEY,
    PEM,
    leaves,
    manifest,
    other,
    put,
    resigned,
    restricted,
    sample,
    schema_of,
)
from hypothesis import given
from hypothesis import strategies as st

from service.evidence.certificate import PAYLOAD_TYPE, build, issue
from service.evidence.dsse import sign
from service.evidence.form import CERTIFICATE, PREDICATE, SHAPES
from service.evidence.keys import public_pem
from service.evidence.shape import misfit
from service.evidence.verify import read_json, verify
from shards.digest import canonical, digest_of, sha256_hex
from shards.merkle import root

HONEST = issue(sample(), KEY)
STATEMENT = build(sample())


def refused(envelope: Any, pem: bytes = PEM) -> list[str]:
    return [check.name for check in verify(envelope, pem) if not check.passed]


def wrapped(payload: bytes) -> dict[str, Any]:
    return sign(payload, PAYLOAD_TYPE, KEY)


def swapped(payload: bytes) -> dict[str, Any]:
    """The honest signature over another payload."""
    return {**HONEST, "payload": base64.b64encode(payload).decode()}


# Without the key


@pytest.mark.parametrize("path", list(leaves(STATEMENT)), ids=lambda path: ".".join(map(str, path)))
def test_any_changed_leaf_breaks_the_signature(path: tuple[Any, ...]) -> None:
    changed = copy.deepcopy(STATEMENT)
    value = changed
    for step in path:
        value = value[step]
    put(changed, path, other(value))
    assert changed != STATEMENT
    assert refused(swapped(canonical(changed))) == ["signature"]


@given(st.data())
def test_any_changed_byte_breaks_the_signature(data: st.DataObject) -> None:
    payload = bytearray(canonical(STATEMENT))
    place = data.draw(st.integers(0, len(payload) - 1))
    payload[place] ^= data.draw(st.integers(1, 255))
    assert refused(swapped(bytes(payload))) == ["signature"]


def test_another_key_or_type_or_signature_fails() -> None:
    assert refused(HONEST, public_pem(OTHER_KEY)) == ["signature"]
    assert refused(HONEST, b"not a key") == ["signature"]
    assert refused({**HONEST, "payloadType": "text/plain"}) == ["payload type"]
    assert refused({**HONEST, "signatures": []}) == ["signature"]
    assert refused(sign(canonical(STATEMENT), PAYLOAD_TYPE, OTHER_KEY)) == ["signature"]
    relabelled = sign(canonical(STATEMENT), "text/plain", KEY) | {"payloadType": PAYLOAD_TYPE}
    assert refused(relabelled) == ["signature"]


@pytest.mark.parametrize(
    "envelope",
    [
        None,
        [],
        "text",
        7,
        {},
        {**HONEST, "payload": 7},
        {**HONEST, "payload": HONEST["payload"][:-3]},
        {**HONEST, "payload": "ä"},
        {**HONEST, "payloadType": ["application/vnd.in-toto+json"]},
        {**HONEST, "signatures": {"sig": "eA=="}},
        {**HONEST, "signatures": 7},
        {**HONEST, "signatures": [{"keyid": "x"}]},
        {**HONEST, "signatures": [{"sig": None}]},
    ],
)
def test_what_is_no_envelope_fails_as_one(envelope: Any) -> None:
    assert refused(envelope) == ["envelope"]


def test_dsse_leniency_is_kept() -> None:
    """Specification 1.0.2: unknown members ignored, keyid optional and a hint, both base64 alphabets, co-signatures."""
    (signature,) = HONEST["signatures"]
    url_safe = str.maketrans("+/", "-_")
    assert refused({**HONEST, "extension": 1}) == []
    assert refused({**HONEST, "signatures": [{"sig": signature["sig"], "keyid": "other"}]}) == []
    assert refused({**HONEST, "signatures": [{"sig": signature["sig"].translate(url_safe)}]}) == []
    assert refused({**HONEST, "payload": HONEST["payload"].translate(url_safe)}) == []
    cosigned = sign(canonical(STATEMENT), PAYLOAD_TYPE, OTHER_KEY)["signatures"] + HONEST["signatures"]
    assert refused({**HONEST, "signatures": cosigned}) == []


# With the key: a payload that is no statement


@pytest.mark.parametrize(
    ("payload", "line"),
    [
        (b"", "canonical payload"),
        (b"no JSON", "canonical payload"),
        (b"\xff\xfe", "canonical payload"),
        (canonical(STATEMENT)[:-1], "canonical payload"),
        (json.dumps(STATEMENT, indent=1).encode(), "canonical payload"),
        (canonical(STATEMENT) + b"\n", "canonical payload"),
        (b'{"a":1,"a":1}', "canonical payload"),
        (b'{"a":NaN}', "canonical payload"),
        (b'{"a":1e400}', "canonical payload"),
        (b'{"a":9007199254740993}', "canonical payload"),
        (b'{"a":"\\ud800"}', "canonical payload"),
        (b"[" * 100_000, "canonical payload"),
        (b"null", "closed schema"),
        (b"[]", "closed schema"),
        (b"{}", "closed schema"),
    ],
)
def test_a_signed_payload_that_is_no_statement_fails(payload: bytes, line: str) -> None:
    assert refused(wrapped(payload)) == [line]


def test_duplicate_members_are_refused_anywhere() -> None:
    with pytest.raises(ValueError, match="twice"):
        read_json(b'{"a":{"b":1,"b":2}}')
    with pytest.raises(ValueError, match="deeply"):
        read_json(b"[" * 100_000)


def test_unknown_missing_and_ill_typed_members_are_refused_everywhere() -> None:
    for path in leaves(STATEMENT):
        for wrong in (1.5, {"x": 1}, ["x"], ""):
            changed = copy.deepcopy(STATEMENT)
            put(changed, path, wrong)
            assert refused(wrapped(canonical(changed))) == ["closed schema"], (path, wrong)
        if isinstance(path[-1], str):
            changed = copy.deepcopy(STATEMENT)
            holder = changed
            for step in path[:-1]:
                holder = holder[step]
            holder["unknown"] = 1
            problem = misfit(changed, SHAPES[CERTIFICATE])
            assert problem is not None
            assert "unknown" in problem
            del holder["unknown"], holder[path[-1]]
            assert refused(wrapped(canonical(changed))) == ["closed schema"], path


def accepts(schema: Any, value: Any) -> bool:  # noqa: PLR0911 - a case a line
    """The part of JSON Schema 2020-12 that the published file uses."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}
    if "anyOf" in schema:
        return any(accepts(inner, value) for inner in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(type(v) is type(value) and v == value for v in schema.get("enum", [schema.get("const")]))
    if type(value) is not kinds[schema["type"]]:
        return False
    if schema["type"] == "object":
        members = schema["properties"]
        return value.keys() == members.keys() and all(accepts(members[name], value[name]) for name in value)
    if schema["type"] == "array":
        return all(accepts(schema["items"], item) for item in value)
    if schema["type"] == "string":
        return len(value) >= schema.get("minLength", 0) and bool(re.search(schema.get("pattern", ""), value))
    return schema["type"] == "null" or value >= schema["minimum"]


def test_schema_and_verifier_accept_and_refuse_the_same_samples() -> None:
    schema = schema_of(PREDICATE)
    for evidence in (sample(), restricted()):
        said = build(evidence)["predicate"]
        assert accepts(schema, said)
        assert misfit(said, PREDICATE) is None
        for path in leaves(said):
            for value in (None, True, -1, 3, "", "x", "0" * 64, "2026-02-30", [], {}):
                changed = copy.deepcopy(said)
                put(changed, path, value)
                assert accepts(schema, changed) == (misfit(changed, PREDICATE) is None), (path, value)


def test_a_date_that_does_not_exist_is_refused() -> None:
    def tamper(statement: dict[str, Any]) -> None:
        statement["predicate"]["request"]["due_at"] = "2027-02-31T09:00:00.000000Z"

    assert refused(resigned(tamper)) == ["closed schema"]


# With the key: a statement that contradicts itself

SIGNED_ALONE = {
    "predicate.after.floor",  # upwards
    "predicate.assumptions.statement",
    "predicate.before.assembly",
    "predicate.claims.checkable_by",
    "predicate.claims.evidence",
    "predicate.claims.must_be_trusted",
    "predicate.issuer.tool",
    "predicate.issuer.version",
    "predicate.manifests.rows",  # the shape of two paths shows neighbours, whatever is said of the rest
    "predicate.method",
    "predicate.model.backbone",
    "predicate.open_items.detail",
    "predicate.open_items.name",  # but a process's
    "predicate.open_items.until",
    "predicate.payloads.absent_at",  # the second look
    "predicate.records.record_id",
    "predicate.replays.at",
    "predicate.replays.platform",
    "predicate.replicas.covers",  # upwards
    "predicate.replicas.freed_at",
    "predicate.request.due_at",
    "predicate.request.received_at",
    "predicate.tainted.artifacts.absent_at",
}
"""What only the signature carries; every other leaf is held by a second line."""


def test_exactly_these_leaves_are_carried_by_the_signature_alone() -> None:
    free = set()
    for path in leaves(STATEMENT):
        changed = copy.deepcopy(STATEMENT)
        value = changed
        for step in path:
            value = value[step]
        put(changed, path, other(value))
        if not refused(wrapped(canonical(changed))):
            free.add(".".join(step for step in path if isinstance(step, str)))
    assert free == SIGNED_ALONE


def said(statement: dict[str, Any]) -> dict[str, Any]:
    return statement["predicate"]


def member(statement: dict[str, Any], shard: int = 0) -> dict[str, Any]:
    return said(statement)["after"]["assembly"]["members"][shard]


def rename_subject(statement: dict[str, Any]) -> None:
    """Make the statement about the assembly that is in it now."""
    digest = digest_of(said(statement)["after"]["assembly"])
    statement["subject"][0]["digest"]["sha256"] = digest


def serve_tainted(statement: dict[str, Any]) -> None:
    chosen = said(statement)["tainted"][0]["stage"]
    parent = said(statement)["stages"][0]
    assert chosen["prefix"] in ([0, 1], [1])
    line = [parent, chosen] if chosen["parent"] else [chosen]
    said(statement)["stages"][0:1] = line
    member(statement).update(
        stage=digest_of(chosen), prefix=chosen["prefix"], artifacts=[sha256_hex(b"new")] * len(line)
    )
    rename_subject(statement)


def hide_touched(statement: dict[str, Any]) -> None:
    said(statement)["touched"].clear()


def drop_stage(index: int) -> Callable[[dict[str, Any]], None]:
    def tamper(statement: dict[str, Any]) -> None:
        del said(statement)["stages"][index]

    return tamper


def with_other_root(statement: dict[str, Any]) -> None:
    said(statement)["stages"][0]["roots"][0] = manifest(0, 0, generation=7)


def with_broken_ancestry(statement: dict[str, Any]) -> None:
    """A child that names a true stage as parent, though it read other manifests."""
    child = said(statement)["stages"][-1]
    child["roots"][0] = manifest(1, 0, generation=7)
    member(statement, 1)["stage"] = digest_of(child)
    rename_subject(statement)


def on_another_shard(statement: dict[str, Any]) -> None:
    members = said(statement)["after"]["assembly"]["members"]
    members.reverse()
    rename_subject(statement)


def with_tainted_bytes(statement: dict[str, Any]) -> None:
    member(statement)["artifacts"] = [said(statement)["tainted"][0]["artifacts"][0]["digest"]]
    rename_subject(statement)


def set_to(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    steps = tuple(int(step) if step.isdigit() else step for step in path.split("."))

    def tamper(statement: dict[str, Any]) -> None:
        put(said(statement), steps, value)

    return tamper


def repeat(path: str) -> Callable[[dict[str, Any]], None]:
    def tamper(statement: dict[str, Any]) -> None:
        rows = said(statement)
        for step in path.split("."):
            rows = rows[int(step) if step.isdigit() else step]
        rows.append(rows[0])

    return tamper


def remove(path: str, index: int = 0) -> Callable[[dict[str, Any]], None]:
    def tamper(statement: dict[str, Any]) -> None:
        rows = said(statement)
        for step in path.split("."):
            rows = rows[int(step) if step.isdigit() else step]
        del rows[index]

    return tamper


LATE = "2026-11-23T00:00:00.000000Z"
EARLY = "2026-11-22T00:00:00.000000Z"
EMPTY_ROOT = root([]).hex()


@pytest.mark.parametrize(
    ("line", "tamper"),
    [
        ("subject", set_to("after.version", 6)),
        ("subject", set_to("model.name", "other")),
        ("stages", drop_stage(0)),
        ("stages", drop_stage(1)),
        ("stages", repeat("stages")),
        ("stages", with_other_root),
        ("stages", with_broken_ancestry),
        ("stages", on_another_shard),
        ("stages", set_to("model.recipe", "0" * 64)),
        ("influence-free", serve_tainted),
        ("tainted stages", serve_tainted),
        ("tainted stages", with_tainted_bytes),
        ("tainted stages", hide_touched),
        ("tainted stages", repeat("tainted")),
        ("records and cells", hide_touched),
        ("records and cells", repeat("touched")),
        ("records and cells", set_to("records.0.shard", 7)),
        ("records and cells", repeat("records")),
        ("records and cells", set_to("touched.0.root", EMPTY_ROOT)),
        ("records and cells", set_to("cells.0.before", "0" * 64)),
        ("records and cells", set_to("cells.0.after", manifest(0, 1, deleted=True, generation=2))),
        ("records and cells", remove("cells")),
        ("versions", set_to("before.version", 5)),
        ("versions", set_to("before.version", 0)),
        ("versions", set_to("before.assembly", None)),
        ("versions", set_to("after.floor", 4)),
        ("destruction", set_to("tainted.0.artifacts.0.destroyed_at", None)),
        ("destruction", remove("tainted.0.artifacts.0.absent_at")),
        ("destruction", set_to("tainted.0.artifacts.0.absent_at.0", EARLY)),
        ("destruction", set_to("tainted.0.artifacts.0.absent_at.1", LATE)),
        ("destruction", set_to("tainted.0.artifacts.0.object_name", "stages/other/1")),
        ("destruction", set_to("payloads.0.destroyed_at", None)),
        ("destruction", set_to("payloads.1.absent_at.1", EARLY)),
        ("destruction", set_to("payloads.0.shard", 7)),
        ("destruction", set_to("payloads.1.slice", 7)),
        ("destruction", repeat("payloads")),
        ("destruction", lambda statement: said(statement)["payloads"].clear()),
        ("times", remove("times", 0)),
        ("times", remove("times", 2)),
        ("times", remove("times", 3)),
        ("times", repeat("times")),
        ("times", lambda statement: said(statement)["times"].reverse()),
        ("times", set_to("times.1.at", LATE)),
        ("times", set_to("issuer.issued_at", EARLY)),
        ("times", set_to("request.due_at", EARLY)),
        ("replicas", set_to("replicas.0.covers", 4)),
        ("replicas", set_to("replicas.1.at", LATE)),
        ("replicas", set_to("replicas.2.freed", value=False)),
        ("replicas", repeat("replicas")),
        ("replicas", remove("times", 2)),
        ("claims", repeat("claims")),
        ("claims", remove("claims", 2)),
        ("claims", remove("claims", 3)),
        ("claims", set_to("claims.1.strength", "re-derived")),
        ("claims", set_to("claims.3.strength", "checked offline")),
        ("claims", set_to("claims.1.statement", "This proves that the model forgot.")),
        ("claims", set_to("claims.1.evidence", "Mathematical PROOF.")),
        ("claims", set_to("assumptions.0.statement", "None: all is guaranteed.")),
        ("claims", set_to("claims.3.claim", "restricted")),
        ("claims", set_to("model.provenance", "own_contains_subjects")),
        ("claims", set_to("request.kind", "restrict")),
        ("assumptions", remove("assumptions")),
        ("assumptions", repeat("assumptions")),
        ("open items", lambda statement: said(statement)["open_items"].clear()),
        ("open items", set_to("replicas.1.freed", value=True)),
        ("open items", set_to("open_items.0.code", "export_not_withdrawn")),
        ("open items", remove("open_items", 1)),
        ("open items", remove("open_items", 2)),
        ("open items", repeat("open_items")),
        ("closed schema", set_to("open_items.0.code", "nothing")),
        ("platforms", set_to("platforms.0.fingerprint", "0" * 64)),
        ("platforms", set_to("platforms.0.fields.0.value", "bfloat16")),
        ("platforms", remove("platforms")),
        ("platforms", remove("platforms.0.stages")),
        ("platforms", repeat("platforms")),
        ("replays", set_to("replays.0.outcome", "mismatch")),
        ("replays", set_to("replays.0.outcome", "skipped")),
        ("replays", set_to("replays.0.digest", "0" * 64)),
        ("replays", set_to("replays.0.at", LATE)),
        ("replays", repeat("replays")),
        ("closed schema", set_to("claims.0.claim", "retrained")),
        ("closed schema", set_to("outcome", "no_match")),
        ("closed schema", set_to("payloads.0.object_name", "../../etc/passwd")),
        ("closed schema", set_to("payloads.0.object_name", "/etc/passwd")),
    ],
)
def test_a_lying_operator_is_caught_at_the_right_line(line: str, tamper: Callable[[dict[str, Any]], None]) -> None:
    assert line in refused(resigned(tamper))


def test_the_subject_must_be_the_one_assembly() -> None:
    assert refused(resigned(lambda statement: statement["subject"].append(statement["subject"][0]))) == ["subject"]
    assert refused(resigned(lambda statement: statement["subject"].clear())) == ["subject"]
    changed_weights = resigned(lambda statement: member(statement).update(artifacts=[sha256_hex(b"other")]))
    assert refused(changed_weights) == ["subject", "replays", "events"]


def test_a_restriction_that_claims_destruction_fails() -> None:
    def add_payload(statement: dict[str, Any]) -> None:
        said(statement)["payloads"] = build(sample())["predicate"]["payloads"]

    def claim_erased(statement: dict[str, Any]) -> None:
        said(statement)["claims"][-1] = build(sample())["predicate"]["claims"][-1]

    def call_it_erased(statement: dict[str, Any]) -> None:
        said(statement)["outcome"] = "erased"

    assert refused(resigned(add_payload, restricted())) == ["events", "destruction"]
    assert refused(resigned(claim_erased, restricted())) == ["claims"]
    assert {"destruction", "times", "claims", "records and cells", "open items"} == set(
        refused(resigned(call_it_erased, restricted()))
    )
