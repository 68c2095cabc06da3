"""The demo's calls to the public HTTP API: nothing that an application could not do."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from service.cli.demo.assets import DemoError
from service.cli.demo.sample import Review
from service.cli.demo.traffic import VERSION_HEADER

BATCH = 32
"""Inputs of one prediction call when accuracy is measured."""
DEACTIVATED = frozenset({"deactivated", "erasing", "completed"})
"""`deactivated` and what follows it; a request may have gone on by the time that it is asked for."""
UNDER_WAY = frozenset({"received", "deactivating"})
"""What an erasure goes through before it: the API holds an answer as long as it is there."""


@dataclass(frozen=True, slots=True)
class Deactivation:
    """A request's way to `deactivated`."""

    request_id: str
    version: int
    """The version that every replica serves at least."""
    client_ms: float
    """From the 202's arrival to the first answer that said so."""
    server_ms: float
    """Between the request's creation and the target's deactivation, both by Postgres' clock."""


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

    def get(self, path: str, params: Mapping[str, str] | None = None) -> dict[str, Any]:
        """GET; raises `DemoError` with the problem's detail."""
        return self._answer(self._http.get(path, params=params))

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
        return self._answer(self._http.post(f"/v1/datasets/{dataset}/records", content=lines(), headers=headers))

    def delete(self, subject: Mapping[str, str], model: str) -> Deactivation:
        """Send a deletion request, and wait until it is deactivated. The clock starts when the 202 has arrived."""
        answer = self._http.post("/v1/deletion-requests", json={"subject": subject})
        began = time.monotonic()
        request_id = self._answer(answer)["request_id"]
        while True:
            request = self.get(f"/v1/deletion-requests/{request_id}", {"wait": "deactivated"})
            taken = (time.monotonic() - began) * 1000
            if request["state"] in DEACTIVATED:
                break
            if request["state"] not in UNDER_WAY or taken > 60_000:
                raise DemoError(f"the request is {request['state']} after {taken / 1000:.0f} s")
        target = next(each for each in request["targets"] if each["model"] == model)
        if target["deactivated_at"] is None:
            raise DemoError(f"the request ended as {request['outcome']}: nothing of the subject was found")
        way = datetime.fromisoformat(target["deactivated_at"]) - datetime.fromisoformat(request["created_at"])
        return Deactivation(request_id, target["version"], taken, way.total_seconds() * 1000)

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

    def laggards(self, servers: Sequence[str], model: str, version: int, *, within: float = 60.0) -> list[str]:
        """The model servers that, after some time, do not answer from `version` or a later one; empty is success."""
        left, until = list(servers), time.monotonic() + within
        with httpx.Client(headers=self._headers, timeout=30.0) as http:
            while left := [each for each in left if not _serves(http, f"{each}/v1/models/{model}/predict", version)]:
                if time.monotonic() > until:
                    break
                time.sleep(0.05)
        return left

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
