"""Keys: the one that signs is changed, what the old one signed stays good, and each is kept from others' eyes."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from api_client import Api, Run, line, ndjson, serving
from conftest import Database
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledger_kit import Ledger, fetcher, open_ledger, threads

from service.cli import keys as commands
from service.cli.keys import rotate_key
from service.cli.main import main
from service.evidence.keys import (
    Handover,
    KeyFileError,
    KeySet,
    keyid,
    load_key_set,
    load_signing_key,
    public_pem,
    read_key_set,
)
from service.evidence.ledger_check import check
from service.evidence.tree_head import TreeHeadError, open_head, read_head, sign_head
from service.store.secrets import SecretsError, check_secrets, read_secrets

pytest_plugins = ("api_fixtures",)

ONE, TWO, THREE = (Ed25519PrivateKey.generate() for _ in range(3))


def key_set() -> KeySet:
    return KeySet(
        ONE.public_key(), (Handover.sign(ONE, TWO.public_key(), 10), Handover.sign(TWO, THREE.public_key(), 20))
    )


def test_each_size_has_one_key() -> None:
    found = key_set()
    for size, key in ((1, ONE), (10, ONE), (11, TWO), (20, TWO), (21, THREE), (10**9, THREE)):
        assert keyid(found.for_size(size)) == keyid(key)
    assert keyid(found.newest) == keyid(THREE)
    second = found.find(keyid(TWO))
    assert second is not None
    assert keyid(second) == keyid(TWO)
    assert found.find("0" * 64) is None


def test_a_set_survives_its_file_and_begins_where_one_trusts() -> None:
    found = read_key_set(json.dumps(key_set().to_json()).encode())
    assert [keyid(key) for key in found.keys] == [keyid(ONE), keyid(TWO), keyid(THREE)]
    later = found.trusted_from(TWO.public_key())
    assert [keyid(key) for key in later.keys] == [keyid(TWO), keyid(THREE)]
    with pytest.raises(KeyFileError, match="none of this set"):
        found.trusted_from(Ed25519PrivateKey.generate().public_key())
    assert read_key_set(public_pem(ONE)) == KeySet(read_key_set(public_pem(ONE)).first)


def forged(value: dict[str, Any]) -> None:
    value["handovers"][0]["new"] = public_pem(THREE).decode()


def earlier(value: dict[str, Any]) -> None:
    value["handovers"][0]["size"] = 5


def skipped(value: dict[str, Any]) -> None:
    del value["handovers"][0]


def exchanged(value: dict[str, Any]) -> None:
    value["handovers"].reverse()


@pytest.mark.parametrize("edit", [forged, earlier, skipped, exchanged])
def test_a_set_that_was_changed_is_none(edit: Any) -> None:
    value = key_set().to_json()
    edit(value)
    with pytest.raises(KeyFileError, match=r"handover [12] is not"):
        read_key_set(json.dumps(value).encode())


def test_handovers_do_not_go_back() -> None:
    with pytest.raises(KeyFileError, match="goes back"):
        KeySet(ONE.public_key(), (Handover.sign(ONE, TWO.public_key(), 10), Handover.sign(TWO, THREE.public_key(), 9)))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"first": 1, "handovers": []}', b"-----BEGIN"])
def test_what_is_no_set_says_so(data: bytes) -> None:
    with pytest.raises(KeyFileError):
        read_key_set(data)


@pytest.fixture
def ledger(database: Database, tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(database, tmp_path) as found:
        yield found


@pytest.mark.integration
def test_what_the_old_key_signed_stays_good_and_it_signs_nothing_more(ledger: Ledger) -> None:
    ledger.run(3)
    first, old = ledger.checkpoint, load_signing_key(ledger.settings.keys_dir / "signing.pem")
    handover = rotate_key(ledger.pool, ledger.settings.keys_dir)
    assert handover.size == 3
    ledger.run(2)
    keys = load_key_set(ledger.settings.keys_dir)
    report = check(fetcher(ledger.files), keys, old=first)
    assert (report.head.size, report.since) == (6, read_head(first))  # the event of the change is a leaf, too
    with pytest.raises(TreeHeadError):
        check(fetcher(ledger.files), old.public_key())
    (event,) = ledger.rows("SELECT body FROM event_pending WHERE kind = 'key.rotated'")
    assert (event[0]["old"], event[0]["new"]) == (keyid(old), keyid(keys.newest))
    stolen = sign_head(read_head(ledger.checkpoint), old)  # by who kept the old key
    with pytest.raises(TreeHeadError):
        open_head(stolen, keys)
    again = rotate_key(ledger.pool, ledger.settings.keys_dir)
    ledger.run(1)
    keys = load_key_set(ledger.settings.keys_dir)
    assert again.size == 6
    assert len(keys.keys) == 3
    for path in ("signing.pem", "keys.json"):
        assert (ledger.settings.keys_dir / path).stat().st_mode & 0o077 == 0
    assert not (ledger.settings.keys_dir / "signing.pem.next").exists()
    assert check(fetcher(ledger.files), keys.trusted_from(old.public_key()), old=first).head.size == 8


@pytest.mark.integration
@pytest.mark.parametrize("place", range(1, 6))
def test_a_change_that_dies_is_ended_by_the_next(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """At each write of a file, and before the transaction commits."""
    ledger.run(3)
    real, calls = commands._write, list[Path]()

    def dies(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == place:
            raise KeyboardInterrupt
        real(path, content)
        if place > 4 and len(calls) == 4:
            raise KeyboardInterrupt  # all is written, and nothing is recorded

    monkeypatch.setattr(commands, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        rotate_key(ledger.pool, ledger.settings.keys_dir)
    monkeypatch.setattr(commands, "_write", real)
    ledger.run(2)  # with whichever key is in place
    rotate_key(ledger.pool, ledger.settings.keys_dir)
    keys = load_key_set(ledger.settings.keys_dir)
    assert len(keys.keys) == 2
    assert ledger.row("SELECT count(*) FROM event_pending WHERE kind = 'key.rotated'") == (1,)
    ledger.run(1)
    assert check(fetcher(ledger.files), keys).head.size == 7
    for (note,) in ledger.rows("SELECT note FROM tree_head ORDER BY size"):
        open_head(note, keys)


@pytest.mark.integration
def test_no_tree_head_is_signed_beside_a_change(ledger: Ledger) -> None:
    """While one program numbers and signs, the key is changed again and again: every head is of its size's key."""
    heads: list[str] = []

    def sign() -> None:
        for _ in range(40):
            ledger.run(1)
            heads.append(ledger.checkpoint)

    def change() -> None:
        for _ in range(5):
            rotate_key(ledger.pool, ledger.settings.keys_dir)

    with threads(sign, change):
        pass
    ledger.run()
    keys = load_key_set(ledger.settings.keys_dir)
    assert len(keys.keys) == 6
    for (note,) in ledger.rows("SELECT note FROM tree_head ORDER BY size"):
        open_head(note, keys)
    assert check(fetcher(ledger.files), keys).head.size == 45


@pytest.mark.integration
def test_a_set_that_does_not_end_with_the_key_that_signs_stops(ledger: Ledger) -> None:
    ledger.run(1)
    before = (ledger.settings.keys_dir / "signing.pem").read_bytes()
    rotate_key(ledger.pool, ledger.settings.keys_dir)
    (ledger.settings.keys_dir / "signing.pem").write_bytes(before)
    with pytest.raises(KeyFileError, match=r"does not end with signing\.pem"):
        load_key_set(ledger.settings.keys_dir)


@pytest.mark.integration
def test_the_command_line_checks_the_ledger_under_the_set(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.run(3)
    trusted = tmp_path / "trusted.pub"
    trusted.write_bytes((ledger.settings.keys_dir / "signing.pub").read_bytes())
    rotate_key(ledger.pool, ledger.settings.keys_dir)
    ledger.run(1)
    keys = str(ledger.settings.keys_dir / "keys.json")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expunge", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    code, out, _ = run("ledger", "verify", str(ledger.files), "--key", keys)
    assert (code, "signed root" in out) == (0, True)
    assert run("ledger", "verify", str(ledger.files), "--key", str(trusted))[0] == 1
    code, out, _ = run("keys", "show", keys, "--trusted", str(trusted))
    assert (code, "from tree size 4 on" in out) == (0, True)
    other = tmp_path / "other.pub"
    other.write_bytes(public_pem(ONE))
    code, _, err = run("keys", "show", keys, "--trusted", str(other))
    assert (code, "none of this set" in err) == (1, True)


@pytest.mark.integration
def test_whoever_was_hashed_with_an_older_pepper_is_found_by_it(api: Api, run: Run, tmp_path: Path) -> None:
    """The pepper is changed, and the API started again: nobody becomes a stranger, and no data moves."""
    api.dataset()
    api.model()
    assert api.upload([line(1, "ann@example.org")]).status_code == 201
    before = api.scalar("SELECT array_agg((type, digest, subject_id)) FROM subject_alias")
    (tmp_path / "state" / "keys" / "pepper").write_bytes((api.settings.keys_dir / "pepper").read_bytes())
    assert run("keys", "pepper")[0] == 0
    (api.settings.keys_dir / "pepper").write_bytes((tmp_path / "state" / "keys" / "pepper").read_bytes())
    assert (tmp_path / "state" / "keys" / "pepper").stat().st_mode & 0o077 == 0
    with serving(api.settings) as url, httpx.Client(base_url=url, headers=api.client.headers, timeout=30) as client:
        body = ndjson([line(2, "ann@example.org"), line(3, "bob@example.org")])
        assert client.post("/v1/datasets/reviews/records", content=body).status_code == 201
        assert api.scalar("SELECT count(*) FROM subject") == 2
        assert api.scalar("SELECT count(DISTINCT owner_id) FROM record WHERE owner_id IN (SELECT subject_id FROM"
                          " subject_alias)") == 2  # fmt: skip
        for name in ("ann", "bob"):
            subject = {"subject": {"type": "email", "value": f"{name}@example.org"}}
            assert client.post("/v1/deletion-requests", json=subject).status_code == 202
            (shown,) = client.post("/v1/deletion-requests:preview", json=subject).json()["models"]
            assert shown["records"] == (2 if name == "ann" else 1)
            hold = client.post("/v1/holds", json={**subject, "reason_code": "x"})
            assert hold.json()["records"] == (2 if name == "ann" else 1)
    assert api.scalar("SELECT count(*) FROM deletion_request WHERE subject_id IS NOT NULL") == 2
    assert set(before) < set(api.scalar("SELECT array_agg((type, digest, subject_id)) FROM subject_alias"))
    (api.settings.keys_dir / "pepper").write_text("00" * 32)  # not the one that it was made with
    with (
        psycopg.connect(api.settings.database_url) as connection,
        pytest.raises(SecretsError, match="pepper is not the one"),
    ):
        check_secrets(connection, read_secrets(api.settings.keys_dir))
