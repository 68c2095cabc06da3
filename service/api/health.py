"""Whether the program lives, whether it can work, and its figures."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from service.api.context import Here
from service.domain.errors import UnavailableError
from service.store import migrate
from service.store.database import transaction
from service.store.secrets import check_secrets

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> PlainTextResponse:
    """The event loop turns. No I/O."""
    return PlainTextResponse("ok\n")


@router.get("/readyz")
def readyz(here: Here) -> JSONResponse:
    """Postgres answers, its schema is not behind this code, and the keys are the ones its data was made with."""
    try:
        migrate.check(here.settings.database_url)
    except migrate.SchemaError:
        raise UnavailableError(
            "Postgres does not answer, or its schema is behind: run `python -m service.store.migrate`"
        ) from None
    with transaction(here.pool) as connection:
        check_secrets(connection, here.secrets)
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
def metrics(here: Here) -> Response:
    """Prometheus exposition; a scrape reads the state tables once."""
    return Response(generate_latest(here.registry), media_type=CONTENT_TYPE_LATEST)
