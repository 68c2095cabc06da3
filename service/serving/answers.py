"""Bodies of the predict call: what is accepted, what is answered, and RFC 9457 problems. Inputs are never quoted."""

import base64
import binascii
import json
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from service.domain.answers import Answers
from service.serving.replica import Pointer
from shards import vectors
from shards.engine.interface import Input
from shards.logits import Logits
from shards.recipe import Recipe

BATCH_LIMIT = 256
BODY_LIMIT = 4 * 2**20
DIGITS = 6
"""Decimal places of a probability; their sum may differ from 1 by as much per class."""

COARSE = 2
"""Decimal places under the policy `top1`."""

Float64 = npt.NDArray[np.float64]
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

    def __init__(
        self, status: int, slug: str, detail: str, *, headers: Headers = (), told: Mapping[str, Any] | None = None
    ) -> None:
        """`slug` names the kind of problem in its type URI and in the metrics; `told` are members of its own."""
        super().__init__(slug)
        self.status = status
        self.slug = slug
        self.detail = detail
        self.headers = headers
        self.told = told or {}

    def answer(self) -> Answer:
        """The problem as a response."""
        body = {
            "type": f"urn:expunge:problem:{self.slug}",
            "title": self.slug.replace("-", " "),
            "status": self.status,
            "detail": self.detail,
            **self.told,
        }
        return Answer(self.status, json.dumps(body).encode(), b"application/problem+json", self.headers)


def unavailable(slug: str, detail: str) -> ProblemError:
    """503, worth another try in a second."""
    return ProblemError(503, slug, detail, headers=((b"retry-after", b"1"),))


def parse_inputs(body: bytes, *, input_limit: int) -> list[Input]:
    """The inputs of a predict body: texts, or images in base64.

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
            422,
            "invalid-body",
            'the body must be an object with the one field inputs, a list of strings or of {"image": base64}',
        )
    if not 1 <= len(inputs) <= BATCH_LIMIT:
        raise ProblemError(422, "invalid-batch", f"inputs must hold between 1 and {BATCH_LIMIT} inputs")
    return [_input(value, f"inputs[{place}]", input_limit) for place, value in enumerate(inputs)]


def check_inputs(recipe: Recipe, inputs: Sequence[Input]) -> None:
    """Refuse inputs of another kind than the model's.

    Raises:
        ProblemError: 422, or 501 where this server has no answers for the model's task.
    """
    if recipe.task == "completion":
        raise ProblemError(501, "not-a-predictor", "the model completes texts: ask it by POST /v1/completions")
    images = recipe.input == "image"
    if any(isinstance(each, bytes) != images for each in inputs):
        kind = '{"image": base64}' if images else "a string"
        raise ProblemError(422, "invalid-input", f"the model's input is {recipe.input}: each input must be {kind}")
    if recipe.module is not None and not all(_is_vector(each, recipe.module.width) for each in inputs):
        detail = f"each input must be a JSON array of {recipe.module.width} finite numbers, as a string"
        raise ProblemError(422, "invalid-input", detail)


def _input(value: Any, where: str, limit: int) -> Input:
    image = value["image"] if isinstance(value, dict) and set(value) == {"image"} else None
    text = value if image is None else image
    if not isinstance(text, str):
        raise ProblemError(422, "invalid-input", f'{where} must be a string, or {{"image": base64}}')
    check_text(text, where, limit)
    return text if image is None else image_of(text, f"{where}.image")


def check_text(text: str, where: str, limit: int) -> None:
    """Refuse what is no Unicode text, or is longer than `limit` bytes.

    Raises:
        ProblemError: 422 or 413.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        detail = f"{where} holds a lone surrogate, which no Unicode text has; send valid UTF-8"
        raise ProblemError(422, "invalid-input", detail) from None
    if size > limit:
        raise ProblemError(413, "input-too-large", f"{where} is longer than {limit} bytes; send a part of it")


def image_of(text: str, where: str) -> bytes:
    """The bytes of an image file sent in base64.

    Raises:
        ProblemError: 422.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters beyond ASCII
        raise ProblemError(422, "invalid-input", f"{where} is not base64") from None


def _is_vector(text: Input, width: int) -> bool:
    try:
        vectors.parsed(text, width)
    except vectors.VectorError:
        return False
    return True


def render(model: str, pointer: Pointer, found: Logits, answers: Answers) -> Answer:
    """The prediction with the version that it came from: as much of its scores as the policy lets out."""
    logits = found.astype(np.float64)
    recipe = pointer.recipe
    if recipe.task == "regression":
        outputs: list[dict[str, Any]] = [{"value": value} for value in values_of(recipe, logits, answers)]
    elif answers is Answers.TOP1:
        outputs = [{"label": label, "score": score} for label, score in top1(recipe.classes, logits)]
    else:
        outputs = _probabilities(recipe.classes, logits)
    body: Mapping[str, Any] = {
        "model": model,
        "version": pointer.version,
        "outputs": outputs,
        "shards": {"live": pointer.live, "of": pointer.of},
    }
    return Answer(200, json.dumps(body).encode(), headers=provenance(pointer))


def provenance(pointer: Pointer) -> Headers:
    """The headers that say which version answered, and from which stages."""
    return (
        (b"x-expunge-version", str(pointer.version).encode()),
        (b"x-expunge-assembly", pointer.assembly.encode()),
    )


def values_of(recipe: Recipe, logits: Float64, answers: Answers) -> list[float]:
    """A regression's numbers, rounded; where the declared scale is small, to a millionth of its spread.

    Under `top1` to a hundredth of its spread, however large that is.
    """
    power = math.floor(math.log10(recipe.scale.spread if recipe.scale else 1.0))
    places = COARSE - power if answers is Answers.TOP1 else DIGITS + max(0, -power)
    return [round(float(row[0]), places) for row in logits]


def top1(classes: Sequence[str], logits: Float64) -> list[tuple[str, float]]:
    """Per input the likeliest label and its probability, rounded to two places."""
    return [(classes[int(row.argmax())], round(float(row.max()), COARSE)) for row in softmax(logits)]


def _probabilities(classes: Sequence[str], logits: Float64) -> list[dict[str, Any]]:
    return [
        {
            "label": classes[int(row.argmax())],
            "probabilities": dict(zip(classes, (round(float(p), DIGITS) for p in row), strict=True)),
        }
        for row in softmax(logits)
    ]


def softmax(logits: Float64) -> Float64:
    """Probabilities (inputs, classes) of the aggregated logits."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
