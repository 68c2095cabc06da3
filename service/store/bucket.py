"""Files of an S3 bucket behind the verbs of `Directory`: a put only creates, a delete must delete (rule 24)."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from service.domain.errors import ExpungeError


class BucketError(ExpungeError):
    """A bucket in which deleting does not delete."""


class Bucket:
    """Immutable objects below one prefix. Credentials and endpoint come from the AWS_* environment variables."""

    def __init__(self, url: str) -> None:
        """`s3://bucket/prefix`; `?version_days=N` is the operator's word that old versions are removed after N days.

        Raises:
            BucketError: there is none, or it keeps old versions, and nobody said for how long.
            OSError: it cannot be reached or written.
        """
        plain, _, declared = url.partition("?version_days=")
        with _as_os_errors():
            self._store = S3Store.from_url(plain)
        self._check_deletes(plain, declared=declared.isdecimal())

    def put(self, name: str, data: bytes) -> None:
        """Write a new object.

        Raises:
            FileExistsError: the name is taken.
            OSError: the bucket does not take it.
        """
        with _as_os_errors():
            obstore.put(self._store, name, data, mode="create")

    def replace(self, name: str, data: bytes, *, expected: bytes | None) -> None:
        """Put `data` in the place of `expected` (None: of nothing) in one step.

        Raises:
            FileExistsError: something else lies there.
        """
        if expected is None:
            self.put(name, data)
            return
        with _as_os_errors():
            found = obstore.get(self._store, name)
            if bytes(found.bytes()) != expected:
                raise FileExistsError(f"{name} was replaced by another writer")
            obstore.put(self._store, name, data, mode={"e_tag": found.meta["e_tag"]})

    def get(self, name: str) -> bytes:
        """The object's bytes.

        Raises:
            FileNotFoundError: no such object.
        """
        with _as_os_errors():
            return bytes(obstore.get(self._store, name).bytes())

    def delete(self, name: str) -> None:
        """Remove the object; one that is already gone is a success."""
        try:
            with _as_os_errors():
                obstore.delete(self._store, name)
        except FileNotFoundError:
            return

    def exists(self, name: str) -> bool:
        """Whether the object is there now."""
        try:
            with _as_os_errors():
                obstore.head(self._store, name)
        except FileNotFoundError:
            return False
        return True

    def names(self, *, older_than: float) -> list[str]:
        """Every object last written more than `older_than` seconds ago."""
        limit = time.time() - older_than
        return sorted(each["path"] for each in self._list(None) if each["last_modified"].timestamp() < limit)

    def names_below(self, prefix: str) -> list[str]:
        """Every object whose name begins with a directory."""
        return sorted(each["path"] for each in self._list(prefix))

    def _list(self, prefix: str | None) -> list[Any]:
        with _as_os_errors():
            return [each for page in obstore.list(self._store, prefix) for each in page]

    def _check_deletes(self, url: str, *, declared: bool) -> None:
        """A bucket that answers a write with a version keeps it after a delete, which only adds a marker.

        Object lock and replication need versioning, so this finds them, too.
        """
        probe = f"probe-{uuid4()}"
        try:
            with _as_os_errors():
                written = obstore.put(self._store, probe, b"")
        except FileNotFoundError:
            raise BucketError(
                f"there is no {url}: make it, or check EXPUNGE_ARTIFACT_URL and AWS_ENDPOINT_URL"
            ) from None
        self.delete(probe)
        if written["version"] is not None and not declared:
            raise BucketError(
                f"{url} is or was versioned, so deleted objects stay there as old versions and no erasure can be"
                " certified: use a bucket that never was, or add a lifecycle rule that removes noncurrent versions, and"
                f" state its days: EXPUNGE_ARTIFACT_URL={url}?version_days=N"
            )


@contextmanager
def _as_os_errors() -> Generator[None]:
    """What a directory would raise."""
    try:
        yield
    except (AlreadyExistsError, PreconditionError) as error:
        raise FileExistsError(str(error)) from None
    except BaseError as error:
        raise OSError(f"the bucket does not answer as it should ({type(error).__name__})") from error
