"""API keys: `xp_` + prefix + `_` + secret, of which only the prefix and the secret's SHA-256 are kept."""

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import LiteralString

from psycopg.rows import class_row

from service.evidence.events import EventKind
from service.store import events
from service.store.database import Connection, connect

PREFIX_LENGTH = 8
TOKEN = re.compile(r"xp_([A-Za-z0-9]{8})_([A-Za-z0-9_-]{32,128})")

FIND: LiteralString = """
SELECT prefix, name, secret_hash, scopes
FROM api_key WHERE prefix = %(prefix)s::text AND revoked_at IS NULL
"""
INSERT: LiteralString = """
INSERT INTO api_key (prefix, name, secret_hash, scopes)
VALUES (%(prefix)s::text, %(name)s::text, %(secret_hash)s::bytea, %(scopes)s::text[])
"""
LOCK_TABLE: LiteralString = "LOCK TABLE api_key IN SHARE ROW EXCLUSIVE MODE"
# What a restore brought back are names without secrets.
EXISTS: LiteralString = "SELECT 1 FROM api_key WHERE name <> 'restored' LIMIT 1"
MARK_REVOKED: LiteralString = """
UPDATE api_key SET revoked_at = now() WHERE prefix = %(prefix)s::text AND revoked_at IS NULL
"""


class Scope(StrEnum):
    """What a key may do."""

    DELETION_WRITE = "deletion:write"
    DELETION_READ = "deletion:read"
    DELETION_APPROVE = "deletion:approve"
    DATA_WRITE = "data:write"
    MODEL_PREDICT = "model:predict"
    MODEL_ADMIN = "model:admin"
    AUDIT_READ = "audit:read"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A caller that proved who it is."""

    prefix: str
    """Names the key in events and rows."""
    name: str
    scopes: frozenset[Scope]


@dataclass(frozen=True, slots=True)
class _Row:
    prefix: str
    name: str
    secret_hash: bytes
    scopes: list[str]


def create(connection: Connection, name: str, scopes: Iterable[Scope]) -> str:
    """Make a key and return its token: the only time that the secret is known."""
    alphabet = string.ascii_letters + string.digits
    prefix = "".join(secrets.choice(alphabet) for _ in range(PREFIX_LENGTH))
    secret = secrets.token_urlsafe(32)
    values = {
        "prefix": prefix,
        "name": name,
        "secret_hash": _hash(secret),
        "scopes": sorted(scope.value for scope in scopes),
    }
    connection.execute(INSERT, values)
    events.append(connection, EventKind.API_KEY_CREATED, prefix=prefix, scopes=values["scopes"])
    return f"xp_{prefix}_{secret}"


def authenticate(connection: Connection, token: str) -> ApiKey | None:
    """The key that the token opens, or None: malformed, unknown, revoked and wrong look alike."""
    match = TOKEN.fullmatch(token)
    if match is None:
        return None
    prefix, secret = match.groups()
    with connection.cursor(row_factory=class_row(_Row)) as cursor:
        row = cursor.execute(FIND, {"prefix": prefix}).fetchone()
    expected = bytes(row.secret_hash) if row else bytes(hashlib.sha256().digest_size)
    if not hmac.compare_digest(expected, _hash(secret)) or row is None:
        return None
    return ApiKey(row.prefix, row.name, frozenset(Scope(scope) for scope in row.scopes))


def mark_revoked(connection: Connection, prefix: str) -> None:
    """Refuse the key from now on; its row stays, since requests name it as their actor."""
    if connection.execute(MARK_REVOKED, {"prefix": prefix}).rowcount:
        events.append(connection, EventKind.API_KEY_REVOKED, prefix=prefix)


def bootstrap(url: str) -> str | None:
    """Make a first key with every scope where there is none at all; its token, else None."""
    with connect(url) as connection:
        connection.execute(LOCK_TABLE)
        if connection.execute(EXISTS).fetchone() is not None:
            return None
        return create(connection, "first", Scope)


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
