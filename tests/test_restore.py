"""Restore: whatever of database, artefact store and high-water file is older, what was deleted stays deleted."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from restore_kit import Installation
from world_requests import deactivate, stored

from service.domain.requests import Kind
from service.evidence.tree_head import ForkError, read_head
from service.store import restore_rows, restores, vetting
from service.store.database import QuarantineError, transaction
from service.store.vetting import BehindError, StoreBehindError
from workers import steps
from workers.restore_survey import RestoreError

pytest_plugins = ("world_fixtures", "restore_fixtures")
pytestmark = pytest.mark.integration


def files(found: Installation) -> Path:
    return found.directory / "artifacts"


def test_a_database_from_before_a_deletion_learns_of_it_again(installation: Installation) -> None:
    world = installation.world
    installation.log()
    backup = installation.backup()
    request_id = installation.delete("s1")
    kept = world.ask("s2", kind=Kind.RESTRICT)
    installation.log()
    before, version = installation.state(), world.bounds()[0]
    installation.put_back(backup)
    assert world.active("s1") == 2
    with pytest.raises(QuarantineError):
        world.ask("s3")
    with pytest.raises(BehindError):
        installation.vet()
    installation.require_shut()
    with pytest.raises(QuarantineError):
        world.add({"new": ["new-record"]})
    report = installation.restore()
    assert report.replayed > 0
    assert report.losses == []
    assert report.records == 0
    after = installation.state()
    for table in ("tombstone", "do_not_train", "deletion_request_record", "cell", "cell_manifest", "stage", "hold"):
        assert after[table] == before[table], table
    assert set(before["artifact"]) <= set(after["artifact"])
    assert set(before["model_version"]) < set(after["model_version"])
    assert world.shown(request_id) == ("completed", "erased")
    assert world.shown(kept) == ("received", None)
    world.no_trace_of(request_id)
    assert world.bounds()[0] == world.bounds()[1] == world.bounds()[2] == version + 1
    assert world.events("restore.completed")[-1]["replayed"] == report.replayed
    world.ask("s3")
    installation.log()
    skipped = world.add({"s1": ["s1-again"]})
    assert (skipped.accepted, skipped.skipped) == (0, 1)


def test_an_artefact_store_from_before_a_deletion_loses_it_again(installation: Installation) -> None:
    """The keys of destroyed files are gone in any case; the files go, too, and what is missing is trained again."""
    world = installation.world
    installation.log()
    older = installation.directory / "older"
    shutil.copytree(files(installation), older)
    request_id = installation.delete("s1")
    steps.rebuild_model(world.context, world.model_id)
    installation.log()
    gone = {name for (name,) in world.rows("SELECT object_name FROM artifact WHERE state = 'destroyed'")}
    shutil.rmtree(files(installation))
    shutil.copytree(older, files(installation))
    assert gone
    assert all((files(installation) / name).exists() for name in gone)
    with pytest.raises(StoreBehindError):
        installation.vet()
    installation.require_shut()
    with pytest.raises(RestoreError, match="have lost their payload"):
        installation.restore()
    payloads = {row[0] for row in world.rows("SELECT record_id FROM record")} - stored(world, missing=True)
    report = installation.restore(accept_loss=True)
    assert (report.redestroyed, report.strays) == (len(gone), 0)
    assert not any((files(installation) / name).exists() for name in gone)
    assert report.records == len(payloads)
    live = world.rows("SELECT object_name, digest FROM artifact WHERE state = 'live'")
    assert live
    assert all(world.context.artifacts.exists(name) for name, _ in live)
    world.no_trace_of(request_id)
    assert world.row("SELECT rebuild_wanted FROM model") == (True,)
    world.ask("s3")
    installation.log()


def test_a_fork_names_both_heads_and_stays_shut(installation: Installation) -> None:
    world = installation.world
    installation.log()
    backup = installation.backup()
    world.ask("s1")
    installation.log()
    one = read_head((files(installation) / "ledger/checkpoint").read_text())
    aside = installation.directory / "aside"
    shutil.copytree(files(installation) / "ledger", aside)
    installation.put_back(backup)
    installation.high_water.unlink()
    shutil.rmtree(files(installation) / "ledger")
    world.as_owner("UPDATE vetting SET published = 0, database = database_identity()")  # as if nobody had looked
    world.ask("s2")
    world.ask("s3")
    world.ask("s4")
    installation.log()
    shutil.rmtree(files(installation) / "ledger")
    shutil.copytree(aside, files(installation) / "ledger")
    with pytest.raises(ForkError, match=f"size {one.size} with root {one.root.hex()} and .* size {one.size} with"):
        installation.vet()
    with pytest.raises(ForkError, match=one.root.hex()):
        installation.restore(accept_loss=True)
    installation.require_shut()


def test_both_older_than_what_was_signed_is_for_the_operator_to_decide(installation: Installation) -> None:
    world = installation.world
    installation.log()
    backup = installation.backup()
    older = installation.directory / "older"
    shutil.copytree(files(installation), older)
    size = read_head((files(installation) / "ledger/checkpoint").read_text()).size
    version = world.bounds()[0]
    deactivate(world, "s1", Kind.ERASE)
    signed = installation.log()
    kept = (files(installation) / "ledger/checkpoint").read_bytes()
    installation.put_back(backup)
    shutil.rmtree(files(installation))
    shutil.copytree(older, files(installation))
    with pytest.raises(BehindError, match=f"holds {size} leaves, but the tree head of size {signed}"):
        installation.vet()
    with pytest.raises(RestoreError, match=rf"{signed - size} leaves were signed that are in neither"):
        installation.restore()
    installation.high_water.unlink()  # it, too, may be lost: then only what was kept elsewhere tells
    with pytest.raises(RestoreError, match=f"{signed - size} leaves were signed"):
        installation.restore(checkpoint=kept)
    report = installation.restore(checkpoint=kept, accept_loss=True)
    assert report.survey.lost == signed - size
    assert [body["of"] for body in world.events("restore.leaf_lost")] == list(range(size, signed))
    assert world.events("restore.loss_accepted")[0]["root"] == read_head(kept.decode()).root.hex()
    assert world.bounds()[0] > version + signed - size
    assert read_head((files(installation) / "ledger/checkpoint").read_text()).size > signed
    world.ask("s2")
    installation.log()


def test_nothing_to_mend_opens_what_was_shut(installation: Installation) -> None:
    installation.log()
    vetting.shut(installation.world.pool, "for a test")
    installation.require_shut()
    report = installation.restore()
    assert (report.replayed, report.redestroyed, report.lost, report.strays, report.records) == (0, 0, 0, 0, 0)
    installation.world.ask("s1")


KILLED = ("replay", "begin", "add_recovered", "end_leases", "skip_versions", "open_again")


@pytest.mark.parametrize("place", KILLED)
def test_a_restore_that_dies_goes_on(installation: Installation, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """At each of its steps, before the transaction commits."""
    world = installation.world
    installation.log()
    backup = installation.backup()
    world.add({"s5": ["s5-more"]})
    request_id = installation.delete("s1")
    for number in range(6, 20):
        world.ask(f"s{number}")
    installation.log()
    before = installation.state()
    installation.put_back(backup)
    module = restores if hasattr(restores, place) else restore_rows
    real: Callable[..., Any] = getattr(module, place)
    calls: list[int] = []

    def dies(*args: Any, **values: Any) -> Any:
        found = real(*args, **values)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(module, place, dies)
    with pytest.raises(KeyboardInterrupt):
        installation.restore()
    with pytest.raises(QuarantineError):
        world.ask("s3")
    assert installation.restore().recovered == 1
    assert installation.state()["tombstone"] == before["tombstone"]
    assert world.shown(request_id) == ("completed", "erased")
    world.no_trace_of(request_id)
    counts = world.row("SELECT count(*), count(DISTINCT event_id), max(index) + 1 FROM ledger_leaf")
    assert counts[0] == counts[1] == counts[2]
    world.ask("s3")
    installation.log()


def test_an_erased_opening_is_told_and_not_passed_over(installation: Installation) -> None:
    world = installation.world
    installation.log()
    backup = installation.backup()
    installation.delete("s1")
    size = installation.log()
    shutil.rmtree(files(installation) / "ledger/openings")
    installation.put_back(backup)
    with pytest.raises(RestoreError, match=r"leaves could not be applied.*opening"):
        installation.restore()
    installation.require_shut()
    report = installation.restore(accept_loss=True)
    assert {each.what for each in report.losses} == {"opening"}
    assert {"index", "kind", "time"} == report.losses[0].body.keys()
    (accepted,) = world.events("restore.loss_accepted")
    assert accepted["openings"] == len(report.losses)
    assert installation.log() > size


def test_an_event_of_a_newer_version_is_not_passed_over(installation: Installation) -> None:
    world = installation.world
    installation.log()
    backup = installation.backup()
    with transaction(world.pool) as connection:
        connection.execute("INSERT INTO event_pending (kind, body) VALUES ('something.newer', '{}')")
    installation.log()
    installation.put_back(backup)
    with pytest.raises(ValueError, match=r"something\.newer, which this version does not know"):
        installation.restore(accept_loss=True)
    installation.require_shut()
