"""The artefact store: named immutable objects, each sealed under a key of its own that is kept elsewhere.

Rows in `artifact` say what may be opened; this module only moves bytes. Names are never reused (rule 18). What the
ledger publishes is not sealed: it holds no personal data, and others must be able to read it without us.
"""

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

from service.store.directory import Directory
from service.store.file_keys import FileKeys, FileKeysError, open_file_keys
from service.store.sealing import seal, unseal

LEDGER = "ledger/"
OPENINGS = LEDGER + "openings/"
KEY_STORE = "key-store"
"""The object that names the key store whose keys open all others."""


class ArtifactMissingError(Exception):
    """There is no object of that name, or its key is gone, which is the same."""


class Files(Protocol):
    """Where objects lie: a directory or a bucket."""

    def put(self, name: str, data: bytes) -> None:
        """Write a new one; `FileExistsError` where the name is taken."""

    def replace(self, name: str, data: bytes, *, expected: bytes | None) -> None:
        """Put one in the place of another in one step; `FileExistsError` where something else lies there."""

    def get(self, name: str) -> bytes:
        """Read one; `FileNotFoundError` where there is none."""
        ...

    def delete(self, name: str) -> None:
        """Remove one; what is gone is a success."""

    def exists(self, name: str) -> bool:
        """Whether it is there now."""
        ...

    def names(self, *, older_than: float) -> list[str]:
        """Those last written more than so many seconds ago, unfinished ones included."""
        ...

    def names_below(self, prefix: str) -> list[str]:
        """Those whose name begins with a directory."""
        ...


class Artifacts:
    """Objects and their keys: an object without its key is as good as none, and the other way round."""

    def __init__(self, files: Files, keys: FileKeys) -> None:
        """`keys` must be the key store that the objects were written with.

        Raises:
            FileKeysError: it is another one; every object would look lost.
        """
        self.files = files
        self._keys = keys
        self._pair()

    def put(self, name: str, data: bytes) -> None:
        """Seal `data` and store it under a new name: first the key, then the object (rule 20).

        Raises:
            FileExistsError: the name is taken; names are never reused.
            OSError: the store is not there, or full; of the object nothing stays behind.
        """
        self._check_there()
        self.files.put(name, data if is_public(name) else seal(self._keys.create(name), name, data))

    def replace(self, name: str, data: bytes, *, expected: bytes | None) -> None:
        """Put `data` in the place of `expected` (None: of nothing) in one step: for the ledger's checkpoint alone.

        Raises:
            FileExistsError: something else lies there (rule 16: a put under a condition).
        """
        if not is_public(name):
            raise ValueError(f"{name} is sealed, and sealed objects are never replaced")
        self._check_there()
        self.files.replace(name, data, expected=expected)

    def get(self, name: str) -> bytes:
        """The object's bytes, in memory only (rule 24).

        Raises:
            ArtifactMissingError: no such object, or its key is gone.
            ArtifactDigestError: it is damaged, or another one lies in its place.
            OSError: the store is not there.
            FileKeysError: the key store is not there.
        """
        try:
            data = self.files.get(name)
        except FileNotFoundError:
            self._check_there()
            raise ArtifactMissingError(name) from None
        if is_public(name):
            return data
        key = self._keys.get(name)
        if key is None:
            raise ArtifactMissingError(f"{name}: its key was destroyed or lost, so nobody can read it")
        return unseal(key, name, data)

    def delete(self, name: str) -> None:
        """Destroy the object's key, which makes copies unreadable, then the object; what is gone is a success."""
        if not is_public(name):
            self._keys.destroy(name)
        self.files.delete(name)

    def exists(self, name: str) -> bool:
        """Whether the object or its key is there now."""
        self._check_there()
        return self.files.exists(name) or (not is_public(name) and self._keys.exists(name))

    def opens(self, name: str) -> bool:
        """Whether the object's key is there, or it needs none."""
        return is_public(name) or self._keys.exists(name)

    def names(self, *, older_than: float) -> list[str]:
        """Every object, unfinished writes included, last touched more than `older_than` seconds ago."""
        self._check_there()
        return [name for name in self.files.names(older_than=older_than) if name != KEY_STORE]

    def names_below(self, prefix: str) -> list[str]:
        """Every finished object whose name begins with a directory."""
        self._check_there()
        return self.files.names_below(prefix)

    def destroy_stray_keys(self, known: Collection[str], *, older_than: float) -> int:
        """Destroy keys older than that which belong to no known name and no object; returns how many."""
        self._check_there()
        return self._keys.destroy_others({*known, *self.files.names(older_than=-60)}, older_than=older_than)

    def _pair(self) -> None:
        """Bind an artefact store to the key store that it was first opened with, and that to no other."""
        if not self.files.exists(KEY_STORE):
            used = self._keys.mark is not None and self._keys.count() > 0
            if used and not self.files.exists(KEY_STORE):  # looked for again: another program may just have begun both
                raise FileKeysError(
                    f"{self._keys.root} holds the keys of another artefact store, which would be destroyed as nobody's:"
                    " mount or restore the right artefact store (EXPUNGE_ARTIFACT_URL), or give a new one an empty key"
                    " store (EXPUNGE_FILE_KEYS_URL)"
                )
            with suppress(FileExistsError):  # another program was first
                self.files.put(KEY_STORE, self._keys.begin().encode())
        if self.files.get(KEY_STORE).decode("ascii") != self._keys.mark:
            raise FileKeysError(
                f"{self._keys.root} does not hold the keys of this artefact store: mount or restore the right key"
                " store, and check EXPUNGE_FILE_KEYS_URL; every object would look lost"
            )

    def _check_there(self) -> None:
        """An unmounted store looks empty: then nothing may be taken for erased or lost, and nothing written."""
        if not self.files.exists(KEY_STORE):
            raise OSError("the artefact store is not there: mount it, or restore it from your backup")


def is_public(name: str) -> bool:
    """Whether an object is one that the ledger publishes: tiles, entries, checkpoint. All others are sealed."""
    return name == KEY_STORE or (name.startswith(LEDGER) and not name.startswith(OPENINGS))


def open_artifacts(url: str, file_keys_url: str) -> Artifacts:
    """The store that a `file:///directory` or `s3://bucket/prefix` URL names, with its keys.

    Raises:
        ValueError: another scheme.
        FileKeysError: the key store is not there, is another store's, or is open to others.
        BucketError: the bucket keeps old versions, and nobody said for how long.
    """
    parsed = urlparse(url)
    if parsed.scheme == "s3" and parsed.netloc:
        from service.store.bucket import Bucket  # noqa: PLC0415 - few installations have one

        return Artifacts(Bucket(url), open_file_keys(file_keys_url))
    if parsed.scheme != "file" or not parsed.path:
        raise ValueError(
            f"EXPUNGE_ARTIFACT_URL must be file:///directory or s3://bucket/prefix, not {parsed.scheme or 'empty'}"
        )
    return Artifacts(Directory(Path(unquote(parsed.path))), open_file_keys(file_keys_url))
