"""The installation's secrets: files that only their owner may read."""

from dataclasses import dataclass, field
from pathlib import Path

from service.domain.errors import ExpungeError

KEY_BYTES = 32


class SecretsError(ExpungeError):
    """A key file is missing, readable by others, or not a key."""


@dataclass(frozen=True, slots=True)
class Secrets:
    """Keys of this installation. Never logged, never in Postgres; without them data has no owners."""

    pepper: bytes = field(repr=False)
    """Key of alias digests and of request commitments."""
    partition: bytes = field(repr=False)
    """Key from which each dataset's partition key is derived."""


def read_secrets(keys_dir: Path) -> Secrets:
    """Read `pepper` and `partition` below `keys_dir`.

    Raises:
        SecretsError: a file is missing, open to other users, or not 32 bytes in hex.
    """
    return Secrets(_read(keys_dir / "pepper"), _read(keys_dir / "partition"))


def _read(path: Path) -> bytes:
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
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise SecretsError(f"{path} does not hold {KEY_BYTES} bytes in hex: restore it from your backup")
    return key
