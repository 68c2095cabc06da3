"""Every setting of the programs, from `EXPUNGE_*` environment variables; `expunge up` sets them for its children."""

from functools import lru_cache
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """One frozen value per process. Secrets live in files under `keys_dir`, never here."""

    model_config = SettingsConfigDict(env_prefix="EXPUNGE_", frozen=True)

    database_url: str = ""
    """libpq URL of the role that the programs use (it cannot alter the event log)."""
    database_owner_url: str = ""
    """libpq URL of the role that owns the schema; only the migrator uses it."""
    database_listen_url: str = ""
    """Direct URL of the primary for LISTEN, where `database_url` goes through a pooler; else empty."""
    redis_url: str = ""
    """`redis://host:port/db` or `unix:///path?db=0`. A doorbell only: it may lose everything."""
    artifact_url: str = ""
    """`file:///directory` or `s3://bucket/prefix` of the artefact store."""
    file_keys_url: str = ""
    """`file:///directory` (mode 0700) of the key store: one key for each file of the artefact store, kept elsewhere."""
    file_key_backup_days: int | None = Field(default=None, ge=0)
    """How long any backup of the key store is kept: after an erasure, the longest that a copy of a file may still be
    readable. 0: the key store is not backed up. None: not stated, which certificates say."""
    keys_dir: Path = Path("keys")
    """Directory (mode 0700) of the signing key, the pepper and the partition key."""
    api_url: str = "http://127.0.0.1:8700"
    """Where the command line finds the control API."""
    api_key: str = ""
    """The command line's API key."""
    device: str = "cpu"
    """torch device of training workers and model servers."""
    commands: dict[str, list[str]] = Field(default_factory=dict)
    """Training commands that recipes of engine `external` may name: name -> program and arguments (JSON)."""
    lease_ttl_ms: int = Field(default=2000, ge=200)
    """A replica's lease: the worst time to `deactivated` with a dead replica, and the longest outage of
    Postgres before every replica answers 503 (protocol.md, rule 9)."""
    lease_margin_ms: int = Field(default=300, ge=1)
    """What two monotonic clocks may drift apart over one TTL, and the barrier's reserve (assumption A1)."""
    upstream_key: str = ""
    """The bearer token that `expunge proxy` sends to the server behind it, where that asks for one."""
    drain_ms: int = Field(default=2000, ge=0)
    """How long a server that was asked to stop answers on while `/readyz` says 503: longer than it takes a load
    balancer to notice. 0 where none is in front."""
    upload_limit_bytes: int = Field(default=512 * 2**20, ge=1)
    """The largest body of one records upload."""
    record_limit_bytes: int = Field(default=2**20, ge=1)
    """The largest line of a records upload and the largest input of a prediction."""
    job_attempts: int = Field(default=6, ge=1)
    """How often the training of a stage may fail, at growing distances, before its job shows `failed`."""
    target_attempts: int = Field(default=8, ge=1)
    """How often a step of a deletion may fail, at growing distances, before its target shows `failed`."""
    replay_daily_sample: int = Field(default=1, ge=0)
    """How many served stages of each model are trained again from nothing each day and compared; 0: none."""
    ledger_origin: str = Field(default="", pattern=r"^[^\s+]{0,200}$")
    """The ledger's name in its tree heads, best a URL without its scheme; empty: made from the signing key. The first
    tree head fixes it."""
    ledger_high_water: Path | None = None
    """The file that keeps the largest tree head, on another disk than database and bucket; else in `keys_dir`."""
    ledger_opening_days: int = Field(default=1096, ge=30)
    """How long events and what opens their leaves are kept; afterwards a leaf says a kind and a time."""

    certificate_days: int | None = Field(default=None, ge=30)
    """How long certificates are kept; None: for good. Their holders keep theirs, and the ledger its digest."""
    do_not_train_days: int | None = Field(default=None, ge=1)
    """How long a subject stays on the do-not-train list; None: for good. Afterwards the entry is erased."""

    @property
    def listen_url(self) -> str:
        """The URL for LISTEN: direct to the primary, since poolers drop notifications."""
        return self.database_listen_url or self.database_url


@lru_cache(maxsize=1)
def settings() -> Settings:
    """Read the environment once per process."""
    return Settings()
