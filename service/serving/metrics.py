"""Metrics of the model server. Labels are models and fixed words: never an input, a caller or a request."""

from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class ServingMetrics:
    """One registry per process, so that tests may start several servers side by side."""

    def __init__(self) -> None:
        """Everything starts at zero; a model appears with its first value."""
        self.registry = CollectorRegistry()
        self.version = Gauge(
            "expunge_serving_version", "Version answered from; 0 is none", ["model"], registry=self.registry
        )
        self.floor = Gauge(
            "expunge_serving_floor",
            "Lowest version that may be answered from",
            ["model"],
            registry=self.registry,
        )
        self.leased = Gauge(
            "expunge_serving_lease_held", "1 while the lease is valid", ["model"], registry=self.registry
        )
        self.swaps = Counter(
            "expunge_swaps",
            "Pointer swaps by result: swapped, kept_old, dropped",
            ["model", "result"],
            registry=self.registry,
        )
        self.load_failures = Counter(
            "expunge_artifact_load_failures",
            "Artefacts that could not be loaded, by reason",
            ["model", "reason"],
            registry=self.registry,
        )
        self.beats = Counter(
            "expunge_lease_beats",
            "Heartbeats by result: granted, refused, failed",
            ["model", "result"],
            registry=self.registry,
        )
        self.predictions = Counter(
            "expunge_predictions",
            "Prediction requests by result",
            ["model", "result"],
            registry=self.registry,
        )
        self.answered = Counter(
            "expunge_version_answers",
            "Answers of each version that is served: answered, engine_failed",
            ["model", "version", "result"],
            registry=self.registry,
        )
        self.canary = Gauge(
            "expunge_serving_canary_share",
            "Per cent of the requests that a canary gets; 0 is none",
            ["model"],
            registry=self.registry,
        )
        self._versions: dict[str, set[int]] = {}
        self.recomputed = Counter(
            "expunge_predictions_recomputed",
            "Answers computed again since the floor rose",
            ["model"],
            registry=self.registry,
        )
        self.duration = Histogram(
            "expunge_prediction_duration_seconds",
            "Time from the last byte of a request to its answer",
            ["model"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "expunge_predictions_in_flight", "Requests being answered", ["model"], registry=self.registry
        )

    def count(self, model: str, version: int, result: str) -> None:
        """Count an answer by the version that it came from."""
        self._versions.setdefault(model, set()).add(version)
        self.answered.labels(model, str(version), result).inc()

    def forget_below(self, model: str, covers: int) -> None:
        """Drop the counts of versions that answer no more: each deletion makes a version, labels must not pile up."""
        gone = {version for version in self._versions.get(model, set()) if version < covers}
        self._versions.get(model, set()).difference_update(gone)
        for version in gone:
            for result in ("answered", "engine_failed"):
                with suppress(KeyError):
                    self.answered.remove(model, str(version), result)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
