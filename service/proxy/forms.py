"""The two protocols as the proxy passes them on: the caller's name of the model outside, `model@version` behind."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from service.serving.answers import Answer, ProblemError, provenance
from service.serving.inference import check_served
from service.serving.replica import Pointer
from service.serving.routes import Place, Route

CHAT_EXAMPLE = '{"model": "a name", "messages": [{"role": "user", "content": "a text"}]}'
EVENT_LIMIT = 2**20
"""Bytes of one event of a stream."""
MESSAGE_LIMIT = 500
"""Characters of an upstream's refusal that are passed on."""
OPTIONS = ("parameters", "extra_body")
"""Fields that hold further options."""
PATHS = {Route.COMPLETIONS: "/v1/completions", Route.CHAT: "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Texts:
    """A completion or chat call in OpenAI's form. Holds what the caller sent: it goes with the call."""

    path: str
    model: str
    body: Mapping[str, Any]
    stream: bool

    method = "POST"

    @classmethod
    def of(cls, route: Route, body: dict[str, Any]) -> "Texts":
        """From a call's JSON.

        Raises:
            ProblemError: 422.
        """
        model, stream = body.get("model"), body.get("stream")
        if not isinstance(model, str):
            detail = "model must be the name of a model; GET /v1/models lists them"
            raise ProblemError(422, "invalid-body", detail)
        if stream is not None and not isinstance(stream, bool):
            raise ProblemError(422, "invalid-body", "stream must be true or false")
        refuse_other_adapters(body)
        return cls(PATHS[route], model, body, bool(stream))

    def address(self, _name: str) -> str:
        """Where it is asked."""
        return self.path

    def content(self, name: str) -> bytes:
        """The body under the upstream's name."""
        return json.dumps({**self.body, "model": name}).encode()

    def check(self, _pointer: Pointer) -> None:
        """Nothing more is known of it here."""

    def rewritten(self, body: dict[str, Any], name: str, pointer: Pointer) -> dict[str, Any]:
        """An answer, or an event of a stream, under the caller's name.

        Raises:
            ProblemError: 502 where it is another model's.
        """
        if body.get("model") != name:
            raise _other_model()
        return {**body, "model": self.model, "version": pointer.version}


@dataclass(frozen=True, slots=True)
class Tensors:
    """An inference, or a look at a model's tensors, in the Open Inference Protocol."""

    place: Place
    body: bytes
    """Empty where only the tensors are asked for."""

    @property
    def method(self) -> str:
        """GET for metadata."""
        return self.place.method

    @property
    def model(self) -> str:
        """The caller's name of it."""
        return self.place.model

    def address(self, name: str) -> str:
        """Where it is asked."""
        return f"/v2/models/{quote(name)}" + ("/infer" if self.place.route is Route.INFER else "")

    def content(self, _name: str) -> bytes:
        """The body as it came: the name stands in the address."""
        return self.body

    def check(self, pointer: Pointer) -> None:
        """Refuse to answer for another version than the address names.

        Raises:
            ProblemError: 404.
        """
        check_served(pointer, self.place.version)

    def rewritten(self, body: dict[str, Any], name: str, pointer: Pointer) -> dict[str, Any]:
        """An answer under the caller's name.

        Raises:
            ProblemError: 502 where it is another model's.
        """
        infer = self.place.route is Route.INFER
        field = "model_name" if infer else "name"
        if body.get(field) != name:
            raise _other_model()
        version = {"model_version": str(pointer.version)} if infer else {"versions": [str(pointer.version)]}
        return {**body, field: self.model, **version}


Form = Texts | Tensors


def refuse_other_adapters(body: Mapping[str, Any]) -> None:
    """Refuse fields by which some servers let a caller choose an adapter: it could be one that is out of service.

    Raises:
        ProblemError: 422.
    """
    options = [body.get(name) for name in OPTIONS]
    keys = [key.lower() for each in (body, *options) if isinstance(each, dict) for key in each]
    if any("adapter" in key or "lora" in key for key in keys):
        detail = "an adapter cannot be chosen here: the model's name alone says what answers; leave the field out"
        raise ProblemError(422, "invalid-body", detail)


def render(form: Form, content: bytes, name: str, pointer: Pointer) -> Answer:
    """An upstream's whole answer as ours.

    Raises:
        ProblemError: 502 where it is no JSON object, or another model's.
    """
    body = form.rewritten(_object(content), name, pointer)
    return Answer(200, json.dumps(body).encode(), headers=provenance(pointer))


def render_event(form: Texts, data: bytes, name: str, pointer: Pointer) -> bytes:
    """One event of an upstream's stream as ours.

    Raises:
        ProblemError: 502 where it is an error, no JSON object, or another model's.
    """
    body = _object(data)
    if "error" in body:
        raise ProblemError(502, "upstream-failed", "the server behind the proxy broke its answer off with an error")
    return b"data: " + json.dumps(form.rewritten(body, name, pointer)).encode() + b"\n\n"


async def events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """The data of each server-sent event.

    Raises:
        ProblemError: 502 where one does not end.
    """
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(rest) > EVENT_LIMIT:
            raise ProblemError(
                502, "upstream-failed", f"the server behind the proxy sent {EVENT_LIMIT} bytes of an event"
            )
        for event in whole:
            lines = [line.removeprefix(b"data:").strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(lines)


def refused(status: int, content: bytes, form: Form, name: str) -> ProblemError:
    """What an upstream's status means to the caller, who hears its word on a bad request, under the caller's name."""
    if status in {400, 413, 422}:
        return ProblemError(status, "upstream-refused", _message(content).replace(name, form.model))
    if status == 404:
        detail = "the server behind the proxy does not know the adapter: it is loaded again within seconds, try again"
        return ProblemError(502, "upstream-lost-model", detail)
    if status in {429, 503}:
        detail = "the server behind the proxy has too much to do; try again"
        return ProblemError(503, "overloaded", detail, headers=((b"retry-after", b"1"),))
    return ProblemError(
        502, "upstream-failed", f"the server behind the proxy answered with status {status}; see its log"
    )


def _message(content: bytes) -> str:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    found = body.get("error", body.get("message")) if isinstance(body, dict) else None
    text = found.get("message") if isinstance(found, dict) else found
    return (
        text[:MESSAGE_LIMIT] if isinstance(text, str) else "the server behind the proxy refuses the request as invalid"
    )


def _object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise ProblemError(502, "upstream-failed", "the server behind the proxy did not answer with a JSON object")
    return body


def _other_model() -> ProblemError:
    detail = "the server behind the proxy answered as another model than it was asked for; its answer was dropped"
    return ProblemError(502, "upstream-other-model", detail)
