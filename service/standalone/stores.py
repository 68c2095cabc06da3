"""Which stores `expunge up` uses: those that the environment names, else embedded ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.settings import Settings
from service.standalone.errors import StandaloneError
from service.standalone.postgres import APP, Postgres, root_identity
from service.standalone.state import State
from service.standalone.supervisor import Program
from service.standalone.valkey import Valkey


@dataclass(frozen=True, slots=True)
class Stores:
    """Where everything is kept. `postgres` and `valkey` are None where the operator's own are used."""

    owner_url: str
    app_url: str
    listen_url: str
    redis_url: str
    artifact_url: str
    file_keys_url: str
    postgres: Postgres | None
    valkey: Valkey | None

    def programs(self) -> Sequence[Program]:
        """The embedded servers."""
        return [store.program() for store in (self.postgres, self.valkey) if store is not None]


def choose(state: State, settings: Settings) -> Stores:
    """Settle each store. Nothing is started or written.

    Raises `StandaloneError` where only one of the two database URLs is set.
    """
    if bool(settings.database_url) != bool(settings.database_owner_url):
        given, absent = "EXPUNGE_DATABASE_URL", "EXPUNGE_DATABASE_OWNER_URL"
        if settings.database_owner_url:
            given, absent = absent, given
        raise StandaloneError(
            f"{given} is set but {absent} is not: the programs use one role, which cannot alter the event"
            " log, and migrations another, which owns the schema; set both, or none for the embedded Postgres"
        )
    postgres = None if settings.database_url else Postgres(state.postgres, state.sockets, root_identity())
    valkey = None if settings.redis_url else Valkey(state.valkey, state.sockets)
    return Stores(
        owner_url=postgres.url() if postgres else settings.database_owner_url,
        app_url=postgres.url(APP) if postgres else settings.database_url,
        listen_url="" if postgres else settings.database_listen_url,
        redis_url=valkey.url if valkey else settings.redis_url,
        artifact_url=settings.artifact_url or state.artifacts.as_uri(),
        file_keys_url=settings.file_keys_url or state.file_keys.as_uri(),
        postgres=postgres,
        valkey=valkey,
    )
