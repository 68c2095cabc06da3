"""The key store: one key per file, outside Postgres and the artefact store, so that one deletion kills all copies.

A key is 32 random bytes in a file named by the digest of the file's name. Destroying it makes every copy of the file
unreadable, wherever backups keep it. Whoever keeps copies of the keys undoes that: `EXPUNGE_FILE_KEY_BACKUP_DAYS`.
"""

import os
import secrets
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qs, unquote, urlparse
from uuid import uuid4

from service.domain.errors import ExpungeError
from service.store.directory import Directory
from service.store.sealing import KEY_BYTES
from shards.digest import sha256_hex

MARK = "store"
"""The file that names the key store: without it no key is ever believed to be absent."""


class FileKeysError(ExpungeError):
    """The key store is not there, is another installation's, or is open to other users."""


class Wrapping(Protocol):
    """Keeps the key store's files from telling keys to whoever copies them."""

    def wrap(self, name: str, key: bytes) -> bytes:
        """The key as it lies in its file."""
        ...

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        """The key again."""
        ...


class FileKeys:
    """Keys by the name of the file that each one opens."""

    def __init__(self, root: Path, wrapping: Wrapping | None = None) -> None:
        """Keys lie below `root`, a directory of mode 0700; without `wrapping` as they are.

        Raises:
            FileKeysError: it is not there, or others may read it.
        """
        self.root = root
        self._wrapping = wrapping
        self._check_mode()
        self._files = Directory(root)

    @property
    def mark(self) -> str | None:
        """What tells this key store from every other; None before `begin`."""
        try:
            return self._files.get(MARK).decode("ascii")
        except FileNotFoundError:
            return None

    def begin(self) -> str:
        """Give the key store its mark, unless it has one; returns it."""
        with suppress(FileExistsError):
            self._files.put(MARK, uuid4().hex.encode())
        return self._files.get(MARK).decode("ascii")

    def create(self, name: str) -> bytes:
        """The key of a file that is to be written; on disk before the file's first byte (rule 20).

        An interrupted write of the same name has left its key, which is taken again.

        Raises:
            FileExistsError: the name was used before, and its key destroyed.
            FileKeysError: the key store is not there.
        """
        self._check_there()
        key = secrets.token_bytes(KEY_BYTES)
        try:
            self._files.put(_place(name), self._wrapping.wrap(name, key) if self._wrapping else key)
        except FileExistsError:
            left = self.get(name)
            if left is None:
                raise FileExistsError(f"the key of {name} was destroyed; names are never reused") from None
            return left
        return key

    def get(self, name: str) -> bytes | None:
        """The file's key; None if it was destroyed or never was.

        Raises:
            FileKeysError: the key store is not there, or others may read the key.
        """
        path = self._files.path(_place(name))
        try:
            # Permissions of the very file that is read: no other can be put in its place in between.
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                found = file.read()
        except FileNotFoundError:
            self._check_there()
            return None
        if stat.S_IMODE(mode) & 0o077:
            raise FileKeysError(f"others may read {path}: run `chmod 600 {path}`")
        if not found.strip(b"\0"):
            return None  # its destruction was interrupted
        return self._wrapping.unwrap(name, found) if self._wrapping else found

    def exists(self, name: str) -> bool:
        """Whether anything of the file's key is there."""
        self._check_there()
        return self._files.exists(_place(name)) or bool(self._files.unfinished(_place(name)))

    def destroy(self, name: str) -> None:
        """Overwrite and remove the file's key; one that is already gone is a success. There is no way back."""
        self._check_there()
        self._destroy(_place(name))

    def destroy_others(self, names: Collection[str], *, older_than: float) -> int:
        """Destroy every key older than that many seconds that belongs to none of `names`; returns how many."""
        known = {_place(name) for name in names} | {MARK}
        others = [place for place in self._files.names(older_than=older_than) if place not in known]
        for place in others:
            self._destroy(place)
        return len(others)

    def count(self) -> int:
        """How many keys there are."""
        return sum(1 for place in self._files.names_below("") if place != MARK)

    def _destroy(self, place: str) -> None:
        for path in (self._files.path(place), *self._files.unfinished(place)):
            with suppress(FileNotFoundError), path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
                file.truncate(0)  # so that it is never taken for a key again
        self._files.delete(place)

    def _check_there(self) -> None:
        """An unmounted key store looks empty: then nothing may be taken for erased or lost."""
        if not self._files.exists(MARK):
            raise FileKeysError(f"the key store {self.root} is not there: mount it, or restore it from your backup")

    def _check_mode(self) -> None:
        try:
            mode = self.root.stat().st_mode
        except OSError as error:
            raise FileKeysError(
                f"cannot use the key store {self.root} ({error.strerror}): make it with `mkdir -m 700 {self.root}`,"
                " mount it, or set EXPUNGE_FILE_KEYS_URL"
            ) from None
        if not stat.S_ISDIR(mode) or stat.S_IMODE(mode) & 0o077:
            raise FileKeysError(
                f"{self.root} is no directory of its owner alone (mode {stat.S_IMODE(mode):04o}):"
                f" run `chmod 700 {self.root}`"
            )


def open_file_keys(url: str) -> FileKeys:
    """The key store that a `file:///directory` URL names; with `?kms=KEY`, wrapped under that master key.

    Raises:
        ValueError: another scheme.
        FileKeysError: the directory is not there, or others may read it.
    """
    parsed = urlparse(url)
    if parsed.scheme != "file" or not parsed.path:
        raise ValueError(f"EXPUNGE_FILE_KEYS_URL must be file:///directory, not {parsed.scheme or 'empty'}")
    root = Path(unquote(parsed.path))
    master = parse_qs(parsed.query).get("kms")
    if master is None:
        return FileKeys(root)
    try:
        from service.store.key_wrapping import Kms  # noqa: PLC0415 - few installations have one
    except ModuleNotFoundError:
        raise FileKeysError("keys are wrapped by a key management service: pip install 'expunge[kms]'") from None
    return FileKeys(root, Kms(master[0]))


def _place(name: str) -> str:
    """Fanned out over 256 directories. A digest, so that names of any length and depth fit."""
    digest = sha256_hex(name.encode())
    return f"{digest[:2]}/{digest}"
