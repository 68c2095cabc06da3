"""`swaps`: predictions while a hundred versions follow one another."""

import time
from statistics import quantiles

from benchmarks import prepared, system
from benchmarks.prepared import Victims
from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.show import Screen
from service.cli.demo.traffic import Traffic

SWAPS = 100
SPACING = 1.0
"""Seconds from one swap to the next deletion request: an answer that a swap overtakes is computed anew, and where
predictions take longer than swaps are apart the figure tells of that alone."""
SENDERS = 2
"""Per model server."""
PAUSE = 0.02


def measure(screen: Screen, *, full: bool) -> Measured:  # noqa: ARG001 - one size
    """Predict in quiet, then as long as a hundred deactivations take; each swaps what both model servers serve."""
    with prepared.running(screen) as (trained, stack, calls, version):
        texts = [review.text for review in trained.sample.training[:200]]
        victims = Victims(trained, version)
        traffic = Traffic(stack.servers * SENDERS, system.MODEL, stack.api_key, texts, pause=PAUSE)
        traffic.start()
        try:
            traffic.wait_for(200)  # warm
            skipped = len(traffic.seconds)
            began = time.monotonic()
            with screen.bar("predicting in quiet", None):
                time.sleep(SWAPS * SPACING)
            quiet = traffic.seconds[skipped:]
            with screen.bar("predicting while versions change", SWAPS) as advance:
                for _ in range(SWAPS):
                    traffic.floor = victims.delete(calls).version
                    time.sleep(SPACING)
                    advance(1)
            busy = traffic.seconds[skipped + len(quiet) :]
            took = time.monotonic() - began
        finally:
            seen = traffic.stop()
    if seen.after_floor < SWAPS:
        raise BenchmarkError(f"only {seen.after_floor} predictions of a server came after a swap")
    before, meanwhile = _p99_ms(quiet), _p99_ms(busy)
    return Measured(
        {
            "failed": seen.failed,
            "stale": seen.stale,
            "p99_over_quiet": meanwhile / before,
            "p99_ms": meanwhile,
            "p99_ms_quiet": before,
        },
        {
            "swaps": SWAPS,
            "predictions": seen.total,
            "predictions_per_s": round(len(busy + quiet) / took, 1),
            "senders": len(stack.servers) * SENDERS,
            "pause_s": PAUSE,
            "spacing_s": SPACING,
            **prepared.GRID,
            "note": "stale: sent after the client had read `deactivated`, and answered from below that floor",
        },
    )


def _p99_ms(seconds: list[float]) -> float:
    return quantiles(seconds, n=100, method="inclusive")[98] * 1000
