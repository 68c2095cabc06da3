"""Looks for a text in every store and file, in every form; says where, and never what."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from redis import RedisError

from service.doctor.formats import LIMIT_BYTES, TooDeepError, parts
from service.doctor.forms import Form, Forms
from service.doctor.sites import Sites
from service.doctor.stores import database_pieces, object_pieces, redis_pieces
from service.domain.errors import ExpungeError
from service.store import tables
from service.store.artifacts import OPENINGS, open_artifacts
from service.store.directory import Directory
from service.store.secrets import Secrets
from service.store.tables import TableError
from shards.partition import dataset_key, record_id_of

BLOCK_BYTES = 2**26
TYPES = ("email", "user", "user_id", "phone", "customer_id")
"""Types of identifiers that are tried besides those that the database knows."""
KEPT_IN = frozenset({"postgres", "postgres files"})
"""Where keyed hashes may stay on purpose, besides the ledger's openings; anywhere else they are found."""


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """A place where the text lies."""

    store: str
    place: str
    form: str


@dataclass(slots=True)
class Report:
    """What a search came to."""

    found: set[Finding] = field(default_factory=set)
    kept: set[Finding] = field(default_factory=set)
    """Keyed hashes that stay so that the person is not trained on again, or the record never comes back."""
    unsearched: set[tuple[str, str]] = field(default_factory=set)
    """Store and place that could not be looked through."""
    pieces: dict[str, int] = field(default_factory=dict)
    """How much was looked at, by store."""


OnBytes = Callable[[str, int], None]
"""Called with a store and how many bytes of it were just looked through."""


def total_bytes(sites: Sites) -> int:
    """About how much there is to look through, for a bar; what cannot be read counts nothing."""
    size = 0
    with suppress(TableError), tables.reading(sites.database_url) as connection:
        size += tables.get_bytes(connection)
    with suppress(ExpungeError, ValueError, OSError):
        files = open_artifacts(sites.artifact_url, sites.file_keys_url).files
        size += _size(files.root) if isinstance(files, Directory) else 0
    return size + sum(_size(directory) for _, directory in sites.directories)


def _size(directory: Path) -> int:
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                size += Path(folder, name).lstat().st_size
    return size


class Search:
    """One text, all places."""

    def __init__(self, sites: Sites, text: str, secrets: Secrets | None, on_bytes: OnBytes) -> None:
        """Without `secrets` hashes under the installation's keys are not among the forms.

        Raises:
            ValueError: the text is too short to mean anything.
        """
        self._sites = sites
        self._on_bytes = on_bytes
        self._report = Report()
        aliases, records = self._hashes(text, secrets) if secrets else ([], [])
        self._kept = self._is_kept([digest for _, digest in aliases], [UUID(bytes=each) for _, each in records])
        self.forms = Forms(text, [*aliases, *records])

    def run(self) -> Report:
        """Look everywhere."""
        self._look("postgres", lambda: database_pieces(self._sites.database_url, self._skip), self._sites.database_url)
        self._look("valkey", lambda: redis_pieces(self._sites.redis_url), self._sites.redis_url)
        self._look("artifacts", self._objects, self._sites.artifact_url)
        for store, directory in self._sites.directories:
            self._files(f"{store} files" if store in {"postgres", "valkey"} else store, directory)
        return self._report

    def _look(self, store: str, pieces: Callable[[], Iterable[tuple[str, bytes]]], url: str) -> None:
        if not url:
            self._report.unsearched.add((store, "its URL is not known here: set it, or name a --state directory"))
            return
        try:
            for place, data in pieces():
                self._take(store, place, self.forms.within(data), len(data))
        except (TableError, TooDeepError, ExpungeError, RedisError, ValueError, OSError) as error:
            self._report.unsearched.add((store, f"cannot be read ({type(error).__name__}): see `expunge doctor`"))

    def _objects(self) -> Iterator[tuple[str, bytes]]:
        artifacts = open_artifacts(self._sites.artifact_url, self._sites.file_keys_url)
        return object_pieces(artifacts, lambda place: self._skip("artifacts", place))

    def _files(self, store: str, directory: Path) -> None:
        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                self._skip(store, str(error.filename))

        paths = [directory]
        if directory.is_dir():
            paths = [Path(folder, name) for folder, _, names in os.walk(directory, onerror=fail) for name in names]
        for path in sorted(paths):
            shown = self._shown(store, path)
            if not path.is_file() or path.is_symlink():  # sockets; what a link names is its own place
                continue
            try:
                self._file(store, shown, path)
            except FileNotFoundError:
                continue  # gone while it was looked for
            except (OSError, TooDeepError):
                self._skip(store, shown)

    def _file(self, store: str, shown: str, path: Path) -> None:
        size = path.stat().st_size
        if size <= BLOCK_BYTES:
            for part, data in parts(path.read_bytes()):
                self._take(store, f"{shown} {part}".strip(), self.forms.within(data), 0)
        else:
            with path.open("rb") as file:
                blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
                self._take(store, shown, self.forms.within_pieces(blocks), 0)
            if size <= LIMIT_BYTES:
                for part, data in parts(path.read_bytes()):
                    if part:
                        self._take(store, f"{shown} {part}", self.forms.within(data), 0)
        self._take(store, shown, [], size)

    def _shown(self, store: str, path: Path) -> str:
        """The path, without the part that is the text itself."""
        hits = self.forms.within(os.fsencode(path))
        if hits:
            path = next((above for above in path.parents if not self.forms.within(os.fsencode(above))), Path())
            self._take(store, f"the name of a file below {path}", hits, 0)
            return f"a file below {path}"
        return str(path)

    def _take(self, store: str, place: str, hits: Iterable[Form], size: int) -> None:
        for form in hits:
            kept = form.keyed and self._kept and (store in KEPT_IN or place.startswith(OPENINGS))
            (self._report.kept if kept else self._report.found).add(Finding(store, place, form.name))
        self._report.pieces[store] = self._report.pieces.get(store, 0) + size
        self._on_bytes(store, size)

    def _skip(self, store: str, place: str) -> None:
        self._report.unsearched.add((store, place))

    def _hashes(self, text: str, secrets: Secrets) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
        """The text as an identifier's alias of each type, and as a caller's record id in each dataset."""
        types, datasets = set(TYPES), list[UUID]()
        with suppress(TableError), tables.reading(self._sites.database_url) as connection:
            types |= set(tables.list_types(connection))
            datasets = tables.list_dataset_ids(connection)
        aliases = [
            (f"alias of type {kind}", digest) for kind in sorted(types) for digest in secrets.alias(kind, text).digests
        ]
        ids = [record_id_of(dataset_key(secrets.partition, each), text.strip()).bytes for each in datasets]
        return aliases, [("record id", each) for each in ids]

    def _is_kept(self, digests: list[bytes], record_ids: list[UUID]) -> bool:
        with suppress(TableError), tables.reading(self._sites.database_url) as connection:
            return tables.is_kept(connection, digests, record_ids)
        return False
