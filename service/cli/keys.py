"""`expunge keys`: change the key that signs. What the old one signed stays good, and no data moves."""

import base64
import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from service.cli.output import STATE, AsJson, CommandError, StateDir, show
from service.evidence.keys import (
    Handover,
    KeyFileError,
    KeySet,
    held_pem,
    keyid,
    load_public_key,
    load_signing_key,
    parse_signing_key,
    private_pem,
    read_key_set,
)
from service.evidence.signers import SigningKey, prove

if TYPE_CHECKING:
    from service.store.database import Pool

app = typer.Typer(name="keys", help="The keys that sign certificates and tree heads.")


@app.command("show")
def show_keys(
    keys: Annotated[Path, typer.Argument(help="The key set (keys.json), or a public key.")],
    trusted: Annotated[
        Path | None, typer.Option(help="A public key that you trust: only what it handed over to is shown.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a key set: each key was handed over to by the one before it. Exit code 0 only if it holds."""
    try:
        found = read_key_set(_read(keys))
        if trusted is not None:
            found = found.trusted_from(read_key_set(_read(trusted)).first)
    except KeyFileError as error:
        raise CommandError(f"the keys do NOT hold: {error}") from None
    lines = [f"{keyid(found.first)}  the first"]
    after = zip(found.keys[1:], found.handovers, strict=True)
    lines += [f"{keyid(key)}  from tree size {each.size + 1} on" for key, each in after]
    show(found.to_json(), lines, as_json=as_json)


@app.command("rotate")
def rotate(
    *,
    state: StateDir = STATE,
    signer: Annotated[
        str | None, typer.Option(help="Who holds the new key: hv:NAME/VERSION in Vault. Otherwise a file does.")
    ] = None,
    public: Annotated[Path | None, typer.Option(help="The public half (PEM) of the key that --signer holds.")] = None,
    as_json: AsJson = False,
) -> None:
    """Take a new signing key; the old one signs that it follows. One that lay in a file is destroyed.

    Give `keys.json` to whoever checks certificates: it leads from the key that they trust to the new one.
    """
    # Deferred: stores and migrations are a second that no other command waits for.
    from service.domain.errors import ExpungeError  # noqa: PLC0415
    from service.standalone.errors import StandaloneError  # noqa: PLC0415
    from service.standalone.offline import opened  # noqa: PLC0415
    from service.store.database import make_pool  # noqa: PLC0415
    from service.store.migrate import SchemaError  # noqa: PLC0415

    if (signer is None) != (public is None):
        raise CommandError("the key was not changed: give --signer and --public together")
    try:
        held = None if signer is None or public is None else held_pem(signer, load_public_key(_read(public)))
        with opened(state) as found, make_pool(found.settings.database_url, size=1) as pool:
            last = rotate_key(pool, found.settings.keys_dir, held)
    except (KeyFileError, StandaloneError, SchemaError, ExpungeError, OSError) as error:
        raise CommandError(f"the key was not changed: {error}") from None
    shown = {"old": last.old, "new": keyid(read_key_set(last.new).first), "size": last.size}
    show(shown, [f"{shown['new']} signs from tree size {last.size + 1} on; give keys.json away"], as_json=as_json)


@app.command("pepper")
def new_pepper(*, state: StateDir = STATE) -> None:
    """Put a new pepper in front: new subjects are hashed with it. Start the programs again afterwards.

    Those before it stay in the file: subjects that were hashed with one of them are found by it.
    """
    path = _keys_dir(state) / "pepper"
    known = _read(path).decode("ascii").strip()
    _write(path, f"{secrets.token_hex(32)}\n{known}\n".encode())
    print(f"{path} holds {len(known.splitlines()) + 1} peppers; start the programs again")


def _keys_dir(state: Path) -> Path:
    from service.settings import Settings  # noqa: PLC0415

    settings = Settings()
    return settings.keys_dir if "keys_dir" in settings.model_fields_set else state / "keys"


def rotate_key(pool: "Pool", keys_dir: Path, held: bytes | None = None) -> Handover:
    """Change the key under the lock of all signers. Dies anywhere: the next call ends what was begun.

    `held`: what `signing.pem` says of a key that lies elsewhere; otherwise a new one is made for the file. The old key
    signs ahead of the transaction, since it may lie behind a network, and again where a tree head was faster.

    Raises:
        KeyFileError: a key file cannot be used.
        SignerAwayError: the old key, or the new one, does not answer; nothing was changed.
    """
    from service.store import rotation  # noqa: PLC0415
    from service.store.database import transaction  # noqa: PLC0415

    content = held or private_pem(Ed25519PrivateKey.generate())
    prepared: KeySet | None = None
    while True:
        with transaction(pool) as connection:
            rotation.lock_signing(connection)
            size = rotation.signed_size(connection)
            handover = _begun(keys_dir)
            if handover is None and prepared is not None and _is_current(prepared.handovers[-1], keys_dir, size):
                handover = _replace(keys_dir, prepared, content)
            if handover is not None:
                rotation.record(
                    connection,
                    old=handover.old,
                    new=keyid(read_key_set(handover.new).first),
                    statement=base64.b64encode(handover.signature).decode(),
                )
                break
        prepared = _prepare(keys_dir, content, size)
    (keys_dir / "signing.pem.next").unlink(missing_ok=True)
    return handover


def _prepare(keys_dir: Path, content: bytes, size: int) -> KeySet:
    """The set that ends with the new key, which has shown that it signs; nothing is in place."""
    old, new = load_signing_key(keys_dir / "signing.pem"), parse_signing_key(content, keys_dir / "signing.pem.next")
    known = _known(keys_dir, old)
    if known.find(keyid(new)) is not None:
        raise KeyFileError("this key has signed before: a key that was handed over from is none to hand over to")
    prove(new)
    return KeySet(known.first, (*known.handovers, Handover.sign(old, new.public_key(), size)))


def _is_current(handover: Handover, keys_dir: Path, size: int) -> bool:
    """Whether its key signs still, and has signed no larger tree head since."""
    return handover.size == size and handover.old == keyid(load_signing_key(keys_dir / "signing.pem"))


def _replace(keys_dir: Path, grown: KeySet, content: bytes) -> Handover:
    """The new key beside the old, the set that ends with it, then its place; the copy stays until it is recorded."""
    _write(keys_dir / "signing.pem.next", content)
    _write(keys_dir / "keys.json", json.dumps(grown.to_json(), indent=1).encode())
    _write(keys_dir / "signing.pub", grown.handovers[-1].new)
    _write(keys_dir / "signing.pem", content)
    return grown.handovers[-1]


def _begun(keys_dir: Path) -> Handover | None:
    """The change that a call before this one made and did not record: the new key signs since.

    One that died earlier is made anew: the old key has gone on signing, and its last tree head may be a larger one.
    """
    if not (keys_dir / "signing.pem.next").exists():
        return None
    signing = load_signing_key(keys_dir / "signing.pem")
    found = _known(keys_dir, signing)
    return found.handovers[-1] if found.handovers and keyid(found.newest) == keyid(signing) else None


def _known(keys_dir: Path, old: SigningKey) -> KeySet:
    path = keys_dir / "keys.json"
    if not path.exists():
        return KeySet(old.public_key())
    found = read_key_set(path.read_bytes())
    keep = next((n for n, key in enumerate(found.keys) if keyid(key) == keyid(old)), None)
    if keep is None:
        raise KeyFileError(f"{path} does not know signing.pem: restore both from your backup")
    return KeySet(found.first, found.handovers[:keep])  # what a call that died wrote after it signed nothing


def _write(path: Path, content: bytes) -> None:
    from service.standalone.state import write_private  # noqa: PLC0415

    write_private(path, content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
