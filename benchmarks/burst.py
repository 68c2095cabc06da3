"""`burst`: a thousand single requests at once, until the last one is deactivated."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import httpx

from benchmarks import prepared, system
from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.calls import DEACTIVATED
from service.cli.demo.sample import SUBJECT_TYPE
from service.cli.demo.show import Screen

REQUESTS = 1000
CLIENTS = 16
ACCEPTED = 202


def measure(screen: Screen, *, full: bool) -> Measured:  # noqa: ARG001 - one size
    """Ask for the deletion of a thousand stand-in reviewers, one request each, from several clients."""
    with prepared.running(screen) as (trained, stack, calls, version):
        subjects = list(dict.fromkeys(review.reviewer for review in trained.sample.training))[:REQUESTS]
        headers = {"Authorization": f"Bearer {stack.api_key}"}
        limits = httpx.Limits(max_connections=CLIENTS)
        with (
            httpx.Client(base_url=stack.api_url, headers=headers, timeout=60.0, limits=limits) as http,
            ThreadPoolExecutor(CLIENTS) as pool,
            screen.bar("asking for deletions", len(subjects)) as advance,
        ):

            def ask(subject: str) -> str:
                body = {"subject": {"type": SUBJECT_TYPE, "value": subject}}
                answer = http.post("/v1/deletion-requests", json=body)
                if answer.status_code != ACCEPTED:
                    raise BenchmarkError(f"a request was answered with {answer.status_code}")
                advance(1)
                return answer.json()["request_id"]

            began = time.monotonic()
            asked = list(pool.map(ask, subjects))
            accepted = time.monotonic() - began

        found = [calls.get(f"/v1/deletion-requests/{asked[-1]}")]
        while found[-1]["state"] not in DEACTIVATED:
            time.sleep(0.05)
            found[-1] = calls.get(f"/v1/deletion-requests/{asked[-1]}")
        found = [calls.get(f"/v1/deletion-requests/{each}") for each in asked]
        if odd := {each["state"] for each in found} - DEACTIVATED:
            raise BenchmarkError(f"requests are {', '.join(sorted(odd))} after the last one was deactivated")
        first = min(datetime.fromisoformat(each["created_at"]) for each in found)
        last = max(datetime.fromisoformat(target["deactivated_at"]) for each in found for target in each["targets"])
        versions = calls.get(f"/v1/models/{system.MODEL}")["version"] - version
    return Measured(
        {"seconds": (last - first).total_seconds(), "versions": versions, "accepted_s": accepted},
        {
            "requests": len(subjects),
            "clients": CLIENTS,
            "replicas": 2,
            **prepared.GRID,
            "note": "seconds: from the first request's receipt to the last deactivation, both by Postgres; the clients"
            " share the two cores",
        },
    )
