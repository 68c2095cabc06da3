"""`burst`: a thousand single requests at once, until the last one is deactivated."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from http.client import HTTPConnection
from urllib.parse import urlsplit

from benchmarks import prepared, system
from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.calls import DEACTIVATED
from service.cli.demo.sample import SUBJECT_TYPE
from service.cli.demo.show import Screen

REQUESTS = 1000
CLIENTS = 16
ACCEPTED = 202


class _Asker(threading.local):
    """A connection for each thread. Not httpx: it takes more of the two cores than the intake that is measured."""

    def __init__(self, url: str, api_key: str) -> None:
        self._http = HTTPConnection(urlsplit(url).netloc, timeout=60)
        self._headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}

    def ask(self, subject: str) -> str:
        """The id of an accepted request."""
        body = json.dumps({"subject": {"type": SUBJECT_TYPE, "value": subject}}).encode()
        self._http.request("POST", "/v1/deletion-requests", body, self._headers)
        answer = self._http.getresponse()
        text = answer.read()
        if answer.status != ACCEPTED:
            raise BenchmarkError(f"a request was answered with {answer.status}")
        return json.loads(text)["request_id"]


def measure(screen: Screen, *, full: bool) -> Measured:  # noqa: ARG001 - one size
    """Ask for the deletion of a thousand stand-in reviewers, one request each, from several clients."""
    with prepared.running(screen) as (trained, stack, calls, version):
        subjects = list(dict.fromkeys(review.reviewer for review in trained.sample.training))[:REQUESTS]
        asker = _Asker(stack.api_url, stack.api_key)
        with ThreadPoolExecutor(CLIENTS) as pool, screen.bar("asking for deletions", len(subjects)) as advance:

            def ask(subject: str) -> str:
                request_id = asker.ask(subject)
                advance(1)
                return request_id

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
