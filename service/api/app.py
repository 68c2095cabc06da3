"""The control API's composition root: the one place where its parts meet."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.api import (
    audit,
    audit_export,
    challenges,
    datasets,
    do_not_train,
    errors,
    exports,
    health,
    holds,
    models,
    releases,
    replays,
    request,
    requests,
)
from service.api.context import Context
from service.api.doorbell import Doorbell
from service.api.key_cache import KeyCache
from service.api.middleware import LimitBody, Observe
from service.api.waiting import Waiting
from service.domain.errors import UnavailableError
from service.evidence.tree_head import TreeHeadError
from service.logs import get_logger
from service.metrics import HttpMetrics, StateCollector
from service.settings import Settings
from service.store import vetting
from service.store.artifacts import open_artifacts
from service.store.database import Pool, make_pool, transaction
from service.store.gauges import Figures, read_figures
from service.store.ledger_files import LedgerFiles
from service.store.secrets import check_secrets, read_secrets
from service.store.snapshots import Snapshots

log = get_logger(__name__)

POOL_SIZE = 8
"""Below the 40 threads that run endpoints; the connection budget is protocol.md section 9's."""


def create_app(settings: Settings) -> FastAPI:
    """The API, not yet connected to anything: its lifespan opens and closes the pool and the doorbell.

    Raises:
        SecretsError: a key file is missing or open to other users.
        ValueError: a store's URL cannot be used.
    """
    pool = make_pool(settings.database_url, size=POOL_SIZE)
    registry = CollectorRegistry()
    registry.register(StateCollector(lambda: _figures(pool)))
    context = Context(
        settings=settings,
        secrets=read_secrets(settings.keys_dir),
        pool=pool,
        artifacts=open_artifacts(settings.artifact_url, settings.file_keys_url),
        doorbell=Doorbell(settings.redis_url),
        waiting=Waiting(settings.listen_url),
        keys=KeyCache(pool),
        registry=registry,
        snapshots=Snapshots(settings.database_url),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        # Not waiting for Postgres: until it answers, /readyz and every call say 503.
        pool.open(wait=False)
        with suppress(UnavailableError), transaction(pool) as connection:
            check_secrets(connection, context.secrets)
        with suppress(UnavailableError):  # what is not of one moment is shut, and said with each call
            compare(context)
        context.doorbell.start()
        listening = asyncio.create_task(context.waiting.listen())
        try:
            yield
        finally:
            listening.cancel()
            await asyncio.wait([listening])
            context.doorbell.stop()
            pool.close()

    app = FastAPI(
        title="Expunge",
        version="1",
        summary="Takes a person's data out of a model in production, exactly, and gives evidence of it.",
        docs_url=None,  # it would load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.context = context
    errors.install(app)
    for part in (
        requests,
        request,
        holds,
        do_not_train,
        datasets,
        models,
        releases,
        replays,
        exports,
        audit,
        audit_export,
        challenges,
        health,
    ):
        app.include_router(part.router)
    app.add_middleware(LimitBody, upload_limit=settings.upload_limit_bytes)
    app.add_middleware(Observe, metrics=HttpMetrics(registry))
    return app


def compare(context: Context) -> None:
    """Compare the database with the ledger's files, as each start does; what differs shuts it (docs/restore.md)."""
    settings = context.settings
    high_water = settings.ledger_high_water or settings.keys_dir / "tree-head"
    try:
        vetting.vet(context.pool, LedgerFiles(context.artifacts), high_water)
    except TreeHeadError as error:
        log.critical("ledger.refused", error=str(error))


def _figures(pool: Pool) -> Figures:
    with transaction(pool) as connection:
        return read_figures(connection)
