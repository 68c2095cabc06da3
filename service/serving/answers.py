"""Bodies of the predict call: what is accepted, what is answered, and RFC 9457 problems. Inputs are never quoted."""

import json
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.serving.replica import Pointer
from shards.logits import Logits

BATCH_LIMIT = 256
BODY_LIMIT = 4 * 2**20
DIGITS = 6
"""Decimal places of a probability; their sum may differ from 1 by as much per class."""

Headers = Sequence[tuple[bytes, bytes]]
Message = MutableMapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that fits into one body message."""

    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: Headers = field(default=())

    def messages(self) -> tuple[Message, Message]:
        """The two ASGI messages."""
        head = (
            (b"content-type", self.content_type),
            (b"content-length", str(len(self.body)).encode()),
            (b"cache-control", b"no-store"),
        )
        start = {"type": "http.response.start", "status": self.status, "headers": [*head, *self.headers]}
        return start, {"type": "http.response.body", "body": self.body}


class ProblemError(Exception):
    """A refusal; its detail says what to do next and holds nothing that the caller sent."""

    def __init__(self, status: int, slug: str, detail: str, *, headers: Headers = ()) -> None:
        """`slug` names the kind of problem in its type URI and in the metrics."""
        super().__init__(slug)
        self.status = status
        self.slug = slug
        self.detail = detail
        self.headers = headers

    def answer(self) -> Answer:
        """The problem as a response."""
        body = {
            "type": f"urn:expunge:problem:{self.slug}",
            "title": self.slug.replace("-", " "),
            "status": self.status,
            "detail": self.detail,
        }
        return Answer(self.status, json.dumps(body).encode(), b"application/problem+json", self.headers)


def unavailable(slug: str, detail: str) -> ProblemError:
    """503, worth another try in a second."""
    return ProblemError(503, slug, detail, headers=((b"retry-after", b"1"),))


def parse_inputs(body: bytes, *, input_limit: int) -> list[str]:
    """The texts of a predict body.

    Raises:
        ProblemError: 400 for what is not JSON, 422 for JSON that is not acceptable, 413 for one input too long.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise ProblemError(400, "malformed-json", 'the body must be JSON: {"inputs": ["a text", ...]}') from None
    inputs = document.get("inputs") if isinstance(document, dict) else None
    if not isinstance(inputs, list) or set(document) != {"inputs"}:
        raise ProblemError(
            422, "invalid-body", "the body must be an object with the one field inputs, a list of strings"
        )
    if not 1 <= len(inputs) <= BATCH_LIMIT:
        raise ProblemError(422, "invalid-batch", f"inputs must hold between 1 and {BATCH_LIMIT} texts")
    for place, text in enumerate(inputs):
        if not isinstance(text, str):
            raise ProblemError(422, "invalid-input", f"inputs[{place}] must be a string")
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise ProblemError(
                422,
                "invalid-input",
                f"inputs[{place}] holds a lone surrogate, which no Unicode text has; send valid UTF-8",
            ) from None
        if size > input_limit:
            raise ProblemError(
                413,
                "input-too-large",
                f"inputs[{place}] is longer than {input_limit} bytes; send a part of it",
            )
    return inputs


def render(model: str, pointer: Pointer, parts: Sequence[Logits]) -> Answer:
    """The prediction: softmax over the aggregated logits, with the version that it came from."""
    logits = np.concatenate(parts).astype(np.float64)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    outputs = [
        {
            "label": pointer.classes[int(row.argmax())],
            "probabilities": dict(zip(pointer.classes, (round(float(p), DIGITS) for p in row), strict=True)),
        }
        for row in probabilities
    ]
    body: Mapping[str, Any] = {
        "model": model,
        "version": pointer.version,
        "outputs": outputs,
        "shards": {"live": pointer.live, "of": pointer.of},
    }
    headers = (
        (b"x-expunge-version", str(pointer.version).encode()),
        (b"x-expunge-assembly", pointer.assembly.encode()),
    )
    return Answer(200, json.dumps(body).encode(), headers=headers)
