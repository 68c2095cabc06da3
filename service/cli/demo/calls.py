"""The demo's calls to the public HTTP API: nothing that an application could not do."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from service.cli.demo.assets import DemoError
from service.cli.demo.sample import Review
from service.cli.demo.traffic import VERSION_HEADER

BATCH = 32
"""Inputs of one prediction call when accuracy is measured."""
DEACTIVATED = frozenset({"deactivated", "erasing", "completed"})
"""`deactivated` and what follows it; a request may have gone on by the time that it is asked for."""
_POLL = 0.002


@dataclass(frozen=True, slots=True)
class Deactivation:
    """A request's way to `deactivated`."""

    request_id: str
    client_ms: float
    """From the 202's arrival to the first answer that said so."""
    state: Mapping[str, Any]
    """The request as it was then."""


class Calls:
    """A client of the control API with the first key."""

    def __init__(self, api_url: str, api_key: str) -> None:
        """Connects at the first call."""
        headers = {"Authorization": f"Bearer {api_key}"}
        self._headers = headers
        self._http = httpx.Client(base_url=api_url, headers=headers, timeout=60.0)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        """GET; raises `DemoError` with the problem's detail."""
        return self._answer(self._http.get(path))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """POST JSON; raises `DemoError` with the problem's detail."""
        return self._answer(self._http.post(path, json=body))

    def upload(self, dataset: str, reviews: Sequence[Review], progress: Callable[[int], None]) -> dict[str, Any]:
        """Upload reviews as NDJSON, telling how many lines have left."""

        def lines() -> Iterator[bytes]:
            for start in range(0, len(reviews), 50):
                part = reviews[start : start + 50]
                yield b"".join(json.dumps(review.to_json()).encode() + b"\n" for review in part)
                progress(len(part))

        headers = {"Content-Type": "application/x-ndjson"}
        return self._answer(
            self._http.post(f"/v1/datasets/{dataset}/records", content=lines(), headers=headers)
        )

    def delete(self, subject: Mapping[str, str]) -> Deactivation:
        """Send a deletion request, and ask until it is deactivated.

        The reading of the clock is the 202's arrival; asking costs the same CPU as the work, so the way is seen a
        little longer than it is.
        """
        answer = self._http.post("/v1/deletion-requests", json={"subject": subject})
        began = time.monotonic()
        request_id = self._answer(answer)["request_id"]
        while True:
            state = self.get(f"/v1/deletion-requests/{request_id}")
            if state["state"] in DEACTIVATED:
                return Deactivation(request_id, (time.monotonic() - began) * 1000, state)
            if state["state"] == "failed" or time.monotonic() - began > 60:
                raise DemoError(f"the request is {state['state']} after {time.monotonic() - began:.0f} s")
            time.sleep(_POLL)

    def accuracy(
        self, servers: Sequence[str], model: str, reviews: Sequence[Review], progress: Callable[[int], None]
    ) -> tuple[float, frozenset[int]]:
        """Share of reviews whose label the model servers give, and the versions that answered."""
        parts = [reviews[start : start + BATCH] for start in range(0, len(reviews), BATCH)]
        with httpx.Client(headers=self._headers, timeout=60.0) as http, ThreadPoolExecutor(len(servers)) as pool:

            def ask(number: int) -> tuple[int, int]:
                part = parts[number]
                url = f"{servers[number % len(servers)]}/v1/models/{model}/predict"
                answer = http.post(url, json={"inputs": [review.text for review in part]})
                outputs = self._answer(answer)["outputs"]
                progress(len(part))
                right = sum(out["label"] == review.label for out, review in zip(outputs, part, strict=True))
                return right, int(answer.headers[VERSION_HEADER])

            found = list(pool.map(ask, range(len(parts))))
        return sum(right for right, _ in found) / len(reviews), frozenset(version for _, version in found)

    def wait_serving(self, servers: Iterable[str], model: str, version: int, *, within: float = 60.0) -> None:
        """Return when every model server answers from `version` or a later one."""
        until = time.monotonic() + within
        with httpx.Client(headers=self._headers, timeout=30.0) as http:
            for server in servers:
                while not _serves(http, f"{server}/v1/models/{model}/predict", version):
                    if time.monotonic() > until:
                        raise DemoError(f"{server} does not serve version {version} after {within:.0f} s")
                    time.sleep(0.05)

    @staticmethod
    def _answer(answer: httpx.Response) -> dict[str, Any]:
        if answer.is_success:
            return answer.json()
        try:
            detail = answer.json().get("detail", "")
        except ValueError:
            detail = answer.text[:200]
        path = answer.request.url.path
        raise DemoError(f"{answer.request.method} {path} was answered with {answer.status_code}: {detail}")


def _serves(http: httpx.Client, url: str, version: int) -> bool:
    try:
        answer = http.post(url, json={"inputs": ["a short review"]})
    except httpx.HTTPError:
        return False
    return answer.is_success and int(answer.headers[VERSION_HEADER]) >= version
