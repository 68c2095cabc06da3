"""The signing key lies elsewhere: what it signs is the same, and while it is away nothing but signing waits."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from conftest import Database
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ecdsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from ledger_kit import Ledger, fetcher, open_ledger
from test_certificate_real import age, checked, deleted, failures, said, stored, sweep
from typer.testing import CliRunner
from vault_server import TOKEN, Vault, pem_of, unsealed
from world_copies import Copy

from service.cli import keys as commands
from service.cli.keys import rotate_key
from service.cli.output import CommandError
from service.evidence.keys import (
    KeyFileError,
    held_pem,
    keyid,
    load_key_set,
    load_signing_key,
    private_pem,
    public_pem,
)
from service.evidence.ledger_check import check
from service.evidence.signers import HeldKey, SignerAwayError, prove
from service.evidence.tree_head import TreeHead, open_head, read_head, sign_head
from service.standalone.errors import StandaloneError
from service.standalone.state import ensure_secrets, write_private
from workers import steps
from workers.barrier import Barrier
from workers.loops import every
from workers.supplements import Supplements

pytest_plugins = ("world_fixtures",)

KEY, OTHER = (Ed25519PrivateKey.generate() for _ in range(2))
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def vault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vault]:
    """Our programs find it by the environment."""
    with unsealed() as (found, address):
        monkeypatch.setenv("VAULT_ADDR", address)
        monkeypatch.setenv("VAULT_TOKEN", TOKEN)
        yield found


@pytest.fixture
def file_key(tmp_path: Path) -> HeldKey:
    """In a file that securesystemslib's own signer reads."""
    write_private(tmp_path / "elsewhere.pem", private_pem(KEY))
    return HeldKey(f"file2:{tmp_path}/elsewhere.pem", KEY.public_key())


def test_it_signs_as_the_key_itself(file_key: HeldKey, vault: Vault) -> None:
    head = TreeHead("log.example/one", 7, bytes(32))
    for key in (file_key, vault.hold(KEY)):
        assert sign_head(head, key) == sign_head(head, KEY)
        assert (keyid(key), public_pem(key)) == (keyid(KEY), public_pem(KEY))
        prove(key)


def test_the_file_names_it_and_nothing_is_asked(tmp_path: Path, vault: Vault) -> None:
    held = vault.hold()
    path = tmp_path / "signing.pem"
    write_private(path, pem_of(held))
    assert load_signing_key(path) == held
    assert vault.signed == []
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="others may read or change"):
        load_signing_key(path)
    write_private(path, b"signer: hv:expunge/1\n")
    with pytest.raises(KeyFileError, match="not a public key"):
        load_signing_key(path)
    ecdsa = generate_ecdsa(SECP256R1()).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_private(path, b"signer: hv:expunge/1\n" + ecdsa)
    with pytest.raises(KeyFileError, match="not an Ed25519 public key"):
        load_signing_key(path)


@pytest.mark.parametrize(
    "uri", ["awskms:alias/x", "gcpkms:projects/x", "azurekms://x", "hsm:2", "gnupg:/x", "tkey:x", "x", ""]
)
def test_a_signer_without_ed25519_is_refused_as_the_file_is_read(tmp_path: Path, uri: str) -> None:
    write_private(tmp_path / "signing.pem", held_pem(uri, KEY.public_key()))
    with pytest.raises(KeyFileError, match=r"signs Ed25519, which tree heads need: name a key in Vault \(hv:"):
        load_signing_key(tmp_path / "signing.pem")


@pytest.mark.parametrize("uri", ["hv:expunge", "hv:expunge/newest", "hv:a/b/c"])
def test_a_name_that_no_signer_reads_says_how_it_is_written(uri: str) -> None:
    with pytest.raises(KeyFileError, match="hv:NAME/VERSION"):
        prove(HeldKey(uri, KEY.public_key()))


def test_without_the_library_the_message_says_what_to_install(
    file_key: HeldKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "securesystemslib.signer", None)
    with pytest.raises(KeyFileError, match=r"expunge\[kms\]"):
        prove(file_key)


def test_another_key_than_the_declared_one_signs_nothing(file_key: HeldKey, vault: Vault) -> None:
    for key in (file_key, vault.hold(KEY)):
        with pytest.raises(KeyFileError, match="holds another key"):
            HeldKey(key.uri, OTHER.public_key()).sign(b"x")


def test_a_service_that_does_not_answer_is_away(
    file_key: HeldKey, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = vault.hold()
    vault.refusals = [503, 403, 404]
    for name in ("VaultDown", "Forbidden", "InvalidPath"):
        with pytest.raises(SignerAwayError, match=name):
            held.sign(b"x")
    assert vault.signed == []
    held.sign(b"x")
    monkeypatch.setenv("VAULT_TOKEN", "of somebody else")
    with pytest.raises(SignerAwayError, match="check its address, its token") as found:
        held.sign(b"x")
    assert "somebody" not in str(found.value)
    monkeypatch.setenv("VAULT_ADDR", NOWHERE)
    with pytest.raises(SignerAwayError, match="ConnectionError"):
        held.sign(b"x")
    Path(file_key.uri.removeprefix("file2:")).unlink()
    with pytest.raises(SignerAwayError, match="FileNotFoundError"):
        file_key.sign(b"x")


def test_a_start_refuses_another_key_and_does_not_wait_for_one_that_is_away(tmp_path: Path, vault: Vault) -> None:
    keys = tmp_path / "keys"
    ensure_secrets(keys, may_create=True)
    held = vault.hold()
    write_private(keys / "signing.pem", pem_of(held))
    vault.refusals = [503]
    ensure_secrets(keys, may_create=False)
    assert (keys / "signing.pub").read_bytes() == public_pem(held)
    write_private(keys / "signing.pem", held_pem(held.uri, OTHER.public_key()))
    with pytest.raises(StandaloneError, match="holds another key"):
        ensure_secrets(keys, may_create=False)
    assert (keys / "signing.pub").read_bytes() == public_pem(held)


# Tree heads


@pytest.fixture
def ledger(database: Database, tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(database, tmp_path) as found:
        yield found


def own_key(directory: Path) -> Ed25519PrivateKey:
    key = load_signing_key(directory / "signing.pem")
    assert isinstance(key, Ed25519PrivateKey)
    return key


def no_transaction(url: str) -> None:
    """While a signature is waited for, no transaction of ours is open and nothing is locked."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND xact_start IS NOT NULL AND backend_type = 'client backend'"
    )
    with psycopg.connect(url) as connection:
        (others,) = connection.execute(f"{query} AND pid <> pg_backend_pid()").fetchone() or (None,)
        (locks,) = connection.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() or (None,)
    opened.append((others, locks))


opened: list[tuple[int | None, int | None]] = []


@pytest.mark.integration
def test_tree_heads_are_signed_outside_of_transactions(ledger: Ledger, vault: Vault) -> None:
    held = vault.hold(own_key(ledger.settings.keys_dir))
    write_private(ledger.settings.keys_dir / "signing.pem", pem_of(held))
    opened.clear()
    vault.meanwhile = [lambda: no_transaction(ledger.database.owner_url)]
    ledger.run(300)
    assert opened == [(0, 0)]
    assert ledger.check().head.size == 300
    ledger.sequencer.publish()
    ledger.restart()
    ledger.forget_files()
    (ledger.files / "checkpoint").unlink()
    (ledger.settings.keys_dir / "tree-head").unlink()
    ledger.sequencer.publish()
    assert ledger.check().head.size == 300
    assert len(vault.signed) == 1  # what was signed is kept
    ledger.run(1)
    ledger.require_whole(301)


@pytest.mark.integration
def test_while_the_key_is_away_events_are_numbered_and_nothing_is_lost(
    ledger: Ledger, vault: Vault, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loops as they run: the key answers now and then, and then not at all."""
    ledger.run(3)
    held = vault.hold(own_key(ledger.settings.keys_dir))
    write_private(ledger.settings.keys_dir / "signing.pem", pem_of(held))
    for turn in range(4):
        vault.refusals = [503] * turn
        ledger.append(2)
        for _ in range(turn):
            ledger.sequencer.look()
            with pytest.raises(SignerAwayError):
                ledger.sequencer.look_and_publish()
        ledger.sequencer.look()
        ledger.sequencer.look_and_publish()
        assert ledger.check().head.size == 5 + 2 * turn
    address = os.environ["VAULT_ADDR"]
    monkeypatch.setenv("VAULT_ADDR", NOWHERE)
    ledger.append(2)
    ledger.sequencer.look()
    stop = threading.Event()
    loop = threading.Thread(target=every, args=(stop, "ledger", 0.01, ledger.sequencer.look_and_publish))
    loop.start()
    try:
        wait_for(lambda: "SignerAwayError" in capsys.readouterr().out)
        assert ledger.row("SELECT size FROM ledger_head") == (13,)
        assert ledger.check().head.size == 11
        monkeypatch.setenv("VAULT_ADDR", address)
        wait_for(lambda: read_head(ledger.checkpoint).size == 13)
    finally:
        stop.set()
        loop.join()
    ledger.require_whole(13)


def wait_for(so: object) -> None:
    assert callable(so)
    pause = threading.Event()
    for _ in range(600):
        if so():
            return
        pause.wait(0.05)
    pytest.fail("never")


@pytest.mark.integration
def test_another_key_stops_signing_alone(ledger: Ledger, vault: Vault, capsys: pytest.CaptureFixture[str]) -> None:
    ledger.run(3)
    held = vault.hold(OTHER)
    write_private(ledger.settings.keys_dir / "signing.pem", held_pem(held.uri, ledger.key))
    ledger.append(2)
    ledger.sequencer.look()
    ledger.sequencer.look_and_publish()
    assert "holds another key" in capsys.readouterr().out
    assert ledger.row("SELECT size, (SELECT max(size) FROM tree_head) FROM ledger_head") == (5, 3)


# Changes


@pytest.mark.integration
def test_the_key_moves_to_a_service_within_it_and_back(ledger: Ledger, vault: Vault) -> None:
    keys_dir = ledger.settings.keys_dir
    ledger.run(3)
    first, trusted = ledger.checkpoint, ledger.key
    one, two = vault.hold(), vault.hold()
    opened.clear()
    ask = lambda: no_transaction(ledger.database.owner_url)  # noqa: E731
    for held in (one, two, None):
        vault.meanwhile = [ask, ask]
        handover = rotate_key(ledger.pool, keys_dir, held and pem_of(held))
        assert handover.old == keyid(trusted if held is one else one if held is two else two)
        assert (
            (keys_dir / "signing.pub").read_bytes()
            == handover.new
            == public_pem(load_signing_key(keys_dir / "signing.pem"))
        )
        vault.meanwhile = []
        ledger.run(2)
    assert set(opened) == {(0, 0)}
    assert load_key_set(keys_dir).keys[1:3] == (one.public, two.public)
    assert b"PRIVATE" in (keys_dir / "signing.pem").read_bytes()
    keys = load_key_set(keys_dir).trusted_from(trusted)
    assert check(fetcher(ledger.files), keys, old=first).head.size == 12
    for (note,) in ledger.rows("SELECT note FROM tree_head ORDER BY size"):
        open_head(note, keys)
    with pytest.raises(KeyFileError, match="has signed before"):
        rotate_key(ledger.pool, keys_dir, pem_of(one))


@pytest.mark.integration
def test_a_key_that_does_not_sign_is_not_changed_to_or_from(ledger: Ledger, vault: Vault) -> None:
    keys_dir = ledger.settings.keys_dir
    ledger.run(3)
    before = {path.name: path.read_bytes() for path in keys_dir.iterdir()}
    held = vault.hold()
    vault.refusals = [503]
    with pytest.raises(SignerAwayError):
        rotate_key(ledger.pool, keys_dir, pem_of(held))
    with pytest.raises(KeyFileError, match="holds another key"):
        rotate_key(ledger.pool, keys_dir, held_pem(held.uri, OTHER.public_key()))
    with pytest.raises(KeyFileError, match="signs Ed25519"):
        rotate_key(ledger.pool, keys_dir, held_pem("awskms:x", OTHER.public_key()))
    assert {path.name: path.read_bytes() for path in keys_dir.iterdir()} == before
    rotate_key(ledger.pool, keys_dir, pem_of(held))
    moved = {path.name: path.read_bytes() for path in keys_dir.iterdir()}
    vault.refusals = [503]
    with pytest.raises(SignerAwayError):
        rotate_key(ledger.pool, keys_dir)
    assert {path.name: path.read_bytes() for path in keys_dir.iterdir()} == moved
    assert ledger.row("SELECT count(*) FROM event_pending WHERE kind = 'key.rotated'") == (1,)


@pytest.mark.integration
def test_a_tree_head_that_is_signed_beside_a_change_is_signed_again(ledger: Ledger, vault: Vault) -> None:
    """The key is changed while the old one signs a head: that signature is nobody's."""
    keys_dir = ledger.settings.keys_dir
    ledger.run(3)
    rotate_key(ledger.pool, keys_dir, pem_of(vault.hold()))
    ledger.append(2)
    ledger.sequencer.sequence()
    vault.meanwhile = [lambda: void(rotate_key(ledger.pool, keys_dir))]
    ledger.sequencer.publish()
    keys = load_key_set(keys_dir)
    assert len(keys.keys) == 3
    assert keys.handovers[-1].size == 3
    assert keyid(keys.for_size(6)) == keyid(own_key(keys_dir))
    assert check(fetcher(ledger.files), keys).head.size >= 6
    for (note,) in ledger.rows("SELECT note FROM tree_head ORDER BY size"):
        open_head(note, keys)


@pytest.mark.integration
def test_a_change_beside_which_a_tree_head_is_signed_is_signed_again(ledger: Ledger, vault: Vault) -> None:
    """A head is published while the old key signs the handover: the handover is of that head's size."""
    keys_dir = ledger.settings.keys_dir
    held = vault.hold(own_key(keys_dir))
    write_private(keys_dir / "signing.pem", pem_of(held))
    ledger.run(3)
    vault.meanwhile = [lambda: ledger.run(4)]
    assert rotate_key(ledger.pool, keys_dir).size == 7
    ledger.run(1)
    for (note,) in ledger.rows("SELECT note FROM tree_head ORDER BY size"):
        open_head(note, load_key_set(keys_dir))


@pytest.mark.integration
@pytest.mark.parametrize("place", range(1, 6))
def test_a_change_to_a_service_that_dies_is_ended_by_the_next(
    ledger: Ledger, vault: Vault, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    keys_dir, held, calls = ledger.settings.keys_dir, vault.hold(), list[Path]()
    ledger.run(3)
    real = commands._write

    def dies(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == place:
            raise KeyboardInterrupt
        real(path, content)
        if place > 4 and len(calls) == 4:
            raise KeyboardInterrupt  # all is written, and nothing is recorded

    monkeypatch.setattr(commands, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        rotate_key(ledger.pool, keys_dir, pem_of(held))
    monkeypatch.setattr(commands, "_write", real)
    ledger.run(2)
    rotate_key(ledger.pool, keys_dir, pem_of(held))
    keys = load_key_set(keys_dir)
    assert [keyid(key) for key in keys.keys[1:]] == [keyid(held)]
    assert ledger.row("SELECT count(*) FROM event_pending WHERE kind = 'key.rotated'") == (1,)
    ledger.run(1)
    assert check(fetcher(ledger.files), keys).head.size == 7
    assert not (keys_dir / "signing.pem.next").exists()


def test_the_command_wants_both_halves_of_the_name(tmp_path: Path) -> None:
    found = CliRunner().invoke(commands.app, ["rotate", "--signer", "hv:expunge/1", "--state", str(tmp_path)])
    assert isinstance(found.exception, CommandError)
    assert "give --signer and --public together" in str(found.exception)


def void(_: object) -> None:
    """A call whose result nobody wants."""


# Certificates


@pytest.fixture
def elsewhere(world: Copy, vault: Vault) -> Iterator[Vault]:
    """The world's own key, moved into the service while the test runs: all copies share the directory."""
    path = world.context.settings.keys_dir / "signing.pem"
    own = path.read_bytes()
    write_private(path, pem_of(vault.hold(own_key(path.parent))))
    yield vault
    write_private(path, own)


@pytest.mark.integration
def test_certificates_and_supplements_hold(world: Copy, elsewhere: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    request_id = deleted(world)
    assert failures(world, request_id) == []
    assert any(data.startswith(b"DSSEv1 ") and len(data) > 4096 for data in elsewhere.signed)
    age(world, "2 minutes")
    sweep(world)
    address = os.environ["VAULT_ADDR"]
    world.log()
    monkeypatch.setenv("VAULT_ADDR", NOWHERE)
    with pytest.raises(SignerAwayError):
        Supplements(world.context).look()
    assert stored(world, request_id)[1] == []
    monkeypatch.setenv("VAULT_ADDR", address)
    opened.clear()
    elsewhere.meanwhile = [lambda: no_transaction(world.owner_url)]
    assert Supplements(world.context).look() == 1
    assert opened == [(0, 0)]
    assert failures(world, request_id) == []
    assert [check.name for check in checked(world, request_id) if check.name.startswith("supplement")]
    assert said(stored(world, request_id)[1][0])["number"] == 1


@pytest.mark.integration
def test_a_certificate_waits_for_the_key_and_uses_up_no_attempt(world: Copy, elsewhere: Vault) -> None:
    """A deletion is deactivated and erased while the key is away; its certificate is issued once it answers."""
    elsewhere.refusals = [503] * 30
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    Barrier(world.pool, margin=0.05).look()
    steps.erase_target(world.context, request_id, world.model_id)
    with pytest.raises(SignerAwayError):
        world.log()
    elsewhere.refusals = []
    world.log()  # its events are published, and then the key goes away again
    elsewhere.refusals = [503] * 20
    for _ in range(20):
        with pytest.raises(SignerAwayError):
            steps.certify_target(world.context, request_id, world.model_id)
    assert world.row("SELECT attempts, state FROM request_target WHERE request_id = %s", request_id) == (0, "erasing")
    opened.clear()
    elsewhere.meanwhile = [lambda: no_transaction(world.owner_url)] * 2
    assert steps.certify_target(world.context, request_id, world.model_id)
    assert opened == [(0, 0)] * 2
    assert failures(world, request_id) == []
