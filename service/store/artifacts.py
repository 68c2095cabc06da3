"""The artefact store: named immutable objects behind four verbs, here a local directory.

Rows in `artifact` say what may be opened; this module only moves bytes. Names are never reused (rule 18).
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlparse
from uuid import uuid4


class ArtifactMissingError(Exception):
    """There is no object of that name."""


class LocalArtifacts:
    """Objects as files below one directory, written so that a crash leaves all or nothing (rule 24)."""

    def __init__(self, root: Path) -> None:
        """Objects lie below `root`, which is created with mode 0700."""
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, name: str, data: bytes) -> None:
        """Store `data` under a new name: write aside, fsync, link, fsync the directory.

        Raises:
            FileExistsError: the name is taken; names are never reused.
            OSError: the disk is full; nothing stays behind.
        """
        path = self._path(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{uuid4().hex}.part")
        try:
            with aside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        _fsync(path.parent)

    def replace(self, name: str, data: bytes, *, expected: bytes | None) -> None:
        """Put `data` in the place of `expected` (None: of nothing) in one step: for the ledger's checkpoint alone.

        Raises:
            FileExistsError: something else lies there (rule 16: a put under a condition).
        """
        path = self._path(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, data, expected=expected)

    def get(self, name: str) -> bytes:
        """The object's bytes, read into memory: a mapped file would outlive its deletion (rule 24).

        Raises:
            ArtifactMissingError: no such object.
        """
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            raise ArtifactMissingError(name) from None

    def delete(self, name: str) -> None:
        """Remove the object; one that is already gone is a success. What an interrupted `put` of it left goes, too."""
        path = self._path(name)
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            for left in path.parent.glob(f".{path.name}.*.part"):
                left.unlink(missing_ok=True)
            _fsync(path.parent)

    def exists(self, name: str) -> bool:
        """Whether the object is there now."""
        return self._path(name).exists()

    def names(self, *, older_than: float) -> list[str]:
        """Every object, unfinished writes included, last touched more than `older_than` seconds ago."""
        limit = time.time() - older_than
        found: list[str] = []
        for path in self.root.rglob("*"):
            with suppress(FileNotFoundError):  # what goes while it is looked at, such as partial tiles, is gone
                if path.is_file() and path.stat().st_mtime < limit:
                    found.append(str(path.relative_to(self.root)))
        return sorted(found)

    def names_below(self, prefix: str) -> list[str]:
        """Every finished object whose name begins with a directory."""
        files = (path for path in self._path(prefix).rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(str(path.relative_to(self.root)) for path in files)

    def _path(self, name: str) -> Path:
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError("an object name may not leave the store")
        return path


def replace_file(path: Path, data: bytes, *, expected: bytes | None) -> None:
    """Put `data` in the place of `expected` (None: of nothing) in one step, whole or not at all.

    Raises:
        FileExistsError: something else lies there.
    """
    aside = path.with_name(f".{path.name}.{uuid4().hex}.part")
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        if (path.read_bytes() if path.exists() else None) != expected:
            raise FileExistsError(f"{path.name} was replaced by another writer")
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        os.fsync(directory)
    finally:
        os.close(directory)
        aside.unlink(missing_ok=True)


def open_artifacts(url: str) -> LocalArtifacts:
    """The store that a `file:///directory` URL names.

    Raises:
        ValueError: another scheme.
    """
    parsed = urlparse(url)
    if parsed.scheme != "file" or not parsed.path:
        raise ValueError(f"EXPUNGE_ARTIFACT_URL must be file:///directory, not {parsed.scheme or 'empty'}")
    return LocalArtifacts(Path(unquote(parsed.path)))


def _fsync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
