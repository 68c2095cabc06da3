"""Certificates of real deletions, and their supplements: rows, files and ledger as the programs leave them."""

import base64
import json
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import typer
from typer.testing import CliRunner
from world_copies import Copy

from service.cli.verify import verify as command
from service.domain.requests import Kind
from service.evidence.certificate import digest_of_envelope
from service.evidence.rows import EvidenceError
from service.evidence.verify import Check, verify
from service.store import certificates, evidence, exports, lifts
from service.store.database import transaction
from shards.partition import dataset_key, record_id_of
from workers import certify, steps
from workers.barrier import Barrier
from workers.reaper import Reaper
from workers.supplements import Supplements
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration

app = typer.Typer()
app.command()(command)
DONE = [("completed", "erased")]


def deleted(world: Copy, subject: str = "s1") -> UUID:
    request_id = world.ask(subject)
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    assert world.states(request_id) == DONE
    return request_id


def stored(world: Copy, request_id: UUID) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with transaction(world.pool) as connection:
        (certificate,) = certificates.list_certificates(connection, request_id)
        found = certificates.list_supplements(connection, request_id, world.model_id)
    assert certificate.digest == digest_of_envelope(certificate.envelope)
    return certificate.envelope, [each.envelope for each in found]


def said(envelope: dict[str, Any]) -> dict[str, Any]:
    return json.loads(base64.b64decode(envelope["payload"]))["predicate"]


def checked(world: Copy, request_id: UUID) -> list[Check]:
    envelope, supplements = stored(world, request_id)
    root = world.context.artifacts.files.root
    keys = root.parent / "file-keys"
    return verify(envelope, world.public_key, supplements=supplements, artifacts=root, file_keys=keys)


def failures(world: Copy, request_id: UUID) -> list[Check]:
    return [check for check in checked(world, request_id) if not check.passed]


def rebuild(world: Copy) -> None:
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)


def add(world: Copy) -> int:
    world.log()
    return Supplements(world.context).look()


def sweep(world: Copy) -> None:
    Reaper(world.pool, world.context.artifacts, job_attempts=2).look()


def age(world: Copy, interval: str) -> None:
    """Let time pass for what was destroyed and for what is due."""
    world.as_owner(f"UPDATE artifact SET destroyed_at = destroyed_at - interval '{interval}' WHERE state = 'destroyed'")
    world.as_owner(f"UPDATE certificate_open SET due_at = due_at - interval '{interval}'")


def test_an_erasure_holds_in_every_line(world: Copy) -> None:
    request_id = deleted(world)
    assert failures(world, request_id) == []
    body = said(stored(world, request_id)[0])
    assert all(len(each["absent_at"]) == 2 for each in body["payloads"])
    assert all(each["holds"] or each["lacks"] for each in body["manifests"])
    assert body["platforms"][0]["fields"]


def test_it_waits_until_its_events_are_published(world: Copy) -> None:
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    second = world.ask("s2")
    steps.plan_targets(world.context, world.model_id)
    world.log()
    Barrier(world.pool, margin=0.05).look()
    steps.erase_target(world.context, second, world.model_id)
    assert not steps.certify_target(world.context, second, world.model_id)
    assert world.row("SELECT attempts FROM request_target WHERE request_id = %s", second) == (0,)
    assert world.rows("SELECT 1 FROM certificate WHERE request_id = %s", second) == []
    world.log()
    assert steps.certify_target(world.context, second, world.model_id)
    assert failures(world, second) == []
    openings = [json.loads(entry["opening"]) for entry in said(stored(world, second)[0])["ledger"]["entries"]]
    others = [each["body"] for each in openings if each["request_id"] not in {str(second), None}]
    assert all("object_name" in body for body in others)  # of a file that both requests' records lay in


def test_what_came_back_before_the_certificate_is_destroyed_again(world: Copy) -> None:
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    Barrier(world.pool, margin=0.05).look()
    steps.erase_target(world.context, request_id, world.model_id)
    with transaction(world.pool) as connection:
        name = evidence.list_objects(connection, request_id, world.model_id)[0]
    late = world.context.artifacts.files.root / name
    late.parent.mkdir(parents=True, exist_ok=True)
    late.write_bytes(b"late")
    world.log()
    assert not steps.certify_target(world.context, request_id, world.model_id)
    assert not late.exists()
    assert world.events("artifact.reappeared")[0]["object_name"] == name
    assert steps.certify_target(world.context, request_id, world.model_id)
    assert failures(world, request_id) == []


def test_several_deletions_of_one_cell_each_hold(world: Copy) -> None:
    """Later manifests lack the earlier records too: tombstones put old manifests together again."""
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    world.add({"many": [f"many{number}" for number in range(6)]})
    requests: list[UUID] = []
    for number in (0, 3):
        requests.append(world.ask(record_ids=[record_id_of(key, f"many{number}")], dataset_id=world.dataset.dataset_id))
        steps.plan_targets(world.context, world.model_id)
        world.finish(requests[-1])
        rebuild(world)
    requests.append(deleted(world, "many"))
    for request_id in requests:
        assert failures(world, request_id) == []
    last = said(stored(world, requests[-1])[0])
    assert len(last["records"]) >= 4
    (shown,) = [check.detail for check in checked(world, requests[-1]) if check.name == "membership"]
    assert shown.startswith(f"{len(last['records'])} records under")


def test_a_table_changed_by_hand_makes_no_certificate(world: Copy) -> None:
    world.add({"many": ["many0", "many1"]})
    key = dataset_key(world.secrets.partition, world.dataset.dataset_id)
    request_id = world.ask(record_ids=[record_id_of(key, "many0")], dataset_id=world.dataset.dataset_id)
    steps.plan_targets(world.context, world.model_id)
    world.as_owner("UPDATE record SET commitment = decode(repeat('ab', 32), 'hex')"
                   f" WHERE record_id = '{record_id_of(key, 'many1')}'")  # fmt: skip
    with pytest.raises(EvidenceError, match="changed by hand"):
        world.finish(request_id)
    assert world.rows("SELECT 1 FROM certificate") == []


# Supplements


def test_sweeps_and_the_rebuild_are_added_and_the_certificate_stays(world: Copy) -> None:
    request_id = deleted(world)
    first, none = stored(world, request_id)
    assert (none, add(world)) == ([], 0)
    rebuild(world)
    assert add(world) == 1
    age(world, "61 seconds")
    assert add(world) == 0  # due, and the reaper has not looked yet
    sweep(world)
    assert add(world) == 1
    name = said(first)["payloads"][0]["object_name"]
    late = world.context.artifacts.files.root / name
    late.parent.mkdir(parents=True, exist_ok=True)
    late.write_bytes(b"late")
    age(world, "1 day")
    sweep(world)
    sweep(world)
    assert add(world) == 1
    envelope, found = stored(world, request_id)
    assert envelope == first
    assert [said(each)["number"] for each in found] == [1, 2, 3]
    assert said(found[0])["rebuild"]["version"] == 3
    assert [row["sweep"] for row in said(found[1])["sweeps"]] == [1]
    assert [row["sweep"] for row in said(found[2])["sweeps"]] == [2, 3]
    assert said(found[2])["sweeps"][-1]["reappeared"] == [name]
    assert "late_upload_sweeps" not in {item["code"] for item in said(found[2])["open_items"]}
    assert failures(world, request_id) == []
    assert world.rows("SELECT 1 FROM certificate_open") == []
    assert add(world) == 0
    served = [check.detail for check in checked(world, request_id) if check.name == "supplement 1"]
    assert "version 3 rebuilt" in served[0]


def test_a_process_that_frees_and_an_export_that_is_withdrawn_are_added(world: Copy) -> None:
    process, export = uuid4(), uuid4()
    world.as_owner(
        "INSERT INTO lease (process_id, model_id, name, covers, freed, ttl_ms)"
        f" VALUES ('{process}', {world.model_id}, 'a', 1, 1, 2000)"
    )
    world.as_owner(
        "INSERT INTO export (export_id, model_id, version, assembly, digest, recipient, created_by)"
        f" SELECT '{export}', model_id, version, assembly, repeat('0', 64), 'partner', '{world.actor}'"
        f" FROM model_version WHERE model_id = {world.model_id}"
    )
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    world.as_owner(f"UPDATE lease SET ended_at = clock_timestamp() WHERE process_id = '{process}'")
    body = json.dumps({"process_id": str(process)})
    world.as_owner(
        f"INSERT INTO event_pending (kind, model_id, body) VALUES ('replica.ended', {world.model_id}, '{body}')"
    )
    certify_quickly(world, request_id)
    codes = {item["code"]: item["name"] for item in said(stored(world, request_id)[0])["open_items"]}
    assert codes["memory_release_not_confirmed"] == str(process)
    assert codes["export_not_withdrawn"] == str(export)
    assert add(world) == 0
    with transaction(world.pool) as connection:
        exports.mark_withdrawn(connection, export, actor=world.actor)
    assert Supplements(world.context).look() == 0  # its event is not published yet
    assert add(world) == 1
    world.as_owner(f"UPDATE lease SET freed_at = clock_timestamp() WHERE process_id = '{process}'")
    assert add(world) == 1
    _, (one, two) = stored(world, request_id)
    assert [row["export_id"] for row in said(one)["exports"]] == [str(export)]
    assert [row["how"] for row in said(two)["processes"]] == ["freed"]
    assert {item["code"] for item in said(two)["open_items"]} == {"late_upload_sweeps", "backups"}
    assert failures(world, request_id) == []


def certify_quickly(world: Copy, request_id: UUID) -> None:
    """As `finish`, without waiting for a process that never frees its memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.erase.FREED_SECONDS", 0.0)
        world.finish(request_id)
    assert world.states(request_id) == DONE


def test_two_programs_add_one_supplement(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    request_id = deleted(world)
    rebuild(world)
    world.log()
    real = certificates.insert_supplement
    monkeypatch.setattr(certificates, "insert_supplement", lambda *given: (other(), real(*given))[1])

    def other() -> None:
        monkeypatch.setattr(certificates, "insert_supplement", real)
        assert Supplements(world.context).look() == 1

    assert Supplements(world.context).look() == 0
    assert len(stored(world, request_id)[1]) == 1
    assert len(world.events("certificate.supplemented")) == 1


def test_a_restriction_that_is_lifted_gets_one_supplement_that_says_so(world: Copy) -> None:
    request_id = world.ask("s1", kind=Kind.RESTRICT)
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    assert world.states(request_id) == [("completed", "restricted")]
    assert failures(world, request_id) == []
    assert add(world) == 0
    with transaction(world.pool) as connection:
        lifts.lift(connection, request_id, actor=world.actor, reason_code="withdrawn")
    assert add(world) == 1
    _, (added,) = stored(world, request_id)
    assert (said(added)["lifted"]["version"], said(added)["rebuild"], said(added)["open_items"]) == (3, None, [])
    assert failures(world, request_id) == []
    rebuild(world)
    assert add(world) == 0
    assert world.rows("SELECT * FROM certificate_open") == []


def test_a_restriction_is_added_to_also_after_an_erasure_of_its_records(world: Copy) -> None:
    restricted = world.ask("s1", kind=Kind.RESTRICT)
    steps.plan_targets(world.context, world.model_id)
    world.finish(restricted)
    erased = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    world.finish(erased)
    rebuild(world)
    assert add(world) == 2
    for request_id in (restricted, erased):
        _, (added,) = stored(world, request_id)
        assert said(added)["rebuild"] is not None
        assert [check for check in failures(world, request_id) if check.name != "artefact directory"] == []


def test_supplements_of_another_certificate_or_with_one_missing_fail(world: Copy) -> None:
    one = deleted(world, "s1")
    rebuild(world)
    assert add(world) == 1
    age(world, "61 seconds")
    sweep(world)
    assert add(world) == 1
    two = deleted(world, "s5")
    (first, (a, b)), (second, _) = stored(world, one), stored(world, two)

    def wrong(envelope: Any, *added: Any) -> list[tuple[str, str]]:
        checks = verify(envelope, world.public_key, supplements=added)
        return [(check.name, check.detail) for check in checks if not check.passed]

    assert wrong(first, a, b) == []
    assert "it is about the certificate" in wrong(second, a)[0][1]
    assert "one is missing" in wrong(first, b)[0][1]
    assert [name for name, _ in wrong(first, b, a)] == ["supplement 1", "supplement 2"]
    assert "one is missing" in wrong(first, a, a)[0][1]
    changed = {**a, "payload": a["payload"][:-8] + "AAAA" + a["payload"][-4:]}
    assert wrong(first, changed)[0][1].startswith("signature: ")
    assert wrong(first, first)[0][1].startswith("closed schema: ")


# The command, with everything that an auditor may hold


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*(str(argument) for argument in arguments)])


def test_the_command_with_stores_ledger_supplements_and_replay(world: Copy, tmp_path: Path) -> None:
    request_id = deleted(world)
    age(world, "61 seconds")
    sweep(world)
    assert add(world) == 1
    world.log()
    envelope, found = stored(world, request_id)
    (tmp_path / "certificate.json").write_text(json.dumps(envelope))
    (tmp_path / "supplements.json").write_text(json.dumps({"supplements": [{"envelope": each} for each in found]}))
    (tmp_path / "signing.pub").write_bytes(world.public_key)
    (tmp_path / "recipe.json").write_text(json.dumps(world.recipe.to_json()))
    store = world.context.artifacts.files.root
    keys = store.parent / "file-keys"
    given = (tmp_path / "certificate.json", "--key", tmp_path / "signing.pub", "--file-keys", keys,
             "--artifacts", store, "--ledger", store / "ledger", "--checkpoint", store / "ledger" / "checkpoint",
             "--supplements", tmp_path / "supplements.json", "--recipe", tmp_path / "recipe.json")  # fmt: skip
    done = run(*given, "--json")
    assert done.exit_code == 0, done.output
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert "3 of 3 served stages trained again" in checks["replay"]["detail"]
    assert checks["replay"]["strength"] == "re-derived"
    assert {"supplement 1", "later tree head", "artefact directory", "key store"} <= checks.keys()
    other = world.recipe.to_json() | {"seed": 12345}
    (tmp_path / "recipe.json").write_text(json.dumps(other))
    done = run(*given)
    assert done.exit_code == 1
    assert "is not the certificate's" in done.stdout


def test_unverifiable_evidence_is_never_stored(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "verify", lambda *_: [Check("times", passed=False, detail="late", strength="")])
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    with pytest.raises(certify.UnverifiedError, match=r"times \(late\)"):
        world.finish(request_id)
    assert world.rows("SELECT 1 FROM certificate") == []
