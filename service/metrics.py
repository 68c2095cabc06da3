"""Prometheus metrics: what each program measures itself. No label ever holds an identifier.

SQL is the store's: `/metrics` hands the figures that it read to `StateCollector`.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.domain.replays import ReplayOutcome
from service.domain.requests import State

JOB_STATES = ("queued", "running", "done", "cancelled", "failed")
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class ModelFigures(Protocol):
    """What is shown of a model."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def version(self) -> int: ...  # noqa: D102
    @property
    def floor(self) -> int: ...  # noqa: D102
    @property
    def cleared(self) -> int: ...  # noqa: D102


class LedgerGauges(Protocol):
    """What is shown of the ledger."""

    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def signed(self) -> int: ...  # noqa: D102
    @property
    def waiting(self) -> int: ...  # noqa: D102
    @property
    def lag(self) -> float: ...  # noqa: D102


class HttpMetrics:
    """Requests of one HTTP program, by route template."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register with `registry`."""
        self._seconds = Histogram(
            "expunge_http_request_duration_seconds",
            "Time from the request's first byte to the answer's last",
            ("method", "route", "status"),
            buckets=BUCKETS,
            registry=registry,
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        self._seconds.labels(method, route, str(status)).observe(seconds)


class StateFigures(Protocol):
    """What the state tables say, as plain numbers."""

    @property
    def requests_by_state(self) -> dict[str, int]: ...  # noqa: D102
    @property
    def jobs_by_state(self) -> dict[str, int]: ...  # noqa: D102
    @property
    def models(self) -> Iterable[ModelFigures]: ...  # noqa: D102
    @property
    def oldest_open_timestamp(self) -> float: ...  # noqa: D102
    @property
    def replays_by_outcome(self) -> dict[str, int]: ...  # noqa: D102
    @property
    def replayable_by_model(self) -> dict[str, float]: ...  # noqa: D102
    @property
    def ledger(self) -> LedgerGauges: ...  # noqa: D102


class StateCollector(Collector):
    """Gauges of the state tables, read anew at each scrape."""

    def __init__(self, read: Callable[[], StateFigures]) -> None:
        """`read` is called once a scrape."""
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: registering must not need a database."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The gauges."""
        figures = self._read()
        requests = GaugeMetricFamily("expunge_requests", "Deletion requests by state", labels=("state",))
        for state in State:
            requests.add_metric((state.value,), figures.requests_by_state.get(state.value, 0))
        yield requests
        jobs = GaugeMetricFamily("expunge_stage_jobs", "Training jobs by state", labels=("state",))
        for state in JOB_STATES:
            jobs.add_metric((state,), figures.jobs_by_state.get(state, 0))
        yield jobs
        models = list(figures.models)
        for field, meaning in (
            ("version", "The version that is to be served"),
            ("floor", "The lowest version that may be served"),
            ("cleared", "Every process covers this floor, or its lease has run out"),
        ):
            gauge = GaugeMetricFamily(f"expunge_model_{field}", meaning, labels=("model",))
            for model in models:
                gauge.add_metric((model.name,), getattr(model, field))
            yield gauge
        yield GaugeMetricFamily(
            "expunge_oldest_open_request_timestamp_seconds",
            "When the oldest request that has not ended was received; 0 without one",
            value=figures.oldest_open_timestamp,
        )
        yield from _replays(figures)
        yield from _ledger(figures.ledger)


def _replays(figures: StateFigures) -> Iterable[Metric]:
    replays = CounterMetricFamily("expunge_replays", "Served stages trained again from nothing", labels=("outcome",))
    for outcome in ReplayOutcome:
        replays.add_metric((outcome.value,), figures.replays_by_outcome.get(outcome.value, 0))
    yield replays
    share = GaugeMetricFamily(
        "expunge_replayable_share",
        "Share of served stages that a training machine seen within a week can train again to the same bits",
        labels=("model",),
    )
    for model, value in figures.replayable_by_model.items():
        share.add_metric((model,), value)
    yield share


def _ledger(figures: LedgerGauges) -> Iterable[Metric]:
    for name, meaning, value in (
        ("leaves", "Events in the ledger", figures.size),
        ("signed_leaves", "Events under a signed tree head", figures.signed),
        ("waiting", "Events without a leaf", figures.waiting),
        ("lag_seconds", "Age of the oldest event without a leaf", figures.lag),
    ):
        yield GaugeMetricFamily(f"expunge_ledger_{name}", meaning, value=value)
