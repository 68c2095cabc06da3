"""The addresses of the model server: which call each one is, and how its protocol writes refusals."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from service.serving import completions, inference
from service.serving.answers import Answer, ProblemError

ADDRESSES = (
    "POST /v1/models/{model}/predict, POST /v1/completions, GET /v1/models, the Open Inference Protocol under /v2,"
    " /healthz, /readyz, /metrics"
)


class Route(StrEnum):
    """What an address asks for."""

    PREDICT = "predict"
    COMPLETIONS = "completions"
    CHAT = "chat"
    MODELS = "models"
    MODEL = "model"
    SERVER = "server"
    LIVE = "live"
    READY = "ready"
    METADATA = "metadata"
    MODEL_READY = "model_ready"
    INFER = "infer"
    HEALTH = "healthz"
    READINESS = "readyz"
    METRICS = "metrics"


_MODEL = r"/v2/models/(?P<model>[^/]+)(/versions/(?P<version>[^/]+))?"
_ROUTES: Mapping[Route, tuple[str, re.Pattern[str]]] = {
    route: (method, re.compile(pattern))
    for route, method, pattern in (
        (Route.PREDICT, "POST", r"/v1/models/(?P<model>[^/]+)/predict"),
        (Route.COMPLETIONS, "POST", r"/v1/completions"),
        (Route.CHAT, "POST", r"/v1/chat/completions"),
        (Route.MODELS, "GET", r"/v1/models"),
        (Route.MODEL, "GET", r"/v1/models/(?P<model>[^/]+)"),
        (Route.SERVER, "GET", r"/v2/?"),
        (Route.LIVE, "GET", r"/v2/health/live"),
        (Route.READY, "GET", r"/v2/health/ready"),
        (Route.METADATA, "GET", _MODEL),
        (Route.MODEL_READY, "GET", _MODEL + "/ready"),
        (Route.INFER, "POST", _MODEL + "/infer"),
        (Route.HEALTH, "GET", r"/healthz"),
        (Route.READINESS, "GET", r"/readyz"),
        (Route.METRICS, "GET", r"/metrics"),
    )
}


@dataclass(frozen=True, slots=True)
class Place:
    """A call's address."""

    route: Route
    method: str
    """The one method that it takes."""
    model: str = ""
    version: str | None = None


def place_of(path: str) -> Place:
    """What is at a path.

    Raises:
        ProblemError: 404.
    """
    for route, (method, pattern) in _ROUTES.items():
        if (match := pattern.fullmatch(path)) is not None:
            found = match.groupdict()
            return Place(route, method, found.get("model") or "", found.get("version"))
    raise ProblemError(404, "not-found", f"the model server has {ADDRESSES}")


def refusal_of(path: str) -> Callable[[ProblemError], Answer]:
    """How a problem is written at a path, as its protocol says; RFC 9457 unless it does."""
    if path == "/v2" or path.startswith("/v2/"):
        return inference.refusal
    if path in {"/v1/completions", "/v1/chat/completions"} or (
        path.startswith("/v1/models") and not path.endswith("/predict")
    ):
        return completions.refusal
    return ProblemError.answer
