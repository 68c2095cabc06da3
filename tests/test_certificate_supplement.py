"""A supplement by itself: what an honest one says holds, and each lie in one is named."""

import base64
import dataclasses
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from certificate_ledger import Told, event, foreign, log_of
from certificate_sample import (
    HURT,
    KEY,
    OTHER_KEY,
    PEM,
    RECIPE,
    artifact_digest,
    at,
    manifest,
    manifest_row,
    restricted,
    sample,
)

from service.evidence.certificate import PAYLOAD_TYPE, digest_of_envelope, issue
from service.evidence.dsse import sign
from service.evidence.rows import Addition, LiftRow, OpenRow, ProcessRow, RebuildRow, SweepRow
from service.evidence.supplement import build_supplement, issue_supplement
from service.evidence.verify import verify
from shards.assembly import Assembly, Member
from shards.digest import canonical, digest_of
from shards.stages import chain

EXPORT = "00000000-0000-0000-0000-00000000000e"
ROWS = dataclasses.replace(sample(), exports=((EXPORT, "handed out"),))
CERTIFICATE = issue(ROWS, KEY)
SILENT = ROWS.replicas[1].process_id
AGAIN = ROWS.payloads[0].object_name


def rebuilt() -> RebuildRow:
    """Shard 0 is at full depth again, on the cell without the record."""
    hurt = {0: manifest(0, 0), 1: manifest(*HURT, generation=2), 2: manifest(0, 2)}
    line, second = chain(RECIPE, 0, (0, 1, 2), hurt), ROWS.served_stages[1:]
    members = tuple(
        Member(each[-1].key, each[-1].prefix, tuple(artifact_digest(stage) for stage in each))
        for each in (line, second)
    )
    stages = (*line, *second)
    return RebuildRow(
        version=6,
        floor=5,
        published_at=at(200),
        assembly=Assembly(RECIPE, members).to_json(),
        stages=stages,
        platforms=(dataclasses.replace(ROWS.platforms[0], stages=tuple(stage.key for stage in stages)),),
        manifests=(manifest_row(*HURT, generation=2),),
    )


def told() -> list[Told]:
    new = rebuilt()
    assembly = Assembly.from_json(new.assembly).digest
    return [
        event(40, "certificate.issued", at(91), {"digest": digest_of_envelope(CERTIFICATE)}, ROWS.request_id),
        event(41, "version.published", at(200), {"version": 6, "floor": 5, "assembly": assembly, "cause": "rebuild"}),
        event(42, "artifact.reappeared", at(300), {"object_name": AGAIN, "digest": None}),
        event(43, "export.withdrawn", at(400), {"export_id": EXPORT, "actor": "abcdefgh"}),
        foreign(77, at(500)),
    ]


def addition() -> Addition:
    after = told()
    log, _, size = log_of(ROWS, after)
    mine = [size + place for place, each in enumerate(after) if each.kind != "stage.cancelled"]
    return Addition(
        certificate=digest_of_envelope(CERTIFICATE),
        number=1,
        previous=None,
        request_id=ROWS.request_id,
        model_name=ROWS.model_name,
        records=ROWS.records,
        sweeps=(SweepRow(sweep=1, objects=7, absent_at=at(600), reappeared=(AGAIN,)),),
        processes=(ProcessRow(process_id=SILENT, how="freed", at=at(550)),),
        exports=((EXPORT, at(400)),),
        rebuild=rebuilt(),
        open_items=(OpenRow(code="backups", name="key store", detail="until then", until=at(0) + timedelta(days=35)),),
        ledger=log.rows(len(log.told), mine, since=size),
        tool_version="0.1.0",
        issued_at=at(700),
    )


def refusals(*supplements: Any) -> list[tuple[str, str]]:
    checks = verify(CERTIFICATE, PEM, supplements=supplements)
    return [(check.name, check.detail) for check in checks if not check.passed]


def test_an_honest_supplement_holds() -> None:
    checks = verify(CERTIFICATE, PEM, supplements=[issue_supplement(addition(), KEY)])
    assert all(check.passed for check in checks), checks
    assert checks[-1].name == "supplement 1"
    for words in ("sweep 1: 7 objects absent, 1 destroyed again", "freed", "withdrawn", "version 6 rebuilt: 6 stages"):
        assert words in checks[-1].detail


def test_another_key_or_a_changed_byte_fails() -> None:
    honest = issue_supplement(addition(), KEY)
    assert "signature: no signature holds" in refusals(issue_supplement(addition(), OTHER_KEY))[0][1]
    payload = base64.b64decode(honest["payload"]).replace(b'"objects":7', b'"objects":8')
    changed = {**honest, "payload": base64.b64encode(payload).decode()}
    assert "signature: no signature holds" in refusals(changed)[0][1]
    assert "envelope: " in refusals({})[0][1]


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def tamper(said: dict[str, Any]) -> None:
        *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
        holder: Any = said
        for step in steps:
            holder = holder[step]
        if callable(value):
            holder[last] = value(holder[last])
        else:
            holder[last] = value

    return tamper


ZERO = "0" * 64


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (put("certificate", ZERO), "it is about the certificate"),
        (put("number", 2), "one is missing or twice"),
        (put("previous", ZERO), "does not follow"),
        (put("model", "another"), "another request or model"),
        (put("request", "00000000-0000-0000-0000-000000000008"), "another request or model"),
        (put("ledger.consistency", lambda path: path[1:]), "FORK: "),
        (put("ledger.consistency.0", ZERO), "FORK: "),
        (put("ledger.checkpoint", lambda text: text.replace("sample\n", "other\n")), "no signature of"),
        (put("ledger.entries.0.path.0", ZERO), "does not lie at that place"),
        (put("ledger.entries", lambda entries: entries[1:]), "that the certificate was issued"),
        (put("issuer.issued_at", "2026-11-21T00:00:00.000000Z"), "it is older than the statement before"),
        (put("sweeps.0.objects", 6), "did not look for all objects"),
        (put("sweeps.0.reappeared", ["cells/other"]), "not the certificate's"),
        (put("sweeps.0.reappeared", []), "other objects that had appeared again"),
        (put("sweeps.0.absent_at", "2027-01-01T00:00:00.000000Z"), "was after the supplement"),
        (put("processes.0.process_id", str(ROWS.replicas[0].process_id)), "was not open"),
        (put("processes.0.how", "ended"), "no event in the ledger says that process"),
        (put("exports.0.export_id", "00000000-0000-0000-0000-00000000000f"), "was not open"),
        (put("ledger.entries", lambda entries: entries[:-1]), "withdraws export"),
        (put("rebuild.version", 5), "not later than the certificate's"),
        (put("rebuild.version", 7), "publishes the rebuilt assembly"),
        (put("rebuild.published_at", "2026-11-22T09:00:00.201000Z"), "publishes the rebuilt assembly"),
        (put("rebuild.stages.0.roots.0", ZERO), "no inputs listed give"),
        (put("rebuild.assembly.recipe", ZERO), "another recipe"),
        (put("rebuild.platforms", []), "the platform of a served stage is not said"),
        (put("rebuild.manifests", []), "nothing shows that served manifest"),
        (put("rebuild.manifests.0.lacks", []), "nothing shows that served manifest"),
        (put("rebuild.manifests.0.lacks.0.before", None), "which should show"),
        (put("sweeps.0.sweep", 4), "closed schema: "),
    ],
)
def test_a_lie_in_a_supplement_is_named(tamper: Callable[[dict[str, Any]], None], words: str) -> None:
    statement = json.loads(canonical(build_supplement(addition())))
    tamper(statement["predicate"])
    ((name, detail),) = refusals(sign(canonical(statement), PAYLOAD_TYPE, KEY))
    assert name == "supplement 1"
    assert words in detail


def test_its_subject_is_the_certificate() -> None:
    honest = build_supplement(addition())["subject"]
    for subject in ([], [{"name": "x", "digest": {"sha256": ZERO}}], honest * 2):
        statement = build_supplement(addition()) | {"subject": subject}
        ((_, detail),) = refusals(sign(canonical(statement), PAYLOAD_TYPE, KEY))
        assert "its subject is not the certificate" in detail


def test_one_that_says_nothing_is_refused() -> None:
    empty = dataclasses.replace(addition(), sweeps=(), processes=(), exports=(), rebuild=None)
    log, _, size = log_of(ROWS, told())
    silent = dataclasses.replace(empty, ledger=log.rows(len(log.told), [size], since=size))
    ((_, detail),) = refusals(issue_supplement(silent, KEY))
    assert detail == "it adds nothing"


def test_a_rebuild_that_read_the_record_again_is_refused() -> None:
    """Also where its root was never called touched."""
    new = rebuilt()
    hurt = {0: manifest(0, 0), 1: manifest(*HURT, deleted=True, generation=3), 2: manifest(0, 2)}
    line = chain(RECIPE, 0, (0, 1, 2), hurt)
    stages = (*line, *ROWS.served_stages[1:])
    members = (Member(line[-1].key, (0, 1, 2), tuple(artifact_digest(stage) for stage in line)),)
    assembly = Assembly(RECIPE, (*members, Assembly.from_json(new.assembly).members[1]))
    lying = dataclasses.replace(
        new,
        assembly=assembly.to_json(),
        stages=stages,
        platforms=(dataclasses.replace(new.platforms[0], stages=tuple(stage.key for stage in stages)),),
        manifests=(manifest_row(*HURT, deleted=True, generation=3),),
    )
    ((_, detail),) = refusals(issue_supplement(dataclasses.replace(addition(), rebuild=lying), KEY))
    assert "holds one of the records" in detail
    assert digest_of(assembly.to_json()) == assembly.digest


def lift_of(outcome: str = "restricted", *, version: int = 7) -> tuple[str, list[tuple[bool, str]]]:
    """A restriction's certificate and a supplement that lifts it by version 7; (words of the last line, lines)."""
    rows = dataclasses.replace(restricted() if outcome == "restricted" else sample(), exports=())
    certificate = issue(rows, KEY)
    body = {"actor": "abcdefgh", "reason_code": "withdrawn", "records": 1, "version": 7}
    after = [
        event(40, "certificate.issued", at(91), {"digest": digest_of_envelope(certificate)}, rows.request_id),
        event(41, "target.lifted", at(400), body, rows.request_id),
    ]
    log, _, size = log_of(rows, after)
    added = dataclasses.replace(
        addition(),
        certificate=digest_of_envelope(certificate),
        request_id=rows.request_id,
        sweeps=(),
        processes=(),
        exports=(),
        rebuild=None,
        lifted=LiftRow(at=at(400), version=version),
        ledger=log.rows(len(log.told), [size, size + 1], since=size),
    )
    checks = verify(certificate, PEM, supplements=[issue_supplement(added, KEY)])
    return checks[-1].detail, [(check.passed, check.name) for check in checks]


def test_a_lift_is_said_only_as_the_ledger_has_it() -> None:
    words, lines = lift_of()
    assert all(passed for passed, _ in lines), lines
    assert "the restriction was LIFTED" in words
    assert "no event in the ledger lifts" in lift_of(version=8)[0]
    assert lift_of("erased")[0] == "only a restriction can be lifted"
