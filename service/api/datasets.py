"""Datasets: declare, list, upload records."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from service.api.auth import Caller, DataWriter
from service.api.context import Context, Here
from service.api.errors import RESPONSES
from service.api.schemas import NamePath, NewDataset
from service.api.upload import UploadReader
from service.domain.errors import InvalidInputError
from service.evidence.events import EventKind
from service.store import datasets, events, ingest
from service.store.database import transaction
from service.store.datasets import Dataset
from service.store.priors import Prior
from shards.partition import dataset_key

CHUNK = 2**20
"""Bytes that are read before a thread parses them."""

router = APIRouter(prefix="/v1/datasets", tags=["datasets"], responses=RESPONSES)


@router.post("", status_code=201)
def create_dataset(body: NewDataset, here: Here, caller: DataWriter, response: Response) -> dict[str, Any]:
    """Declare a dataset; its grid, classes, priors and row cap never change."""
    with transaction(here.pool) as connection:
        priors = [Prior(**prior.model_dump()) for prior in body.priors]
        made = datasets.insert_dataset(connection, **body.model_dump(exclude={"priors"}), priors=priors)
        events.append(connection, EventKind.DATASET_DECLARED, dataset_id=str(made.dataset_id), actor=caller.prefix)
    response.headers["Location"] = f"/v1/datasets/{made.name}"
    return _shown(made, 0)


@router.get("")
def list_datasets(here: Here, _caller: Caller) -> dict[str, Any]:
    """All datasets with their rows."""
    with transaction(here.pool) as connection:
        found = datasets.list_datasets(connection)
        rows = datasets.count_rows(connection, [dataset.dataset_id for dataset in found])
    return {"datasets": [_shown(dataset, rows[dataset.dataset_id]) for dataset in found]}


@router.get("/{name}")
def get_dataset(name: NamePath, here: Here, _caller: Caller) -> dict[str, Any]:
    """One dataset with its rows."""
    with transaction(here.pool) as connection:
        found = datasets.get_dataset(connection, name)
        rows = datasets.count_rows(connection, [found.dataset_id])
    return _shown(found, rows[found.dataset_id])


# The one endpoint with `async def` and I/O: a body can be read as a stream in no other way. Parsing and the stores'
# work run in threads, so that the event loop stays free.
@router.post(
    "/{name}/records",
    status_code=201,
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/x-ndjson": {"schema": {"type": "string"}}}}
    },
)
async def upload_records(name: NamePath, request: Request, here: Here, _caller: DataWriter) -> dict[str, Any]:
    """Take an NDJSON upload, as a whole or not at all; lines of subjects on the do-not-train list are counted."""
    dataset = await run_in_threadpool(_dataset, here, name)
    reader = UploadReader(
        dataset_key=dataset_key(here.secrets.partition, dataset.dataset_id),
        pepper=here.secrets.pepper,
        older_peppers=here.secrets.older_peppers,
        classes=dataset.classes,
        task=dataset.task,
        input_kind=dataset.input,
        width=dataset.width,
        priors=dataset.priors,
        record_limit=here.settings.record_limit_bytes,
    )
    refusal = await _read(request, reader)
    if refusal is not None:
        raise refusal
    lines = await run_in_threadpool(reader.finish)
    done = await run_in_threadpool(ingest.ingest, here.pool, here.artifacts, here.secrets.partition, dataset, lines)
    return asdict(done)


async def _read(request: Request, reader: UploadReader) -> InvalidInputError | None:
    """Feed the body to the reader. After a wrong line the rest is read and dropped: a client that still sends
    would see a broken connection instead of the answer.
    """
    refusal: InvalidInputError | None = None
    waiting = bytearray()
    async for chunk in request.stream():
        if refusal is not None:
            continue
        waiting += chunk
        if len(waiting) >= CHUNK:
            refusal = await run_in_threadpool(_feed, reader, bytes(waiting))
            waiting.clear()
    return refusal or await run_in_threadpool(_feed, reader, bytes(waiting))


def _feed(reader: UploadReader, chunk: bytes) -> InvalidInputError | None:
    try:
        reader.feed(chunk)
    except InvalidInputError as error:
        return error
    return None


def _dataset(here: Context, name: str) -> Dataset:
    with transaction(here.pool) as connection:
        return datasets.get_dataset(connection, name)


def _shown(dataset: Dataset, rows: int) -> dict[str, Any]:
    shown = asdict(dataset)
    del shown["dataset_id"]
    return {**shown, "created_at": dataset.created_at.isoformat(), "rows": rows}
