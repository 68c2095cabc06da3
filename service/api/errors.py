"""Every error as an RFC 9457 problem; the one place that knows HTTP codes. Nothing of a caller's is echoed."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from service.api.auth import ForbiddenError, UnauthenticatedError
from service.domain.errors import (
    ConflictError,
    ExpungeError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from service.logs import get_logger
from service.store.artifacts import ArtifactMissingError
from service.store.database import RETRYABLE

CONTENT_TYPE = "application/problem+json"
STATUS: dict[type[ExpungeError], HTTPStatus] = {
    NotFoundError: HTTPStatus.NOT_FOUND,
    ConflictError: HTTPStatus.CONFLICT,
    InvalidInputError: HTTPStatus.UNPROCESSABLE_ENTITY,
    UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    UnauthenticatedError: HTTPStatus.UNAUTHORIZED,
    ForbiddenError: HTTPStatus.FORBIDDEN,
}
HEADERS: dict[HTTPStatus, dict[str, str]] = {
    HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": "1"},
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": 'Bearer realm="expunge"'},
}

log = get_logger(__name__)


class FieldProblem(BaseModel):
    """One field of the input that is not acceptable."""

    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    line: int | None = Field(default=None, description="of an upload, counted from 1")
    field: str | None = None
    errors: list[FieldProblem] | None = None


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {CONTENT_TYPE: {}}} for status in (401, 403, 404, 409, 422, 503)
}
"""For OpenAPI."""


def problem(status: int, detail: str, *, headers: Mapping[str, str] | None = None, **extensions: Any) -> JSONResponse:
    """A problem as a response; extensions that are None are left out."""
    known = HTTPStatus(status)
    body = {"type": "about:blank", "title": known.phrase, "status": status, "detail": detail}
    body |= {name: value for name, value in extensions.items() if value is not None}
    merged = {**HEADERS.get(known, {}), **(headers or {})}
    return JSONResponse(body, status_code=status, headers=merged, media_type=CONTENT_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of the application as a problem."""
    app.add_exception_handler(ExpungeError, _own)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ArtifactMissingError, _missing)
    for error in RETRYABLE:
        app.add_exception_handler(error, _busy)
    app.add_exception_handler(Exception, _unexpected)


async def _own(_request: Request, error: Exception) -> JSONResponse:
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), None)
    if status is None:
        return await _unexpected(_request, error)
    if not isinstance(error, InvalidInputError):
        return problem(status, str(error))
    where = "" if error.line is None else f"line {error.line}: "
    return problem(status, f"{where}{error}", field=error.field, line=error.line)


async def _validation(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise TypeError(type(error))
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        return problem(HTTPStatus.BAD_REQUEST, "the body is not valid JSON")
    if all(item["loc"][0] == "path" for item in found):
        return problem(HTTPStatus.NOT_FOUND, "there is nothing at this path")
    fields = [{"field": _field(item), "message": _message(item)} for item in found]
    detail = "; ".join(f"{item['field']}: {item['message']}" for item in fields[:3])
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, errors=fields)


def _field(item: Mapping[str, Any]) -> str:
    """Where the mistake is. An unknown field's name is the caller's own text, so it is left out."""
    place = [str(part) for part in item["loc"][1:]]
    if item["type"] == "extra_forbidden":
        place = [*place[:-1], "(unknown field)"]
    return ".".join(place) or str(item["loc"][0])


def _message(item: Mapping[str, Any]) -> str:
    if len(item["loc"]) == 1 and item["type"] != "value_error":
        return "must be a JSON object, sent with Content-Type: application/json"
    return str(item["msg"]).removeprefix("Value error, ")


async def _http(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise TypeError(type(error))
    status = HTTPStatus(error.status_code)
    details = {
        HTTPStatus.NOT_FOUND: "there is nothing at this path; GET /openapi.json lists the calls",
        HTTPStatus.METHOD_NOT_ALLOWED: "the path does not know the method; the Allow header names those it does",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "the body is too long: send less at a time",
        HTTPStatus.BAD_REQUEST: "the body cannot be read: send UTF-8 encoded JSON",
    }
    return problem(status, details.get(status, status.description), headers=error.headers)


async def _missing(_request: Request, _error: Exception) -> JSONResponse:
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, "an object was replaced while it was read: try again")


async def _busy(_request: Request, error: Exception) -> JSONResponse:
    log.warning("lock_busy", error=type(error).__qualname__)
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, "the rows are locked by other work: try again")


async def _unexpected(_request: Request, error: Exception) -> JSONResponse:
    log.error("request_failed", exc_info=error)
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "an unexpected error; the operator's log says where")
