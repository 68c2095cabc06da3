"""Exports: a served assembly as one peft adapter, and the register of where such files went."""

import io
import json
import zipfile
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Response
from pydantic import StringConstraints

from service.api.auth import Auditor, ModelAdmin
from service.api.context import Here
from service.api.cursors import make_cursor, open_cursor
from service.api.errors import RESPONSES
from service.api.schemas import REFERENCE, Body, NamePath
from service.store import exports, models
from service.store.database import transaction
from service.store.exports import Export, Files

PAGE = 50

router = APIRouter(tags=["exports"], responses=RESPONSES)


class NewExport(Body):
    """Who gets the file."""

    recipient: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=REFERENCE)]
    """The system or contract that receives it. Kept in clear: never a person's name."""


@router.post("/v1/models/{name}/exports", status_code=201, response_class=Response)
def create_export(name: NamePath, body: NewExport, here: Here, caller: ModelAdmin) -> Response:
    """What is served now, as a zip of a peft adapter directory; it is entered into the register before it leaves."""
    with transaction(here.pool) as connection:
        served = exports.get_served(connection, name)
    files = exports.merge_served(here.artifacts, served)
    with transaction(here.pool) as connection:
        export_id = exports.insert_export(connection, served, files, recipient=body.recipient, actor=caller.prefix)
    headers = {
        "Location": f"/v1/exports/{export_id}",
        "Content-Disposition": f'attachment; filename="{name}-v{files.version}.zip"',
        "X-Expunge-Export": str(export_id),
        "X-Expunge-Version": str(files.version),
        "X-Expunge-Assembly": files.assembly,
        "X-Expunge-Digest": files.digest,
    }
    return Response(_zipped(name, served.model.recipe_digest, export_id, files), 201, headers, "application/zip")


@router.get("/v1/exports")
def list_exports(
    here: Here,
    _caller: Auditor,
    model: str | None = None,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = PAGE,
) -> dict[str, Any]:
    """The register, newest first; `next` is the cursor of the following page, null on the last.

    An export is open while it is tainted and not withdrawn.
    """
    before = None if cursor is None else open_cursor(cursor)
    with transaction(here.pool) as connection:
        model_id = models.get_model(connection, model).model_id if model else None
        found = exports.list_exports(connection, model_id, before=before, limit=limit + 1)
    page = found[:limit]
    following = make_cursor(page[-1].created_at, page[-1].export_id) if len(found) > limit else None
    return {"exports": [_view(each) for each in page], "next": following}


@router.post("/v1/exports/{export_id}/withdraw")
def withdraw_export(export_id: UUID, here: Here, caller: ModelAdmin) -> dict[str, Any]:
    """Record that the recipient has destroyed the file: the caller's word, and shown as that."""
    with transaction(here.pool) as connection:
        exports.mark_withdrawn(connection, export_id, actor=caller.prefix)
    return {"export": str(export_id), "withdrawn": True}


def _view(export: Export) -> dict[str, Any]:
    return {
        "export": str(export.export_id),
        "model": export.model,
        "version": export.version,
        "assembly": export.assembly,
        "digest": export.digest,
        "recipient": export.recipient,
        "created_at": export.created_at.isoformat(),
        "withdrawn_at": export.withdrawn_at.isoformat() if export.withdrawn_at else None,
        "tainted": export.tainted,
        "open": export.tainted and export.withdrawn_at is None,
    }


def _zipped(name: str, recipe: str, export_id: UUID, files: Files) -> bytes:
    about = {
        "model": name,
        "export": str(export_id),
        "version": files.version,
        "assembly": files.assembly,
        "recipe": recipe,
        "digest": files.digest,
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: weights do not compress
        for inner, data in (
            ("adapter_config.json", files.config),
            ("adapter_model.safetensors", files.weights),
            ("expunge.json", json.dumps(about, indent=2).encode()),
        ):
            archive.writestr(zipfile.ZipInfo(inner), data)
    return buffer.getvalue()
