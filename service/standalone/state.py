"""The state directory of `expunge up`: its layout, its lock and the secrets in it."""

import fcntl
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from service.evidence.keys import KeyFileError, load_signing_key, private_pem, public_pem
from service.evidence.signers import SignerAwayError, prove
from service.standalone.errors import StandaloneError

_SOCKET_DIRECTORY_BYTES = 80
"""A unix socket's path may have about 107 bytes; the file names in the directory take the rest."""


@dataclass(frozen=True, slots=True)
class State:
    """The directory's parts. Made by `hold`; each part exists, is the caller's and has mode 0700."""

    root: Path
    """Absolute, symbolic links resolved."""
    sockets: Path
    """Where the stores listen: `run`, or a directory of the temporary one where that path is too long."""

    @classmethod
    def found(cls, root: Path) -> Self:
        """The parts of a directory that `hold` made, without holding it."""
        root = root.expanduser().resolve()
        return cls(root, _sockets(root))

    @property
    def postgres(self) -> Path:
        """Postgres' data directory."""
        return self.root / "postgres"

    @property
    def valkey(self) -> Path:
        """Valkey's append-only file."""
        return self.root / "valkey"

    @property
    def artifacts(self) -> Path:
        """The artefact store."""
        return self.root / "artifacts"

    @property
    def file_keys(self) -> Path:
        """The key store: one key for each file of the artefact store."""
        return self.root / "file-keys"

    @property
    def keys(self) -> Path:
        """`signing.pem`, `signing.pub`, `pepper`, `partition`, `first-api-key`."""
        return self.root / "keys"

    @property
    def run(self) -> Path:
        """`up.json`, and the sockets where they fit."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        """One file a program."""
        return self.root / "logs"


@contextmanager
def hold(root: Path) -> Generator[State]:
    """Make or open a state directory and keep it for this process alone.

    Raises `StandaloneError` where another process holds it, where it belongs to another user, or where the
    directory has files but was not made by Expunge (its mode is never changed then).
    """
    root = root.expanduser().resolve()
    _adopt(root)
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(descriptor, root)
        root.chmod(0o700)  # not before: a running instance may need it wider
        state = State(root, _sockets(root))
        for part in (
            state.postgres,
            state.valkey,
            state.artifacts,
            state.file_keys,
            state.keys,
            state.run,
            state.logs,
        ):
            part.mkdir(mode=0o700, exist_ok=True)
        (state.run / "up.json").unlink(missing_ok=True)  # of a supervisor that was killed
        yield state
    finally:
        os.close(descriptor)


def ensure_secrets(keys: Path, *, may_create: bool) -> None:
    """Make the secrets that are missing: the signing key, the pepper, the partition key.

    `may_create` is false once there is data: aliases and cells were computed with these secrets, so a new one
    would silently part the data from its owners. `StandaloneError` then, and where the signing key is not its own.
    """
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    missing = [name for name in ("signing.pem", "pepper", "partition") if not (keys / name).exists()]
    if missing and not may_create:
        raise StandaloneError(
            f"{', '.join(missing)} missing in {keys}, but there is data that was made with it:"
            " restore the file from your backup (or begin anew with an empty state directory)"
        )
    for name in missing:
        made = private_pem(Ed25519PrivateKey.generate()) if name == "signing.pem" else secrets.token_hex(32).encode()
        write_private(keys / name, made)
    try:
        key = load_signing_key(keys / "signing.pem")
        with suppress(SignerAwayError):  # deletions do not wait for it; tree heads and certificates do
            prove(key)
    except KeyFileError as error:
        raise StandaloneError(str(error)) from None
    write_private(keys / "signing.pub", public_pem(key))


def write_private(path: Path, content: bytes) -> None:
    """Write a file of mode 0600, whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _adopt(root: Path) -> None:
    """Make the directory, or check that it is ours to use."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.geteuid():
            raise StandaloneError(f"{root} belongs to another user: choose another directory with --state")
        if not (root / "lock").exists() and any(root.iterdir()):
            raise StandaloneError(
                f"{root} has files but is no Expunge state directory: choose a new or empty one with --state"
            )
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise StandaloneError(f"cannot use {root} as state directory ({error}): choose one with --state") from error


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 20, 0).decode().strip() or "unknown"
        raise StandaloneError(
            f"{root} is in use by process {holder}: stop it (Ctrl-C there, or kill {holder}),"
            " or choose another directory with --state"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def _sockets(root: Path) -> Path:
    """The sockets' directory, the same one at each start."""
    inside = root / "run"
    if len(os.fsencode(inside)) <= _SOCKET_DIRECTORY_BYTES:
        return inside
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    outside = Path(tempfile.gettempdir()) / f"expunge-{digest}"
    if len(os.fsencode(outside)) > _SOCKET_DIRECTORY_BYTES:
        raise StandaloneError(f"{root} is too long a path for unix sockets: choose a shorter one with --state")
    outside.mkdir(mode=0o700, exist_ok=True)
    # Anybody may write to the temporary directory, so the name may have been taken before us.
    found = outside.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StandaloneError(f"{outside} is not ours: remove it, or choose a shorter --state directory")
    outside.chmod(0o700)
    return outside
