"""Files of a directory behind a few verbs: written whole or not at all, and on disk when the verb returns."""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4


class Directory:
    """Immutable files below one directory, named by relative paths (rule 24)."""

    def __init__(self, root: Path) -> None:
        """Files lie below `root`, which is created with mode 0700."""
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, name: str, data: bytes) -> None:
        """Write a new file of mode 0600: aside, fsync, link, fsync the directory.

        Raises:
            FileExistsError: the name is taken.
            OSError: the disk is full; nothing stays behind.
        """
        path = self.path(name)
        self._make(path.parent)
        aside = path.with_name(f".{path.name}.{uuid4().hex}.part")
        try:
            _write(aside, data)
            os.link(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        fsync_directory(path.parent)

    def replace(self, name: str, data: bytes, *, expected: bytes | None) -> None:
        """Put `data` in the place of `expected` (None: of nothing) in one step.

        Raises:
            FileExistsError: something else lies there.
        """
        path = self.path(name)
        self._make(path.parent)
        replace_file(path, data, expected=expected)

    def get(self, name: str) -> bytes:
        """The file's bytes, read into memory: a mapped file would outlive its deletion (rule 24).

        Raises:
            FileNotFoundError: no such file.
        """
        return self.path(name).read_bytes()

    def delete(self, name: str) -> None:
        """Remove the file; one that is already gone is a success. What an interrupted `put` of it left goes, too."""
        path = self.path(name)
        for found in (path, *self.unfinished(name)):
            found.unlink(missing_ok=True)
        if path.parent.is_dir():
            fsync_directory(path.parent)

    def exists(self, name: str) -> bool:
        """Whether the file is there now."""
        return self.path(name).exists()

    def names(self, *, older_than: float) -> list[str]:
        """Every file, unfinished ones included, last touched more than `older_than` seconds ago."""
        limit = time.time() - older_than
        found: list[str] = []
        for path in self.root.rglob("*"):
            with suppress(FileNotFoundError):  # what goes while it is looked at, such as partial tiles, is gone
                if path.is_file() and path.stat().st_mtime < limit:
                    found.append(str(path.relative_to(self.root)))
        return sorted(found)

    def names_below(self, prefix: str) -> list[str]:
        """Every finished file whose name begins with a directory."""
        files = (path for path in self.path(prefix).rglob("*") if path.is_file() and not path.name.startswith("."))
        return sorted(str(path.relative_to(self.root)) for path in files)

    def unfinished(self, name: str) -> list[Path]:
        """What interrupted `put`s of the name left."""
        path = self.path(name)
        return list(path.parent.glob(f".{path.name}.*.part"))

    def path(self, name: str) -> Path:
        """Where a file lies.

        Raises:
            ValueError: outside.
        """
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError("a file's name may not leave its directory")
        return path

    def _make(self, directory: Path) -> None:
        """Make the directory and those above it; each entry is on disk before a file depends on it."""
        if directory.is_dir():
            return
        self._make(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
        fsync_directory(directory.parent)


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
        _write(aside, data)
        aside.rename(path)
        os.fsync(directory)
    finally:
        os.close(directory)
        aside.unlink(missing_ok=True)


def fsync_directory(directory: Path) -> None:
    """Make the directory's entries durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
