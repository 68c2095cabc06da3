"""The ledger in Postgres: order, no gap, nothing rewritten, one head for a size, whatever dies and wherever."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from conftest import Database
from ledger_kit import Ledger, open_ledger, record, threads

from service.evidence.keys import load_signing_key
from service.evidence.leaves import open_leaf, parse_leaf
from service.evidence.merkle import leaf_hash
from service.evidence.tree_head import ForkError, TreeHeadError, read_head, sign_head
from service.store import ledger as store
from service.store.database import Connection, QuarantineError, connect, transaction
from service.store.ledger_files import LedgerFiles
from workers import sequencer as module
from workers.loops import every
from workers.reaper import Reaper
from workers.sequencer import BehindError, Sequencer

pytestmark = pytest.mark.integration


@pytest.fixture
def ledger(database: Database, tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(database, tmp_path) as found:
        yield found


def test_events_become_leaves_in_order_and_can_be_opened(ledger: Ledger) -> None:
    request_id = uuid4()
    ledger.append(3, request_id=request_id)
    assert ledger.sequencer.sequence() == 3
    assert ledger.sequencer.sequence() == 0
    with transaction(ledger.pool) as connection:
        entries = store.list_of_request(connection, request_id)
    assert [entry.index for entry in entries] == [0, 1, 2]
    for number, entry in enumerate(entries):
        said = open_leaf(parse_leaf(bytes(entry.leaf)), bytes(entry.opening or b""))
        assert said["request_id"] == str(request_id)
        assert said["body"] == {"stage": f"{number:064x}"}
        assert str(request_id).encode() not in bytes(entry.leaf)
    kinds = ledger.rows("SELECT event_id::text FROM event_pending ORDER BY id")
    assert [(leaf["event_id"],) for leaf in ledger.leaves()] == kinds


def test_every_event_is_numbered_once_while_writers_and_sequencers_race(ledger: Ledger) -> None:
    """Later ids commit first, some roll back: a cause still stands before what follows from it."""
    stop, follows = threading.Event(), list[tuple[str, str]]()
    lock = threading.Lock()

    def write(seed: int) -> None:
        for round_ in range(30):
            with connect(ledger.database.app_url) as connection:
                record(connection, seed)
                time.sleep(0.001 * ((seed + round_) % 4))
                if (seed + round_) % 5 == 0:
                    connection.rollback()
                    continue
                cause = newest(connection)
            with connect(ledger.database.app_url) as connection:
                record(connection, seed)
                effect = newest(connection)
            with lock:
                follows.append((cause, effect))

    def newest(connection: Connection) -> str:
        row = connection.execute("SELECT event_id::text FROM event_pending WHERE id = lastval()").fetchone()
        assert row is not None
        return row[0]

    def number() -> None:
        own = Sequencer(ledger.pool, ledger.artifacts, ledger.settings)
        while not stop.is_set():
            own.sequence()
            own.publish()

    with threads(number, number):
        try:
            with threads(*(lambda seed=seed: write(seed) for seed in range(4))):
                pass
        finally:
            stop.set()
    ledger.run()
    (count,) = ledger.row("SELECT count(*) FROM event_pending")
    assert count == 2 * len(follows) == 2 * 4 * 24
    ledger.require_whole(count)
    place = {leaf["event_id"]: leaf["index"] for leaf in ledger.leaves()}
    assert all(place[cause] < place[effect] for cause, effect in follows)


def test_an_event_has_its_number_within_fifty_milliseconds(ledger: Ledger) -> None:
    stop, waits = threading.Event(), list[float]()
    with (
        psycopg.connect(ledger.database.owner_url, autocommit=True) as watcher,
        threads(lambda: every(stop, "sequencer", module.SEQUENCE_SECONDS, ledger.sequencer.look)),
    ):
        try:
            for _ in range(40):
                time.sleep(0.007)
                ledger.append()
                began = time.perf_counter()
                while watcher.execute("SELECT count(*) FROM ledger_queue").fetchone() != (0,):
                    time.sleep(0.002)
                waits.append(time.perf_counter() - began)
        finally:
            stop.set()
    assert sorted(waits)[len(waits) // 4] < 0.05  # a busy machine slows the others


class Killed(Exception):  # noqa: N818 - no error: the process is gone
    """The process died here."""


def test_a_sequencer_may_die_at_any_line(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statement and every file operation is once the last that happens; the next process makes it whole."""
    ledger.run(300)
    steps, deadly = 0, 0

    def dying(real: Any) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            if threading.current_thread() is not threading.main_thread():
                return real(*arguments, **options)  # the pool's own
            steps += 1
            if steps == deadly:
                raise Killed
            done = real(*arguments, **options)
            steps += 1
            if steps == deadly:
                raise Killed  # done, but nobody heard of it
            return done

        return step

    for owner, name in (
        (psycopg.Cursor, "execute"),
        (psycopg.Connection, "commit"),
        (psycopg.Cursor, "copy"),
        (type(ledger.artifacts), "put"),
        (type(ledger.artifacts), "replace"),
        (type(ledger.artifacts), "delete"),
        (module, "write_high_water"),
        (module, "sign_head"),
        (LedgerFiles, "publish"),
    ):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    recorded, died = 300, 0
    while True:
        deadly = 0
        ledger.append(150)
        recorded += 150
        steps, deadly = 0, died + 1
        ledger.restart()
        try:
            ledger.run()
        except Killed:
            died += 1
        else:
            break
        finally:
            steps, deadly = 0, 0
        ledger.restart()
        ledger.run()
        heads = ledger.rows("SELECT size, note FROM tree_head")
        assert len({size for size, _ in heads}) == len(heads)
        assert ledger.check().head.size == recorded
    assert died > 40
    monkeypatch.undo()
    ledger.require_whole(recorded)


PROCESS = """
import sys, threading
from pathlib import Path
from service.settings import Settings
from service.store.artifacts import open_artifacts
from service.store.database import make_pool
from workers.sequencer import Sequencer
url, directory = sys.argv[1:]
pool = make_pool(url, size=2)
pool.open()
settings = Settings(database_url=url, keys_dir=Path(directory, "keys"))
sequencer = Sequencer(pool, open_artifacts(f"file://{directory}/artifacts", f"file://{directory}/file-keys"), settings)
print("ready", flush=True)
while True:
    sequencer.sequence()
    sequencer.publish()
"""


def test_processes_that_are_killed_leave_a_whole_ledger(ledger: Ledger) -> None:
    recorded = 0
    for round_ in range(6):
        argv = [sys.executable, "-c", PROCESS, ledger.database.app_url, str(ledger.directory)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ}) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            until = time.monotonic() + 0.1 + 0.037 * round_
            while time.monotonic() < until:
                ledger.append(20)
                recorded += 20
            process.send_signal(signal.SIGKILL)
    ledger.restart()
    ledger.run()
    ledger.require_whole(recorded)


@pytest.mark.parametrize("table", ["ledger_leaf", "ledger_node", "tree_head", "ledger_head"])
def test_nothing_is_rewritten_not_even_by_the_owner(ledger: Ledger, table: str) -> None:
    ledger.run(300)
    column = {"ledger_leaf": "leaf", "ledger_node": "hash", "tree_head": "note", "ledger_head": "size"}[table]
    tried = [f"UPDATE {table} SET {column} = {column}", f"DELETE FROM {table}", f"TRUNCATE {table}"]
    for statement in tried:
        with psycopg.connect(ledger.database.owner_url) as owner, pytest.raises(psycopg.errors.RestrictViolation):
            owner.execute(statement.encode())
        with (
            psycopg.connect(ledger.database.app_url) as app,
            pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.RestrictViolation)),
        ):
            app.execute(statement.encode())


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO ledger_leaf SELECT index + 2, gen_random_uuid(), hash, leaf FROM ledger_leaf WHERE index = 4",
        "INSERT INTO ledger_leaf SELECT index, gen_random_uuid(), hash, leaf FROM ledger_leaf WHERE index = 4",
        "INSERT INTO ledger_leaf SELECT index + 1, event_id, hash, leaf FROM ledger_leaf WHERE index = 4",
        "UPDATE ledger_head SET size = 4",
        "INSERT INTO tree_head SELECT * FROM tree_head",
        "DELETE FROM ledger_queue",
        "SELECT erase_openings(29, 10)",
    ],
)
def test_gaps_repetitions_and_lost_events_are_refused(ledger: Ledger, statement: str) -> None:
    ledger.run(5)
    ledger.append()
    allowed = (psycopg.errors.RestrictViolation, psycopg.errors.UniqueViolation)
    with psycopg.connect(ledger.database.app_url) as app, pytest.raises(allowed):
        app.execute(statement.encode())


def test_the_queue_cannot_be_filled_by_hand(ledger: Ledger) -> None:
    for statement in ("INSERT INTO ledger_queue VALUES (1)", "DELETE FROM ledger_opening", "DELETE FROM event_pending"):
        with psycopg.connect(ledger.database.app_url) as app, pytest.raises(psycopg.errors.InsufficientPrivilege):
            app.execute(statement.encode())


def test_a_head_is_signed_once_for_a_size(ledger: Ledger) -> None:
    ledger.run(5)
    first = ledger.checkpoint
    ledger.restart(ledger_origin="another.example/log")
    ledger.run()
    assert ledger.checkpoint == first
    (ledger.settings.keys_dir / "tree-head").unlink()
    (ledger.files / "checkpoint").unlink()
    ledger.forget_files()
    ledger.run()  # both are written again, byte for byte
    assert ledger.checkpoint == first == (ledger.settings.keys_dir / "tree-head").read_text()
    assert ledger.row("SELECT count(*) FROM tree_head") == (1,)
    ledger.run(1)
    assert read_head(ledger.checkpoint).origin == read_head(first).origin


def test_the_origin_may_be_chosen_before_the_first_head(ledger: Ledger) -> None:
    ledger.restart(ledger_origin="example.org/expunge")
    ledger.run(1)
    assert ledger.checkpoint.startswith("example.org/expunge\n1\n")


def test_a_database_that_is_older_than_its_ledger_numbers_and_signs_nothing(
    ledger: Ledger, postgres: Any, migrated_template: str, tmp_path: Path
) -> None:
    ledger.run(6)
    for where in ("high-water", "bucket"):
        name = f"older_{uuid4().hex}"
        postgres.create(name, template=migrated_template)
        try:
            older = Database(postgres.url("", name), postgres.url("expunge_app", name))
            with open_ledger(older, tmp_path / where) as behind:
                (tmp_path / where / "keys" / "signing.pem").write_bytes(
                    (ledger.settings.keys_dir / "signing.pem").read_bytes()
                )
                if where == "bucket":
                    behind.artifacts.put("ledger/checkpoint", ledger.checkpoint.encode())
                else:
                    (tmp_path / where / "keys" / "tree-head").write_text(ledger.checkpoint)
                behind.append(2)
                with pytest.raises(BehindError, match="holds 0 leaves, but the tree head of size 6"):
                    behind.sequencer.sequence()
                with pytest.raises(BehindError):
                    behind.sequencer.publish()
                behind.sequencer.look()  # as the loop does: told, not raised
                assert behind.row("SELECT count(*) FROM ledger_queue") == (2,)
                assert behind.row("SELECT count(*) FROM tree_head") == (0,)
        finally:
            postgres.drop(name)


@pytest.mark.parametrize("where", ["high-water", "bucket"])
def test_a_fork_names_both_heads_and_stops(ledger: Ledger, where: str) -> None:
    ledger.run(6)
    honest = read_head(ledger.checkpoint)
    root = leaf_hash(b"other")
    other = sign_head(type(honest)(honest.origin, 4, root), load_signing_key(ledger.settings.keys_dir / "signing.pem"))
    if where == "bucket":
        (ledger.files / "checkpoint").write_text(other)
    else:
        (ledger.settings.keys_dir / "tree-head").write_text(other)
    ledger.restart()
    ledger.append()
    for step in (ledger.sequencer.sequence, ledger.sequencer.publish):
        with pytest.raises(ForkError, match=rf"size 4 with root {root.hex()} and .* size 4 with root [0-9a-f]{{64}}"):
            step()
    assert ledger.row("SELECT count(*) FROM tree_head") == (1,)
    assert ledger.row("SELECT size FROM ledger_head") == (6,)


def test_a_head_of_the_same_size_that_is_another_is_a_fork(ledger: Ledger) -> None:
    ledger.run(6)
    honest = read_head(ledger.checkpoint)
    key = load_signing_key(ledger.settings.keys_dir / "signing.pem")
    (ledger.files / "checkpoint").write_text(sign_head(type(honest)(honest.origin, 6, bytes(32)), key))
    with pytest.raises(ForkError):
        ledger.sequencer.publish()


def test_leaves_that_were_changed_in_the_database_are_not_signed(ledger: Ledger) -> None:
    ledger.run(300)
    ledger.as_owner("UPDATE ledger_leaf SET hash = decode(repeat('00', 32), 'hex') WHERE index = 280")
    ledger.append()
    ledger.sequencer.sequence()
    with pytest.raises(TreeHeadError, match="changed by hand"):
        ledger.sequencer.publish()
    assert ledger.row("SELECT max(size) FROM tree_head") == (300,)


def test_without_a_signing_key_events_are_numbered_and_the_loop_goes_on(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    key = (ledger.settings.keys_dir / "signing.pem").read_bytes()
    (ledger.settings.keys_dir / "signing.pem").unlink()
    ledger.append(2)
    ledger.sequencer.look()
    ledger.sequencer.look_and_publish()
    assert "ledger.refused" in capsys.readouterr().out
    ledger.sequencer.look_and_publish()  # rests, and says nothing
    assert "ledger.refused" not in capsys.readouterr().out
    assert ledger.row("SELECT size, (SELECT count(*) FROM tree_head) FROM ledger_head") == (2, 0)
    (ledger.settings.keys_dir / "signing.pem").write_bytes(key)
    (ledger.settings.keys_dir / "signing.pem").chmod(0o600)
    ledger.restart()
    ledger.sequencer.look_and_publish()
    assert ledger.check().head.size == 2


def test_a_damaged_checkpoint_says_what_to_do(ledger: Ledger) -> None:
    ledger.run(2)
    (ledger.files / "checkpoint").write_text("half of")
    with pytest.raises(TreeHeadError, match="ledger/checkpoint of the artefact store is damaged"):
        ledger.sequencer.publish()
    (ledger.files / "checkpoint").unlink()
    ledger.forget_files()
    ledger.run(1)
    assert ledger.check().head.size == 3


def test_another_database_is_compared_before_anything_is_done(ledger: Ledger) -> None:
    """Postgres was started anew, or a copy put in its place: it is shut until a sequencer has compared it."""
    ledger.run(3)
    ledger.as_owner("UPDATE vetting SET database = 'an earlier postmaster'")
    with pytest.raises(QuarantineError, match="being compared with the ledger: try again"):
        ledger.append()
    assert ledger.sequencer.sequence() == 0
    ledger.run(1)
    assert ledger.check().head.size == 4


def test_a_clock_that_goes_backwards_changes_no_order(ledger: Ledger) -> None:
    ledger.run(2)
    insert = (
        "INSERT INTO event_pending (kind, body, created_at) VALUES ('stage.cancelled', '{}', now() - interval '3 days')"
    )
    ledger.as_owner("SET session_replication_role = origin; " + insert)
    ledger.run(1)
    found = ledger.check()
    assert (found.back_at, round(found.back / timedelta(days=1), 2)) == (2, 3)
    assert [leaf["index"] for leaf in ledger.leaves()] == [0, 1, 2, 3]


def test_a_body_that_has_no_canonical_form_does_not_stop_the_ledger(ledger: Ledger) -> None:
    insert = (
        """INSERT INTO event_pending (kind, body) VALUES ('stage.cancelled', '{"n": 123456789012345678901234567890}')"""
    )
    ledger.as_owner("SET session_replication_role = origin; " + insert)
    ledger.run(1)
    with transaction(ledger.pool) as connection:
        first, _ = store.list_opened(connection, 0, limit=5)
    said = open_leaf(parse_leaf(bytes(first.leaf)), bytes(first.opening or b""))
    assert said["body"] == {"not_canonical": '{"n": 123456789012345678901234567890}'}


def test_openings_are_erased_by_age_and_the_tree_stays_whole(ledger: Ledger) -> None:
    ledger.append(300)
    ledger.as_owner("UPDATE event_pending SET created_at = created_at - interval '40 days'")
    ledger.run()
    ledger.run(20)
    before = ledger.checkpoint
    openings = ledger.files / "openings"
    assert (openings / "000").exists()
    assert ledger.sequencer.erase() == 0  # three years are not over
    ledger.restart(ledger_opening_days=30)
    assert ledger.sequencer.erase() == 300
    assert ledger.row("SELECT count(*), min(index) FROM ledger_opening") == (20, 300)
    assert ledger.row("SELECT count(*) FROM event_pending") == (21,)
    said = "SELECT body FROM event_pending WHERE kind = 'ledger.openings_erased'"
    assert ledger.row(said) == ({"openings": 300, "days": 30},)
    left = sorted(str(path.relative_to(openings)) for path in openings.rglob("*") if path.is_file())
    assert left == ["001.from/44-64"]  # from leaf 300 on: no file holds an opening that was erased
    assert len(ledger.artifacts.get(f"ledger/openings/{left[0]}").splitlines()) == 20
    assert ledger.check(old=before).head.size == 320
    with transaction(ledger.pool) as connection:
        assert store.list_opened(connection, 0, limit=1)[0].opening is None
    ledger.run(300)
    assert ledger.check(old=before).head.size == 621
    assert ledger.sequencer.erase() == 0
    left = sorted(str(path.relative_to(openings)) for path in openings.rglob("*") if path.is_file())
    assert left == ["001.from/44-256", "001.from/44-64", "002.p/109"]
    assert len(ledger.artifacts.get(f"ledger/openings/{left[0]}").splitlines()) == 212


def test_figures(ledger: Ledger) -> None:
    ledger.run(3)
    ledger.append(2)
    time.sleep(0.02)
    with transaction(ledger.pool) as connection:
        figures = store.get_figures(connection)
    assert (figures.size, figures.signed, figures.waiting) == (3, 3, 2)
    assert 0.02 <= figures.lag < 5


def test_the_reaper_leaves_the_ledgers_files_alone(ledger: Ledger) -> None:
    ledger.run(300)
    unfinished = ledger.files / "tile" / ".000.abc.part"
    unfinished.write_bytes(b"half")
    stray = ledger.directory / "artifacts" / "stages" / "stray"
    stray.parent.mkdir()
    stray.write_bytes(b"x")
    for path in (ledger.directory / "artifacts").rglob("*"):
        os.utime(path, (1, 1))
    removed = Reaper(ledger.pool, ledger.artifacts, job_attempts=1).remove_strays()
    assert sorted(removed) == ["ledger/tile/.000.abc.part", "stages/stray"]
    assert ledger.check().head.size == 300
