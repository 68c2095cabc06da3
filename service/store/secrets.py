"""The installation's secrets: files that only their owner may read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import LiteralString

from psycopg.rows import scalar_row

from service.domain.errors import ExpungeError
from service.store.database import Connection
from service.store.subjects import Alias, alias_of
from shards.digest import keyed

KEY_BYTES = 32


class SecretsError(ExpungeError):
    """A key file is missing, readable by others, or not a key."""


INSERT_CHECK: LiteralString = """
INSERT INTO key_check (name, digest) VALUES (%(name)s::text, %(digest)s::bytea) ON CONFLICT DO NOTHING
"""
CHECKED: LiteralString = "SELECT to_regclass('key_check')::text"
FIND_CHECK: LiteralString = "SELECT digest FROM key_check WHERE name = %(name)s::text"


@dataclass(frozen=True, slots=True)
class Secrets:
    """Keys of this installation. Never logged, never in Postgres; without them data has no owners."""

    pepper: bytes = field(repr=False)
    """Key of alias digests and of request commitments."""
    partition: bytes = field(repr=False)
    """Key from which each dataset's partition key is derived. Never changed: all data would move."""
    older_peppers: tuple[bytes, ...] = field(default=(), repr=False)
    """Those from before: subjects that are known by them stay known."""

    def alias(self, kind: str, value: str) -> Alias:
        """The alias of an identifier, by which it is sought under every pepper and kept under the newest."""
        return alias_of(self.pepper, kind, value, older=self.older_peppers)


def read_secrets(keys_dir: Path) -> Secrets:
    """Read `pepper` (a line each, the newest first) and `partition` below `keys_dir`.

    Raises:
        SecretsError: a file is missing, open to other users, or not 32 bytes in hex.
    """
    (partition,) = _read(keys_dir / "partition", most=1)
    pepper, *older = _read(keys_dir / "pepper")
    return Secrets(pepper, partition, tuple(older))


def _read(path: Path, *, most: int | None = None) -> list[bytes]:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise SecretsError(
            f"{path} is missing: restore it from your backup, or point EXPUNGE_KEYS_DIR at the directory that"
            " `expunge up` made"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SecretsError(f"{path} cannot be read ({type(error).__name__}): check its owner and mode") from None
    if mode & 0o077:
        raise SecretsError(f"{path} is open to other users (mode {mode & 0o777:04o}): run `chmod 600 {path}`")
    try:
        keys = [bytes.fromhex(line) for line in text.splitlines()]
    except ValueError:
        keys = []
    if not keys or any(len(key) != KEY_BYTES for key in keys) or len(keys) > (most or len(keys)):
        raise SecretsError(f"{path} does not hold {KEY_BYTES} bytes in hex: restore it from your backup")
    return keys


def check_secrets(connection: Connection, secrets: Secrets) -> None:
    """Refuse keys that are not the ones this database's data was made with; the first start writes them down.

    Raises:
        SecretsError: another pepper or partition key. Every look-up would miss, and deletions would find nobody.
    """
    if connection.execute(CHECKED).fetchone() == (None,):
        return  # no schema yet: /readyz says so
    for name, keys in (("pepper", (secrets.pepper, *secrets.older_peppers)), ("partition", (secrets.partition,))):
        digests = [keyed(key, b"key check", name.encode()) for key in keys]
        connection.execute(INSERT_CHECK, {"name": name, "digest": digests[-1]})
        with connection.cursor(row_factory=scalar_row) as cursor:
            found = cursor.execute(FIND_CHECK, {"name": name}).fetchone()
        if found is None or bytes(found) not in digests:
            raise SecretsError(f"the {name} is not the one this database was made with: restore keys/ from your backup")
