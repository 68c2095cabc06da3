"""What the endpoints work with: made once by the composition root, handed to each request."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry

from service.api.doorbell import Doorbell
from service.api.key_cache import KeyCache
from service.api.waiting import Waiting
from service.settings import Settings
from service.store.artifacts import Artifacts
from service.store.database import Pool
from service.store.secrets import Secrets
from service.store.snapshots import Snapshots


@dataclass(frozen=True, slots=True)
class Context:
    """The API's stores and helpers."""

    settings: Settings
    secrets: Secrets
    pool: Pool
    artifacts: Artifacts
    doorbell: Doorbell
    waiting: Waiting
    keys: KeyCache
    registry: CollectorRegistry
    snapshots: Snapshots


async def get_context(request: Request) -> Context:
    """The application's context. `async` only to spare a thread: it does no I/O."""
    return request.app.state.context


Here = Annotated[Context, Depends(get_context)]
