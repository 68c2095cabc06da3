"""The ledger beside other programs: what one of them writes, removes or breaks while another is at work."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Database
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_kit import Ledger, fetcher, open_ledger

import workers.sequencer
from service.cli.ledger_commands import open_log
from service.cli.witness import witness
from service.evidence.ledger_check import LedgerError
from service.evidence.tiles import read_bundle, write_bundle
from service.evidence.tree_head import TreeHeadError, read_head
from service.store import ledger as store
from service.store.artifacts import Artifacts
from service.store.database import transaction
from service.store.directory import Directory
from service.store.file_keys import FileKeys
from workers.sequencer import Sequencer

pytestmark = pytest.mark.integration


@pytest.fixture
def ledger(database: Database, tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(database, tmp_path) as found:
        yield found


def test_the_high_water_file_never_goes_down(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program signs and writes a larger head between our signature and our write."""
    ledger.append(5)
    ledger.sequencer.sequence()
    first, other = ledger.sequencer, Sequencer(ledger.pool, ledger.artifacts, ledger.settings)
    write = workers.sequencer.write_high_water

    def overtaken(*arguments: Any, **values: Any) -> bool:
        monkeypatch.undo()
        ledger.sequencer = other
        ledger.run(3)
        ledger.sequencer = first
        return write(*arguments, **values)

    monkeypatch.setattr(workers.sequencer, "write_high_water", overtaken)
    head = ledger.sequencer.publish()
    assert head is not None
    assert head.size == 5
    kept = (ledger.settings.keys_dir / "tree-head").read_text()
    assert read_head(kept).size == read_head(ledger.checkpoint).size == 8
    ledger.run()
    ledger.require_whole(8)


class Overtaken(Artifacts):
    """Another program has written the same partial tile, and a longer one in its place, before we look at it."""

    between: Callable[[], None]

    def put(self, name: str, data: bytes) -> None:
        try:
            super().put(name, data)
        except FileExistsError:
            self.between()
            raise


def test_a_tile_that_another_program_replaced_meanwhile_is_no_alarm(ledger: Ledger) -> None:
    ledger.run(100)
    (ledger.files / "checkpoint").unlink()
    ledger.forget_files()
    slow = Overtaken(Directory(ledger.directory / "artifacts"), FileKeys(ledger.directory / "file-keys"))
    slow.between = lambda: ledger.run(200)
    head = Sequencer(ledger.pool, slow, ledger.settings).publish()
    assert head is not None
    assert head.size == 100
    assert not (ledger.files / "tile/0/000.p/100").exists()
    ledger.run()
    assert read_head(ledger.checkpoint).size == ledger.check().head.size >= 300


@pytest.mark.parametrize(
    "broken",
    ["REVOKE SELECT ON ledger_head FROM expunge_app", "ALTER TABLE ledger_node RENAME TO gone", "DROP TABLE tree_head"],
)
def test_whatever_breaks_the_ledger_does_not_end_the_program_that_deactivates(
    ledger: Ledger, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.append(300)
    ledger.as_owner(broken)
    ledger.sequencer.look()
    ledger.sequencer.look_and_publish()
    assert "ledger.refused" in capsys.readouterr().out


def test_a_retention_that_no_clock_can_hold_does_not_end_the_program_either(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.restart(ledger_opening_days=3_000_000)
    ledger.append()
    ledger.sequencer.look()
    ledger.sequencer.look_and_publish()
    assert "out of range" in capsys.readouterr().out
    assert ledger.check().head.size == 1


def test_a_high_water_file_that_is_no_text_says_what_to_do(ledger: Ledger) -> None:
    ledger.run(1)
    (ledger.settings.keys_dir / "tree-head").write_bytes(b"\xff\xfe")
    with pytest.raises(TreeHeadError, match="the high-water file is damaged"):
        ledger.sequencer.publish()


def test_two_erasers_count_an_opening_once(ledger: Ledger) -> None:
    ledger.append(10)
    ledger.as_owner("UPDATE event_pending SET created_at = created_at - interval '40 days'")
    ledger.run()
    counts: list[int] = []

    def erase() -> None:
        with transaction(ledger.pool) as connection:
            counts.append(store.erase_openings(connection, days=30))

    with transaction(ledger.pool) as first:
        assert store.erase_openings(first, days=30) == 10
        second = threading.Thread(target=erase)
        second.start()
        while ledger.row("SELECT count(*) FROM pg_locks WHERE NOT granted") == (0,):
            time.sleep(0.01)
    second.join()
    assert counts == [0]


def test_a_file_that_goes_while_a_directory_is_read_is_gone(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial tiles go when the full one is there: between the look and the read, too."""
    ledger.run(10)
    real = Path.is_file

    def vanishing(path: Path) -> bool:
        found = real(path)
        if path.name == "10":
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", vanishing)
    with open_log(str(ledger.files)) as fetch:
        assert fetch("tile/0/000.p/11") is None
        assert fetch("tile/0") is None
        assert fetch("tile/0/000.p/10") == (ledger.files / "tile/0/000.p/10").read_bytes()
    assert ledger.artifacts.names(older_than=-60) == ["ledger/checkpoint"]


def test_a_witness_run_twice_at_once_cosigns_one_of_two(ledger: Ledger, tmp_path: Path) -> None:
    mine, state, fetch = Ed25519PrivateKey.generate(), tmp_path / "seen", fetcher(ledger.files)
    ledger.run(10)
    witness(fetch, ledger.key, "w", mine, state, now=1)
    ledger.run(10)

    def overtaken(name: str) -> bytes | None:
        found = fetch(name)
        if name == "tile/0/000.p/20":  # what we saw was read: now the other run goes first
            ledger.run(10)
            witness(fetch, ledger.key, "w", mine, state, now=3)
        return found

    with pytest.raises(TreeHeadError, match="another run"):
        witness(overtaken, ledger.key, "w", mine, state, now=2)
    assert read_head(state.read_text()).size == 30


def test_an_index_of_many_digits_is_an_edit_like_any_other(ledger: Ledger) -> None:
    ledger.run(10)
    bundle = ledger.files / "tile/entries/000.p/10"
    leaves = read_bundle(bundle.read_bytes())
    leaves[4] = leaves[4].replace(b'"index":4', b'"index":' + b"4" * 5000)
    bundle.write_bytes(write_bundle(leaves))
    with pytest.raises(LedgerError, match="leaf 4: the entry is not of a leaf's form"):
        ledger.check()
