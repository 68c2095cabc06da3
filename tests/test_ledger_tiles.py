"""The ledger as files: what an auditor finds with one key and no network, whatever was done to the files."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from api_client import Api
from conftest import Database
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from key_store import open_local
from ledger_kit import Ledger, fetcher, open_ledger, write_signing_key

from service.cli.main import main
from service.cli.witness import witness
from service.evidence import note
from service.evidence.keys import load_signing_key
from service.evidence.leaves import seal
from service.evidence.ledger_check import LedgerError, check
from service.evidence.merkle import CompactRange, leaf_hash
from service.evidence.tiles import added_tiles, read_bundle, write_bundle
from service.evidence.tree_head import ForkError, TreeHead, TreeHeadError, read_head, sign_head
from service.store.api_keys import Scope
from workers.sequencer import Sequencer

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration
Edit = Callable[[Path], None]


@pytest.fixture
def ledger(database: Database, tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(database, tmp_path) as found:
        yield found


@pytest.fixture
def log(ledger: Ledger) -> Ledger:
    """700 leaves: two full tiles and a partial one."""
    ledger.run(700)
    return ledger


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_the_files_are_those_of_c2sp_and_partial_ones_go_when_full_ones_come(ledger: Ledger) -> None:
    ledger.run(100)
    ledger.run(100)
    assert names(ledger.files) == {"checkpoint"} | {
        f"{kind}/000.p/{width}" for kind in ("tile/0", "tile/entries", "openings") for width in (100, 200)
    }
    ledger.run(500)
    expected = {"checkpoint", "tile/1/000.p/2"}
    for kind in ("tile/0", "tile/entries", "openings"):
        expected |= {f"{kind}/000", f"{kind}/001", f"{kind}/002.p/188"}
    assert names(ledger.files) == expected
    assert (ledger.files / "tile/0/000").stat().st_size == 8192
    entries = read_bundle((ledger.files / "tile/entries/001").read_bytes())
    hashes = (ledger.files / "tile/0/001").read_bytes()
    assert b"".join(leaf_hash(entry) for entry in entries) == hashes
    opened = ledger.artifacts.get("ledger/openings/001").splitlines()
    assert [json.loads(line)["event_id"] for line in opened] == [json.loads(leaf)["event_id"] for leaf in entries]


def test_a_log_that_is_lost_is_written_again_with_the_same_bytes(log: Ledger) -> None:
    before = {name: log.artifacts.get(f"ledger/{name}") for name in names(log.files)}
    shutil.rmtree(log.files)
    log.forget_files()
    log.run()
    assert {name: log.artifacts.get(f"ledger/{name}") for name in names(log.files)} == before


def test_a_tile_with_other_bytes_than_the_database_stops_the_log(log: Ledger) -> None:
    (log.files / "checkpoint").unlink()
    log.forget_files()
    (log.files / "tile/0/001").write_bytes(bytes(8192))
    with pytest.raises(TreeHeadError, match="ledger/tile/0/001 holds other bytes than the database"):
        log.sequencer.publish()


def test_a_whole_log_is_found_whole(log: Ledger) -> None:
    old = log.checkpoint
    assert (log.check().head.size, log.check().since) == (700, None)
    log.run(2000)
    done: list[tuple[int, int]] = []
    report = log.check(old=old, on_leaves=lambda *at: done.append(at))
    assert (report.head.size, report.since) == (2700, read_head(old))
    assert done[-1] == (2700, 2700)


def test_three_levels_of_tiles() -> None:
    """70,000 leaves without a database: full tiles of the second level, and their proofs from the files."""
    at = datetime(2026, 11, 22, tzinfo=UTC)
    event = SimpleNamespace(event_id=UUID(int=1), kind="a.b", request_id=None, model_id=None, body={}, created_at=at)
    data = [sealed.leaf for sealed in seal([event] * 70_000, 0)]
    hashes = {0: [leaf_hash(each) for each in data]}
    grown, nodes = CompactRange().extend(hashes[0])
    for node in nodes:
        hashes.setdefault(node.level, []).append(node.hash)
    key, files = Ed25519PrivateKey.generate(), dict[str, bytes]()
    for tile in added_tiles(0, 70_000):
        first = tile.number * 256
        files[tile.path] = b"".join(hashes[tile.level][first : first + tile.width])
        if tile.level == 0:
            files[tile._replace(level=-1).path] = write_bundle(data[first : first + tile.width])
    files["checkpoint"] = sign_head(TreeHead("log", 70_000, grown.root), key).encode()
    old = sign_head(TreeHead("log", 66_000, CompactRange().extend(hashes[0][:66_000])[0].root), key)
    assert check(files.get, key.public_key(), old=old).head.root == grown.root
    assert len(files) == 1 + 2 * 274 + 2 + 1
    files["tile/1/000"] = files["tile/1/000"][:-32] + bytes(32)
    with pytest.raises(LedgerError, match="leaf 65280: tile/1/000 is cut, or of other leaves"):
        check(files.get, key.public_key())


def change(name: str, edit: Callable[[bytes], bytes]) -> Edit:
    return lambda files: (files / name).write_bytes(edit((files / name).read_bytes())) and None


def entries(edit: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    return lambda data: write_bundle(edit(read_bundle(data)))


def moved(leaves: list[bytes]) -> list[bytes]:
    return [*leaves[:9], leaves[10], leaves[9], *leaves[11:]]


def other_kind(leaves: list[bytes]) -> list[bytes]:
    return [*leaves[:40], leaves[40].replace(b"stage.cancelled", b"stage.trained"), *leaves[41:]]


def rehash(files: Path) -> None:
    """An edit that the forger carried on into the hash tile."""
    change("tile/entries/001", entries(other_kind))(files)
    found = read_bundle((files / "tile/entries/001").read_bytes())
    (files / "tile/0/001").write_bytes(b"".join(leaf_hash(entry) for entry in found))


DAMAGE: dict[str, tuple[Edit, int, str]] = {
    "an entry edited": (change("tile/entries/001", entries(other_kind)), 296, "one was edited"),
    "an entry of another form": (change("tile/entries/000", entries(lambda e: [*e[:7], b"{}", *e[8:]])), 7, "form"),
    "two entries exchanged": (change("tile/entries/001", entries(moved)), 265, "was number 266"),
    "an entry left out": (change("tile/entries/000", entries(lambda e: e[:5] + e[6:])), 5, "was number 6"),
    "a bundle cut": (change("tile/entries/002.p/188", lambda data: data[:5000]), 533, "missing or cut"),
    "a bundle lost": (lambda files: (files / "tile/entries/001").unlink(), 256, "missing or cut"),
    "a hash edited": (change("tile/0/002.p/188", lambda data: data[:64] + bytes(32) + data[96:]), 514, "edited"),
    "a hash tile cut": (change("tile/0/000", lambda data: data[:96]), 3, "missing or cut"),
    "a hash tile lost": (lambda files: (files / "tile/0/001").unlink(), 256, "missing or cut"),
    "an entry and its hash edited": (rehash, 256, "of other leaves from here on"),
    "an upper tile edited": (change("tile/1/000.p/2", lambda data: bytes(32) + data[32:]), 0, "other leaves"),
    "an upper tile lost": (lambda files: (files / "tile/1/000.p/2").unlink(), 0, "is cut"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_named_by_its_first_index(log: Ledger, what: str) -> None:
    edit, index, message = DAMAGE[what]
    edit(log.files)
    with pytest.raises(LedgerError, match=message) as found:
        log.check()
    assert found.value.index == index


def test_a_log_rewritten_whole_needs_a_signature_and_then_an_older_head_shows_it(
    log: Ledger, tmp_path: Path, postgres: Any, migrated_template: str
) -> None:
    """The operator itself starts another ledger under the same key: only somebody who kept a head can tell."""
    kept = log.checkpoint
    name = f"fork_{UUID(int=5).hex}"
    postgres.create(name, template=migrated_template)
    try:
        other = Database(postgres.url("", name), postgres.url("expunge_app", name))
        with open_ledger(other, tmp_path / "other") as fork:
            shutil.copy(log.settings.keys_dir / "signing.pem", fork.settings.keys_dir)
            fork.restart(ledger_origin=read_head(kept).origin)
            fork.run(900)
            assert fork.check().head.size == 900
            with pytest.raises(ForkError, match=r"FORK: .*size 700 with root .* and .*size 900 with root"):
                fork.check(old=kept)
            forged = (log.files / "checkpoint").read_text().replace("\n700\n", "\n701\n")
            (fork.files / "checkpoint").write_text(forged)
            with pytest.raises(TreeHeadError, match="no signature"):
                fork.check()
    finally:
        postgres.drop(name)


def test_heads_of_other_logs_and_cut_logs_are_told_apart(log: Ledger) -> None:
    key = load_signing_key(log.settings.keys_dir / "signing.pem")
    head = read_head(log.checkpoint)
    for wrong, error, message in (
        (TreeHead("another.log", 10, bytes(32)), TreeHeadError, "of the log another.log"),
        (TreeHead(head.origin, 701, bytes(32)), LedgerError, "leaf 700: the ledger was cut"),
        (TreeHead(head.origin, 700, bytes(32)), ForkError, "FORK"),
        (TreeHead(head.origin, 0, bytes(32)), ForkError, "FORK"),
    ):
        with pytest.raises(error, match=message):
            log.check(old=sign_head(wrong, key))
    with pytest.raises(TreeHeadError, match="take the key"):
        check(fetcher(log.files), Ed25519PrivateKey.generate().public_key())
    (log.files / "checkpoint").write_text(sign_head(TreeHead(head.origin, 700, bytes(32)), key))
    with pytest.raises(LedgerError, match="entries and tiles agree, but their root"):
        log.check()


def test_a_partial_tile_that_is_gone_is_read_from_the_full_one(ledger: Ledger) -> None:
    ledger.run(200)
    old = ledger.checkpoint
    ledger.run(200)
    (ledger.files / "checkpoint").write_text(old)
    assert ledger.check().head.size == 200


def test_a_witness_cosigns_what_continues_and_nothing_else(log: Ledger, tmp_path: Path) -> None:
    mine, state, fetch = Ed25519PrivateKey.generate(), tmp_path / "seen", fetcher(log.files)
    first = witness(fetch, log.key, "w.example/1", mine, state, now=1000)
    assert note.get_cosignature_time(note.parse(first), "w.example/1", mine.public_key()) == 1000
    kept = (log.files / "checkpoint").read_text()
    log.run(300)
    second = witness(fetch, log.key, "w.example/1", mine, state, now=1001)
    assert read_head(second).size == 1000
    assert state.read_text() == second
    log.check(old=second)  # a cosigned head is a head
    newest = log.checkpoint
    (log.files / "checkpoint").write_text(kept)
    with pytest.raises(LedgerError, match="the log was cut"):
        witness(fetch, log.key, "w.example/1", mine, state, now=1002)
    key = load_signing_key(log.settings.keys_dir / "signing.pem")
    other = TreeHead(read_head(kept).origin, 1000, bytes(32))
    state.write_text(sign_head(other, key))
    (log.files / "checkpoint").write_text(newest)
    with pytest.raises(ForkError, match=r"size 1000 .* size 1000"):
        witness(fetch, log.key, "w.example/1", mine, state, now=1003)
    state.write_text(kept)
    (log.files / "tile/1/000.p/3").unlink()
    with pytest.raises(TreeHeadError, match="no proof can be made"):
        witness(fetch, log.key, "w.example/1", mine, state, now=1004)
    assert state.read_text() == kept


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["expunge", "ledger", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out + printed.err


def test_the_commands(
    log: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    public, kept = str(log.settings.keys_dir / "signing.pub"), tmp_path / "kept"
    kept.write_text(log.checkpoint)
    log.run(10)

    def run(*arguments: str) -> tuple[int, str]:
        return command(monkeypatch, capsys, *arguments)

    code, said = run("verify", str(log.files), "--key", public, "--old", str(kept))
    assert code == 0, said
    assert "710 leaves" in said
    assert "nothing up to the tree head of size 700" in said
    code, said = run("verify", str(log.files), "--key", public, "--json")
    assert json.loads(said)["size"] == 710
    own = tmp_path / "witness.pem"
    own.touch(mode=0o600)
    own.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    options = ("--key", public, "--name", "w", "--witness-key", str(own), "--state", str(tmp_path / "seen"))
    code, said = run("witness", str(log.files), *options)
    cosigned, told = said.split("checked with ")  # on stdout, and how others check it on stderr
    assert (code, cosigned) == (0, (tmp_path / "seen").read_text())
    assert note.read_vkey(told, note.COSIGNATURE)[0] == "w"
    change("tile/entries/001", entries(other_kind))(log.files)
    code, said = run("verify", str(log.files), "--key", public)
    assert code == 1
    assert "leaf 296" in said
    for wrong in (("verify", str(tmp_path / "no"), "--key", public), ("verify", str(log.files), "--key", str(kept)),
                  ("verify", str(tmp_path), "--key", public), ("proof", str(kept), "--key", public),
                  ("verify", "http://127.0.0.1:9/log", "--key", public)):  # fmt: skip
        code, said = run(*wrong)
        assert code == 1, wrong
        assert said.startswith("expunge: ")


def test_over_http(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A deletion request, its proof, and the whole log, checked with the operator's public key."""
    log = f"{api.url}/v1/audit/log"
    assert api.client.get("/v1/audit/log/checkpoint").status_code == 404
    keys = api.settings.keys_dir
    write_signing_key(keys)
    api.dataset()
    api.model()
    request_id = api.request().json()["request_id"]
    proof_of = f"/v1/deletion-requests/{request_id}/inclusion-proof"
    early = api.client.get(proof_of)
    assert (early.status_code, early.headers["content-type"]) == (409, "application/problem+json")
    sequencer = Sequencer(api.pool, open_local(tmp_path / "artifacts"), api.settings)
    sequencer.sequence()
    sequencer.publish()

    answer = api.client.get(proof_of).json()
    kinds = [json.loads(entry["leaf"])["kind"] for entry in answer["entries"]]
    assert kinds == ["request.received"]
    assert json.loads(answer["entries"][0]["opening"])["request_id"] == request_id
    shown = api.client.get("/v1/audit/events", params={"limit": 2}).json()
    assert [event["index"] for event in shown["events"]] == list(range(shown["next"]))
    assert shown["events"][-1]["kind"] == "request.received" or shown["next"] == 2
    assert "example.org" not in json.dumps(shown)
    assert api.client.get("/v1/audit/events", params={"start": 10**6}).json() == {"events": [], "next": 10**6}

    checkpoint = api.client.get("/v1/audit/log/checkpoint")
    assert checkpoint.headers["content-type"] == "text/plain; charset=utf-8"
    size = read_head(checkpoint.text).size
    assert api.client.get(f"/v1/audit/log/tile/0/000.p/{size}").headers["content-type"] == "application/octet-stream"
    for path in (
        "0/000",
        "0/../../../keys/signing.pem",
        "entries/0",
        "0/000.p/256",
        "99/000",
        "openings/000",
        "%2e%2e/x",
    ):
        assert api.client.get(f"/v1/audit/log/tile/{path}").status_code == 404, path
    narrow = api.with_scopes(Scope.DELETION_READ)
    for path in ("/v1/audit/events", "/v1/audit/log/checkpoint", "/v1/audit/log/tile/0/000.p/1", proof_of):
        assert narrow.get(path).status_code == 403

    saved = tmp_path / "proof.json"
    public = str(keys / "signing.pub")
    saved.write_text(json.dumps(answer))
    code, said = command(monkeypatch, capsys, "proof", str(saved), "--key", public)
    assert code == 0, said
    assert "request.received" in said
    for damage in (
        lambda entry: entry | {"leaf": entry["leaf"].replace("request.received", "request.removed")},
        lambda entry: entry | {"opening": entry["opening"].replace(request_id, str(UUID(int=1)))},
        lambda entry: entry | {"proof": entry["proof"].replace("\nindex ", "\nindex 1")},
    ):
        saved.write_text(json.dumps(answer | {"entries": [damage(answer["entries"][0])]}))
        code, said = command(monkeypatch, capsys, "proof", str(saved), "--key", public)
        assert code == 1
        assert "does NOT hold" in said
    monkeypatch.setenv("EXPUNGE_API_URL", api.url)
    monkeypatch.setenv("EXPUNGE_API_KEY", api.client.headers["Authorization"].removeprefix("Bearer "))
    code, said = command(monkeypatch, capsys, "verify", log, "--key", public)
    assert code == 0, said
    monkeypatch.setenv("EXPUNGE_API_URL", "http://elsewhere.example")
    code, said = command(monkeypatch, capsys, "verify", log, "--key", public)
    assert code == 1
    assert "answered 401" in said


def test_what_was_erased_has_no_proof_any_more(api: Api, database: Database, tmp_path: Path) -> None:
    write_signing_key(api.settings.keys_dir)
    api.dataset()
    api.model()
    request_id = api.request().json()["request_id"]
    with psycopg.connect(database.owner_url) as owner:
        owner.execute("UPDATE event_pending SET created_at = created_at - interval '2 years'")
    settings = api.settings.model_copy(update={"ledger_opening_days": 700})
    sequencer = Sequencer(api.pool, open_local(tmp_path / "artifacts"), settings)

    def proof() -> httpx.Response:
        for _ in range(2):
            sequencer.look()
            sequencer.erase()
            sequencer.publish()
        return api.client.get(f"/v1/deletion-requests/{request_id}/inclusion-proof")

    assert proof().status_code == 200  # a request that has not ended keeps what its certificate is made of
    with psycopg.connect(database.owner_url) as owner:
        owner.execute("UPDATE request_target SET state = 'rejected'")
    answer = proof()
    assert (answer.status_code, "erased when their retention ended" in answer.text) == (404, True)
    first, *_, last = api.client.get("/v1/audit/events").json()["events"]
    assert (first["opening"], first["body"], first["request_id"]) == (None, None, None)
    assert (last["kind"], last["body"]["days"]) == ("ledger.openings_erased", 700)
    key = load_signing_key(api.settings.keys_dir / "signing.pem").public_key()
    assert check(fetcher(tmp_path / "artifacts" / "ledger"), key).head.size == last["index"] + 1
