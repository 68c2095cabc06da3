"""What every step needs: a pool, the artefact store, the bell. One per process, opened after any fork."""

from dataclasses import dataclass
from functools import lru_cache

from service.settings import Settings, settings
from service.store.artifacts import Artifacts, open_artifacts
from service.store.database import Pool, make_pool
from workers.bell import Bell


@dataclass(frozen=True, slots=True)
class Context:
    """Stores and settings of one process."""

    settings: Settings
    pool: Pool
    artifacts: Artifacts
    bell: Bell


@lru_cache(maxsize=1)
def context() -> Context:
    """This process's context; the connection budget is protocol.md section 9's."""
    chosen = settings()
    pool = make_pool(chosen.database_url, size=3, checked=False)
    pool.open()
    return Context(
        chosen,
        pool,
        open_artifacts(chosen.artifact_url, chosen.file_keys_url),
        Bell(chosen.redis_url),
    )
