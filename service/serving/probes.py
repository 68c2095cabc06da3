"""What is told without a key: whether the process runs, whether it may answer, its metrics. Never an input's answer."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from service.serving import inference
from service.serving import metrics as exposition
from service.serving.answers import Answer, ProblemError
from service.serving.fleet import Fleet
from service.serving.metrics import ServingMetrics
from service.serving.predict import Served
from service.serving.routes import Place, Route


class Probes:
    """The open addresses of one process."""

    def __init__(self, fleet: Fleet, metrics: ServingMetrics) -> None:
        """Looks at both whenever it is asked."""
        self._fleet = fleet
        self._metrics = metrics
        self._pages: dict[Route, Callable[[Place], Answer]] = {
            Route.HEALTH: lambda _: json_answer({"status": "alive"}),
            Route.READINESS: lambda _: self._readiness(),
            Route.METRICS: lambda _: self._exposition(),
            Route.SERVER: lambda _: json_answer(inference.SERVER),
            Route.LIVE: lambda _: json_answer({"live": True}),
            Route.READY: lambda _: _readied({}, ready=self._ready),
            Route.MODEL_READY: self._model_ready,
        }

    def answer(self, place: Place) -> Answer | None:
        """The page of an address; None for those that need a key.

        Raises:
            ProblemError: 404.
        """
        page = self._pages.get(place.route)
        return page(place) if page else None

    @property
    def _ready(self) -> bool:
        statuses = self._fleet.statuses()
        return not self._fleet.leaving and statuses is not None and all(status.ready for status in statuses)

    def _readiness(self) -> Answer:
        statuses = self._fleet.statuses()
        models = [{**asdict(status), "ready": status.ready} for status in statuses or ()]
        why = {} if statuses is not None else {"detail": "Postgres was not reached yet; check EXPUNGE_DATABASE_URL"}
        if self._fleet.leaving:
            why = {"detail": "this server is about to stop: send requests to another one"}
        return _readied({"models": models, **why}, ready=self._ready)

    def _exposition(self) -> Answer:
        self._fleet.observe()
        return Answer(200, self._metrics.exposition(), exposition.CONTENT_TYPE.encode())

    def _model_ready(self, place: Place) -> Answer:
        replica = find(self._fleet, place.model).replica
        pointer = replica.pointer
        ready = (
            pointer is not None
            and place.version in {None, *map(str, replica.versions)}
            and replica.leased
            and replica.reachable
            and pointer.live >= max(1, replica.min_shards)
        )
        return _readied({"name": place.model}, ready=ready)


def find(fleet: Fleet, model: str) -> Served:
    """The model of that name.

    Raises:
        ProblemError: 404.
    """
    served = fleet.find(model)
    if served is None:
        detail = "no version of such a model was published; GET /v1/models of the API lists them"
        raise ProblemError(404, "no-such-model", detail)
    return served


def json_answer(body: dict[str, Any], status: int = 200) -> Answer:
    """A JSON body as a response."""
    return Answer(status, json.dumps(body).encode())


def _readied(body: dict[str, Any], *, ready: bool) -> Answer:
    return json_answer({"ready": ready, **body}, 200 if ready else 503)
