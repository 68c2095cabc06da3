import base64
import json
import os
import shutil
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from certificate_ledger import with_ledger
from certificate_sample import KEY, OTHER_KEY, PEM, at, restricted, sample, schema_of
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from service.evidence import certificate, dsse, form, stated, supplement, wording
from service.evidence.keys import KeyFileError, keyid, load_public_key, load_signing_key, public_pem
from service.evidence.opening import Case
from service.evidence.verify import verify
from shards.digest import canonical, sha256_hex

SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"
DOCS = Path(__file__).parent.parent / "docs" / "certificate.md"
TYPE = certificate.PAYLOAD_TYPE


def refused(envelope: Any, pem: bytes = PEM) -> list[str]:
    return [check.name for check in verify(envelope, pem) if not check.passed]


# DSSE


def test_pae_is_the_one_printed_in_the_specification() -> None:
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert dsse.pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


@given(st.binary(), st.text(st.characters(codec="utf-8")))
def test_what_is_signed_can_be_opened(payload: bytes, payload_type: str) -> None:
    envelope = dsse.sign(payload, payload_type, KEY)
    assert dsse.open_envelope(envelope, payload_type, KEY.public_key()) == payload


def test_signing_is_deterministic_and_names_its_key() -> None:
    assert dsse.sign(b"x", TYPE, KEY) == dsse.sign(b"x", TYPE, KEY)
    assert dsse.sign(b"x", TYPE, KEY)["signatures"][0]["keyid"] == keyid(KEY)


def test_open_envelope_refuses() -> None:
    envelope = dsse.sign(b"x", TYPE, KEY)
    public = KEY.public_key()
    for broken in (
        {},
        {**envelope, "payload": "!"},
        {**envelope, "payload": base64.b64encode(b"y").decode()},
        {**envelope, "payloadType": "text/plain"},
        {**envelope, "signatures": []},
        {**envelope, "signatures": [{"sig": "eA=="}]},
        {**envelope, "signatures": None},
    ):
        with pytest.raises(dsse.EnvelopeError):
            dsse.open_envelope(broken, TYPE, public)
    with pytest.raises(dsse.EnvelopeError, match="take the key of the operator"):
        dsse.open_envelope(envelope, TYPE, OTHER_KEY.public_key())


# Keys


def pem_of(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_signing_key_is_read_from_a_private_file(tmp_path: Path) -> None:
    key = load_signing_key(write(tmp_path / "signing.pem", pem_of(KEY)))
    assert keyid(key) == keyid(KEY) == keyid(load_public_key(public_pem(key)))
    der = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert keyid(KEY) == sha256_hex(der)
    assert load_signing_key(write(tmp_path / "read-only.pem", pem_of(KEY), 0o400))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o644])
def test_signing_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_signing_key(write(tmp_path / "signing.pem", pem_of(KEY), mode))


def test_other_key_files_are_refused_without_showing_them(tmp_path: Path) -> None:
    curve = generate_private_key(SECP256R1())
    locked = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    for content, words in (
        (b"SECRET", "restore it from your backup"),
        (PEM, "no private key"),
        (locked, "without a passphrase"),
        (curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), "Ed25519"),
    ):
        with pytest.raises(KeyFileError, match=words) as refusal:
            load_signing_key(write(tmp_path / "signing.pem", content))
        assert "SECRET" not in str(refusal.value)
    with pytest.raises(KeyFileError, match="No such file"):
        load_signing_key(tmp_path / "missing.pem")
    with pytest.raises(KeyFileError, match=r"signing\.pub"):
        load_public_key(b"")
    ec_pem = curve.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(KeyFileError, match="Ed25519"):
        load_public_key(ec_pem)
    assert refused(certificate.issue(sample(), KEY), ec_pem) == ["signature"]


# The statement


def test_an_honest_certificate_passes_every_check() -> None:
    for evidence in (sample(), restricted()):
        checks = verify(certificate.issue(evidence, KEY), PEM)
        assert all(check.passed for check in checks), checks
        assert len(checks) == 24
        assert {check.strength for check in checks} == {form.SIGNED, form.OFFLINE, form.REDERIVED}


def test_the_same_rows_in_another_order_give_the_same_bytes() -> None:
    rows = sample()
    turned = replace(
        rows,
        **{
            name: getattr(rows, name)[::-1]
            for name in ("served_stages", "tainted_stages", "tainted_objects", "touched", "records", "payloads")
        },
        replicas=rows.replicas[::-1],
        received_at=rows.received_at.astimezone(timezone(timedelta(hours=5, minutes=30))),
    )
    assert canonical(certificate.build(turned)) == canonical(certificate.build(rows))


def test_times_are_utc_with_microseconds() -> None:
    request = certificate.build(sample())["predicate"]["request"]
    assert request["received_at"] == "2026-11-22T08:00:00.000000Z"


def test_evidence_that_makes_no_certificate_is_refused() -> None:
    with pytest.raises(certificate.EvidenceError, match="no certificate"):
        certificate.build(replace(sample(), outcome="no_match"))
    naive = datetime(2026, 1, 1)  # noqa: DTZ001 - what is refused
    with pytest.raises(certificate.EvidenceError, match="timestamptz"):
        certificate.build(replace(sample(), issued_at=naive))


def test_a_backbone_that_holds_subjects_refuses_the_claims_about_influence() -> None:
    evidence = replace(sample(), provenance="own_contains_subjects")
    made = [claim["claim"] for claim in certificate.build(evidence)["predicate"]["claims"]]
    assert made == ["deactivated", "erased"]
    assert refused(certificate.issue(evidence, KEY)) == []
    said = json.dumps(certificate.build(evidence)["predicate"]["assumptions"])
    assert "not claimed" in said


def test_what_is_open_is_named_with_its_end() -> None:
    body = certificate.build(replace(sample(), exports=(("an-export", "handed out"),)))["predicate"]
    assert [item["code"] for item in body["open_items"]] == [
        "memory_release_not_confirmed",
        "export_not_withdrawn",
        "late_upload_sweeps",
        "backups",
    ]
    assert body["open_items"][0]["name"].endswith("0002")
    assert body["open_items"][2]["until"] == "2026-11-23T09:00:00.090000Z"
    assert body["open_items"][3]["until"] == "2026-12-27T09:00:00.090000Z"
    assert "35 days" in json.dumps(body["assumptions"])
    silent = certificate.build(replace(sample(), key_backup_days=None))["predicate"]
    assert "states no retention" in json.dumps(silent["assumptions"])
    assert silent["open_items"][-1]["until"] is None
    assert [item["code"] for item in certificate.build(restricted())["predicate"]["open_items"]] == [
        "memory_release_not_confirmed"
    ]


def test_a_first_deactivation_with_nothing_served_before_passes() -> None:
    first = replace(sample(), version_before=0, assembly_before=None)
    assert refused(certificate.issue(first, KEY)) == []
    nothing_left = {**sample().assembly_after, "members": [None, None]}
    empty = with_ledger(replace(first, assembly_after=nothing_left, served_stages=(), platforms=(), replays=()))
    assert refused(certificate.issue(empty, KEY)) == []


def test_an_upload_that_was_never_finished_has_no_digest() -> None:
    rows = sample()
    unfinished = replace(rows.tainted_objects[0], digest=None)
    evidence = with_ledger(replace(rows, tainted_objects=(unfinished, *rows.tainted_objects[1:])))
    assert refused(certificate.issue(evidence, KEY)) == []


def test_no_text_claims_proof() -> None:
    texts = json.dumps([wording.SUPPORT, wording.ASSUMPTIONS, wording.BACKBONE, dict(form.CLAIMS)]).lower()
    assert not any(word in texts for word in ("prove", "proof", "guarantee", "looks forgotten"))


def test_late_answers_are_shown() -> None:
    late = replace(sample(), due_at=at(50))
    line = next(check for check in verify(certificate.issue(late, KEY), PEM) if check.name == "times")
    assert line.passed
    assert "after the due date" in line.detail


# Form, schema, docs


def bare(schema: Any) -> Any:
    """A schema without its descriptions and title."""
    if isinstance(schema, list):
        return [bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: value for name, value in schema.items() if not name.startswith("$")}
    for name in ("description", "title"):
        if isinstance(kept.get(name), str):
            del kept[name]
    return {name: bare(value) for name, value in kept.items()}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("deletion-certificate-v2", form.PREDICATE),
        ("deletion-certificate-supplement-v1", form.SUPPLEMENT_PREDICATE),
    ],
)
def test_the_published_schema_is_the_verifiers_form(name: str, shape: Any) -> None:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    assert bare(schema) == schema_of(shape)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    undescribed = [name for name, inner in schema["properties"].items() if "description" not in inner]
    assert undescribed == []


def test_the_writers_types_are_the_verifiers() -> None:
    for name, written in ((form.CERTIFICATE, certificate.PREDICATE_TYPE), (form.SUPPLEMENT, supplement.PREDICATE_TYPE)):
        assert name == written
        assert form.SHAPES[name]["_type"] == certificate.STATEMENT_TYPE
        assert form.SHAPES[name]["predicateType"] == written
    assert stated.CLOCK_SLACK == certificate.CLOCK_SLACK
    assert Case({}, b"").payload == b""


def test_the_docs_name_every_field_claim_check_and_assumption() -> None:
    text = DOCS.read_text()
    checks = [check.name for check in verify(certificate.issue(sample(), KEY), PEM)]
    more = ("artefact directory", "key store", "later tree head", "supplement 1", "replay", *form.SUPPLEMENT_PREDICATE)
    for name in (*form.PREDICATE, *form.CLAIMS, *form.ASSUMED, *form.OPEN, *checks, *more):
        assert f"`{name}`" in text, name


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_agrees_as_the_docs_say(tmp_path: Path) -> None:
    envelope = certificate.issue(sample(), KEY)
    (tmp_path / "certificate.json").write_text(json.dumps(envelope))
    (tmp_path / "signing.pub").write_bytes(PEM)
    block = DOCS.read_text().split("```sh\n# by hand")[1].split("```")[0]
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(  # the docs' own lines
        [shutil.which("bash") or "bash", "-euo", "pipefail", "-c", "#" + block],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Signature Verified Successfully" in done.stdout
    assert keyid(KEY) in done.stdout
    assert certificate.build(sample())["subject"][0]["digest"]["sha256"] in done.stdout
