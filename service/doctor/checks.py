"""What an operator wants to know of an installation: each check says what is so, or what to do."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from service.doctor.sites import Sites
from service.domain.errors import ExpungeError
from service.evidence.keys import KeyFileError, load_signing_key
from service.evidence.signers import prove
from service.settings import Settings
from service.store import migrate, tables
from service.store.artifacts import Artifacts, open_artifacts
from service.store.migrate import SchemaError
from service.store.secrets import check_secrets, read_secrets
from service.store.tables import TableError

CLOCK_SECONDS = 1.0
"""What this machine's clock and the database's may differ by; times in certificates are the database's."""
_FAILURES = (ExpungeError, KeyFileError, SchemaError, TableError, redis.RedisError, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool
    detail: str


def run_checks(sites: Sites, settings: Settings) -> list[Check]:
    """Every check, in an order in which the first failure explains the next."""
    checks: dict[str, Callable[[Sites, Settings], str]] = {
        "keys": _keys,
        "postgres": _postgres,
        "clock": _clock,
        "redis": _redis,
        "key store": _key_store,
        "artefacts": _artifacts,
        "key backups": _key_backups,
    }
    return [_run(name, check, sites, settings) for name, check in checks.items()]


def _run(name: str, check: Callable[[Sites, Settings], str], sites: Sites, settings: Settings) -> Check:
    try:
        return Check(name, passed=True, detail=check(sites, settings))
    except _FAILURES as error:
        return Check(name, passed=False, detail=str(error) or type(error).__name__)


def _keys(sites: Sites, _settings: Settings) -> str:
    read_secrets(sites.keys_dir)
    prove(load_signing_key(sites.keys_dir / "signing.pem"))
    if (mode := sites.keys_dir.stat().st_mode & 0o777) & 0o077:
        raise ValueError(f"others may look into {sites.keys_dir} (mode {mode:04o}): run `chmod 700 {sites.keys_dir}`")
    return "signing key, pepper and partition key are there, and their owner's alone"


def _postgres(sites: Sites, _settings: Settings) -> str:
    migrate.check(sites.database_url)
    with tables.reading(sites.database_url) as connection:
        check_secrets(connection, read_secrets(sites.keys_dir))
    return f"answers; schema {migrate.newest()}, and the keys are the ones its data was made with"


def _clock(sites: Sites, _settings: Settings) -> str:
    with tables.reading(sites.database_url) as connection:
        before = time.time()
        there = tables.get_clock(connection)
        apart = max(0.0, before - there, there - time.time())
    if apart > CLOCK_SECONDS:
        raise ValueError(f"this machine's clock and the database's are {apart:.1f} s apart: let both follow NTP")
    return f"within {CLOCK_SECONDS:g} s of the database's"


def _redis(sites: Sites, _settings: Settings) -> str:
    client = redis.Redis.from_url(sites.redis_url, socket_timeout=5.0)
    try:
        client.ping()
    finally:
        client.close()
    return "answers"


def _key_store(sites: Sites, _settings: Settings) -> str:
    _open(sites)
    return "is the artefact store's, and its owner's alone"


def _artifacts(sites: Sites, _settings: Settings) -> str:
    """Rule 20: what is live is there, and opens."""
    artifacts = _open(sites)
    with tables.reading(sites.database_url) as connection:
        names = tables.list_live_names(connection)
    lost = [name for name in names if not artifacts.files.exists(name)]
    shut = [name for name in names if not artifacts.opens(name)]
    if lost or shut:
        raise ValueError(
            f"of {len(names)} live objects {len(lost)} are not there and {len(shut)} have no key,"
            f" as {(lost or shut)[0]}: stages are trained again; restore payload files and keys from your backup"
        )
    return f"{len(names)} live objects are there with their keys"


def _key_backups(_sites: Sites, settings: Settings) -> str:
    days = settings.file_key_backup_days
    if days is None:
        raise ValueError(
            "it is not stated how long backups of the key store are kept, so no certificate can say when the last"
            " copy of an erased file becomes unreadable: set EXPUNGE_FILE_KEY_BACKUP_DAYS (0: there are none)"
        )
    return f"copies of erased files are unreadable at the latest {days} days after the erasure, by your statement"


def _open(sites: Sites) -> Artifacts:
    return open_artifacts(sites.artifact_url, sites.file_keys_url)
