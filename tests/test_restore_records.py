"""Who was ingested comes back from payload files: rows of records, whom they concern, and how callers name them."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from restore_kit import Installation, owner_pool
from test_workers_path import build
from world_copies import SUBJECTS, Copy, Mould
from world_requests import deactivate, hold, record_id, served, stored

from service.domain.errors import InvalidInputError
from service.domain.requests import Kind
from service.store import cells, datasets, payloads, restore_records
from service.store.database import transaction
from service.store.ingest import ingest
from service.store.payloads import SCHEMA, StoredRecord, Whose
from service.store.priors import Prior
from service.store.vetting import BehindError
from shards.manifest import Record
from workers import restore_objects
from workers.restore_survey import RestoreError

pytest_plugins = ("world_fixtures", "restore_fixtures")
pytestmark = pytest.mark.integration

CHANGED = {"model", "model_version", "cell", "cell_manifest", "artifact", "tombstone", "gate", "deferral"}
"""What a restore itself goes on with."""


def in_files(world: Copy) -> list[StoredRecord]:
    names = [name for (name,) in world.rows("SELECT object_name FROM cell WHERE object_name IS NOT NULL")]
    return [each for name in names for each in payloads.decode(world.context.artifacts.get(name))]


def records_of(world: Copy, request_id: UUID) -> set[UUID]:
    rows = world.rows("SELECT record_id FROM deletion_request_record WHERE request_id = %s", request_id)
    return {each for (each,) in rows}


def with_priors(world: Copy) -> UUID:
    """Another dataset, in which an owner's class decides the slice; some subjects are in both."""
    with transaction(world.pool) as connection:
        dataset = datasets.insert_dataset(
            connection,
            name="classed",
            shards=2,
            slices=3,
            classes=["no", "yes"],
            deletable=True,
            subject_row_cap=9,
            priors=[Prior("steady", 2), Prior("leaving", 1, expires=True)],
        )
    lines = [
        replace(world.line(number, subject, f"classed-{subject}"), prior=number % 2)
        for number, subject in enumerate(("s2", "s3", "eve", "fay"), 1)
    ]
    ingest(world.pool, world.context.artifacts, world.secrets.partition, dataset, lines)
    return dataset.dataset_id


def test_a_database_that_is_gone_is_rebuilt_from_the_files(installation: Installation, migrated_template: str) -> None:
    """From tiles, openings and payload files alone, nothing given up."""
    world = installation.world
    with_priors(world)
    world.add({each: [f"{each}-more"] for each in SUBJECTS})
    first = installation.delete("s1")
    hold(world, "s4")
    restricted = deactivate(world, "s5", Kind.RESTRICT)
    installation.log()
    before, ingested, assembly = installation.state(), installation.ingested(), served(world)
    files, version = stored(world), world.bounds()[0]
    installation.put_back(migrated_template)
    assert world.rows("SELECT 1 FROM record") == []
    with pytest.raises(BehindError):
        installation.vet()
    installation.require_shut()
    report = installation.restore()
    assert (report.recovered, report.records, report.lost, report.stages) == (len(files), 0, 0, 0)
    assert (report.losses, report.certificates, report.keys) == ([], [str(first)], [world.actor])
    assert installation.ingested() == ingested
    after = installation.state()
    assert {name: rows for name, rows in after.items() if name not in CHANGED} == {
        name: rows for name, rows in before.items() if name not in CHANGED
    }
    assert (served(world), world.bounds()[0]) == (assembly, version + 1)
    live = [{row[0] for row in every["artifact"] if row[1] == "stage" and "live" in row} for every in (before, after)]
    assert live[0] == live[1] != set()
    assert world.shown(first) == ("completed", "erased")
    assert (world.shown(restricted)[0], world.active("s5")) == ("deactivated", 0)
    assert stored(world) == files
    skipped = world.add({"s1": ["s1-again"], "s6": ["s6-again"]})
    assert (skipped.accepted, skipped.skipped) == (1, 1)
    with pytest.raises(InvalidInputError, match="never comes back"):
        world.add({"s9": ["s1r0"]})


def test_after_that_an_identifier_finds_its_records_and_they_are_erased(
    installation: Installation, migrated_template: str, trained: Mould, tmp_path: Path
) -> None:
    """And what is trained without them is, bit for bit, what an installation gives that lost nothing."""
    world = installation.world
    installation.log()
    installation.put_back(migrated_template)
    installation.restore()
    request_id = installation.delete("bob")
    assert records_of(world, request_id) == {record_id(world, "bobs"), record_id(world, "shared")}
    world.no_trace_of(request_id)
    assert not stored(world) & records_of(world, request_id)
    build(world)
    (tmp_path / "whole").mkdir()
    with trained.copy(tmp_path / "whole") as whole:
        whole.finish(deactivate(whole, "bob", Kind.ERASE))
        build(whole)
        assert served(world) == served(whole)


def test_what_was_uploaded_since_the_backup_is_there_again(installation: Installation) -> None:
    """But for what was deleted since: its file is gone, and so is every way to name the subject."""
    world = installation.world
    installation.log()
    backup = installation.backup()
    world.add({"new": ["new0", "new1"], "s2": ["s2-more"], "gone": ["gone0"]})
    since = with_priors(world)
    gone = installation.delete("gone")
    restricted = deactivate(world, "new", Kind.RESTRICT)
    installation.log()
    ingested, files = installation.ingested(), stored(world)
    installation.put_back(backup)
    report = installation.restore()
    assert (report.recovered, report.records, report.stages, report.losses) == (3 + 4, 0, 0, [])
    assert installation.ingested() == ingested
    assert (stored(world), world.active("new"), world.active("gone")) == (files, 0, 0)
    assert world.row("SELECT count(*) FROM subject_prior WHERE dataset_id = %s", since) == (4,)
    assert world.events("restore.completed")[-1]["recovered"] == report.recovered
    world.no_trace_of(gone)
    world.no_trace_of(installation.delete("s2"))
    world.finish(restricted)
    assert world.shown(restricted) == ("completed", "restricted")


def test_no_way_to_name_a_deleted_subject_stays_in_anybodys_file(installation: Installation) -> None:
    world = installation.world
    digests = {name: world.line(0, name, "x").owner.digest for name in ("ann", "bob", "cid", "s2")}

    def named() -> set[str]:
        there = {digest for each in in_files(world) if each.whose for _, _, digest in each.whose.aliases}
        return {name for name, digest in digests.items() if digest in there}

    assert named() == {"ann", "bob", "cid", "s2"}
    installation.delete("ann")
    assert named() == {"bob", "s2"}  # who has a record of their own still


def test_a_record_that_is_erased_never_comes_back(installation: Installation) -> None:
    """Whatever file is found."""
    world = installation.world
    older = in_files(world)
    request_id = installation.delete("s1")
    with transaction(world.pool) as connection:
        for cell in cells.list_cells(connection, world.dataset.dataset_id):
            assert restore_records.insert_missing(connection, cell, older) == 0
    world.no_trace_of(request_id)


def a_tombstone_is_missing(world: Copy) -> None:
    world.as_owner("DELETE FROM deferral; DELETE FROM tombstone WHERE lifted_at IS NULL")


def an_alias_is_somebody_elses(world: Copy) -> None:
    world.as_owner("UPDATE subject_alias SET subject_id = (SELECT subject_id FROM subject ORDER BY random() LIMIT 1)")


def the_root_is_another(world: Copy) -> None:
    world.as_owner(f"UPDATE cell_manifest SET root = '{'0' * 64}'")


@pytest.mark.parametrize("breaks", [a_tombstone_is_missing, an_alias_is_somebody_elses, the_root_is_another])
def test_rows_that_contradict_the_ledger_are_not_brought_back(
    installation: Installation, breaks: Callable[[Copy], None]
) -> None:
    """Then nobody knows whose the records are, and they stay out unless the operator finds better."""
    world = installation.world
    deactivate(world, "s2", Kind.RESTRICT)
    world.add({each: [f"{each}-more"] for each in SUBJECTS if each != "s2"})  # manifests leave sealed records out now
    cell_ids = [each for (each,) in world.rows("SELECT cell_id FROM record WHERE record_id = %s", s2(world))]
    world.as_owner("SET expunge.mode = 'applying'; DELETE FROM record")
    breaks(world)
    with owner_pool(world.owner_url) as pool:
        compared = {each.cell.cell_id: each for each in restore_objects.compare_cells(pool, world.context.artifacts)}
    assert all(compared[each].strangers for each in cell_ids)
    assert all(not compared[each].kept for each in cell_ids)


def s2(world: Copy) -> UUID:
    return record_id(world, "s2r0")


def test_a_file_that_is_missing_stops_a_restore(installation: Installation, migrated_template: str) -> None:
    """Also where no row says what it held."""
    world = installation.world
    installation.log()
    (name,) = world.row("SELECT object_name FROM cell WHERE object_name IS NOT NULL ORDER BY 1 LIMIT 1")
    (installation.directory / "artifacts" / name).unlink()
    installation.put_back(migrated_template)
    with pytest.raises(RestoreError, match="and 1 payload files are missing or damaged"):
        installation.restore()
    installation.require_shut()
    report = installation.restore(accept_loss=True)
    assert report.recovered == len(stored(world)) > 0


NONE: list[Any] = [None, Whose(UUID(int=1), 2, ((UUID(int=1), "user", b"d" * 32), (UUID(int=2), "email", b"e" * 32)))]


@pytest.mark.parametrize("whose", NONE)
def test_a_payload_file_says_whose_its_records_are_outside_of_what_is_hashed(whose: Whose | None) -> None:
    one = StoredRecord(3, Record(uuid4(), b"s" * 32, "text", "yes"), whose)
    (found,) = payloads.decode(payloads.encode([one]))
    assert found == one
    assert found.record.commitment == replace(one, whose=None).record.commitment


def test_a_file_from_before_says_nothing() -> None:
    values = [b"i" * 16, 1, b"s" * 32, "t", "l", None]
    columns = {name: [value] for name, value in zip(SCHEMA.names, values, strict=False)}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=pa.schema([SCHEMA.field(name) for name in columns])), buffer)
    (found,) = payloads.decode(buffer.getvalue())
    assert (found.generation, found.record.text, found.whose) == (1, "t", None)
