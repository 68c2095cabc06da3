"""A running `expunge up` with the tiny model, for acceptance tests: HTTP in, evidence out, and real signals."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tiny import WORDS, tiny_recipe

from service.cli.demo.stack import Stack, run_json, running
from service.cli.demo.traffic import Traffic
from shards.recipe import Backbone, Recipe

DONE = {"deactivated", "erasing", "completed"}


def text_of(name: str) -> str:
    """Some words that depend on the name alone."""
    number = sum(name.encode())
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 8))


@dataclass
class Installation:
    stack: Stack
    http: httpx.Client
    servers: httpx.Client
    backbone: Backbone

    @property
    def document(self) -> dict[str, Any]:
        return json.loads((self.stack.state / "run" / "up.json").read_text())

    def kill(self, program: str, number: signal.Signals = signal.SIGKILL) -> int:
        pid = self.document["programs"][program]
        os.kill(pid, number)
        return pid

    def post(self, path: str, body: Any = None, *, status: int | None = None, **headers: str) -> dict[str, Any]:
        answer = self.http.post(path, json=body, headers=headers)
        assert answer.status_code == status if status else answer.is_success, (answer.status_code, answer.text)
        return answer.json()

    def get(self, path: str) -> dict[str, Any]:
        answer = self.http.get(path)
        if answer.status_code == 503:  # Postgres is away: whoever waits asks again
            raise httpx.ConnectError("503")
        assert answer.is_success, (path, answer.text)
        return answer.json()

    def upload(self, dataset: str, rows: dict[str, int], labels: tuple[str, str] = ("no", "yes")) -> dict[str, Any]:
        lines = [
            {
                "record_id": f"{dataset}-{subject}-{row}",
                "subject": {"type": "user", "value": subject},
                "text": text_of(f"{subject}{row}"),
                "label": labels[(sum(subject.encode()) + row) % 2],
            }
            for subject, count in rows.items()
            for row in range(count)
        ]
        body = "".join(json.dumps(line) + "\n" for line in lines)
        answer = self.http.post(f"/v1/datasets/{dataset}/records", content=body)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def recipe(self, **changes: Any) -> Recipe:
        """The tiny recipe with other fields."""
        return tiny_recipe(self.backbone, **changes)

    def make(self, name: str, *, subjects: int, evaluation: bool = False, **recipe: Any) -> None:
        """A dataset of its own with a model that is not trained yet."""
        chosen = self.recipe(**({"seed": int.from_bytes(name.encode()[-6:])} | recipe))
        grid = {"shards": chosen.shards, "slices": chosen.slices, "classes": list(chosen.classes), "task": chosen.task}
        labels = ("-1.5", "2.25") if chosen.task == "regression" else ("no", "yes")
        self.post("/v1/datasets", {"name": f"{name}-data", **grid})
        self.upload(f"{name}-data", {f"{name}{number}": 1 + number % 3 for number in range(subjects)}, labels)
        body: dict[str, Any] = {"name": name, "dataset": f"{name}-data", "recipe": chosen.to_json()}
        if evaluation:
            self.post("/v1/datasets", {"name": f"{name}-held-out", **grid, "deletable": False})
            self.upload(f"{name}-held-out", {f"{name}-other{number}": 2 for number in range(20)}, labels)
            body["evaluation_dataset"] = f"{name}-held-out"
        self.post("/v1/models", body)

    def train(self, name: str, *, within: float = 120.0) -> dict[str, Any]:
        self.post(f"/v1/models/{name}/rebuild", status=202)
        return self.await_built(name, within=within)

    def await_built(self, name: str, *, more_than: int = 0, within: float = 120.0) -> dict[str, Any]:
        def built() -> dict[str, Any] | None:
            model = self.get(f"/v1/models/{name}")
            waiting = model["jobs"].get("queued", 0) + model["jobs"].get("running", 0)
            done = model["version"] > more_than and not model["building"] and not waiting
            return model if done else None

        return self.until(built, within=within)

    def ask(self, subject: str, models: list[str] | None = None) -> str:
        body: dict[str, Any] = {"subject": {"type": "user", "value": subject}}
        if models:
            body["models"] = models
        return self.post("/v1/deletion-requests", body, status=202)["request_id"]

    def request(self, request_id: str) -> dict[str, Any]:
        return self.get(f"/v1/deletion-requests/{request_id}")

    def await_state(self, request_id: str, states: set[str], *, within: float = 60.0) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            found = self.request(request_id)
            assert found["state"] != "failed", found
            return found if found["state"] in states else None

        return self.until(reached, within=within)

    def until(self, probe: Any, *, within: float) -> Any:
        end = time.monotonic() + within
        while time.monotonic() < end:
            try:
                if found := probe():
                    return found
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"not within {within} s: {probe()}")

    def predict(self, server: int, model: str, *texts: str) -> httpx.Response:
        url = f"{self.stack.servers[server]}/v1/models/{model}/predict"
        return self.servers.post(url, json={"inputs": list(texts)})

    def await_serving(self, model: str, version: int, *, within: float = 60.0) -> None:
        """Every model server answers from `version` or later."""

        def served() -> bool:
            answers = [self.predict(each, model, "w1") for each in range(len(self.stack.servers))]
            return all(a.is_success and int(a.headers["X-Expunge-Version"]) >= version for a in answers)

        self.until(served, within=within)

    def traffic(self, model: str) -> Traffic:
        texts = [text_of(f"t{number}") for number in range(20)]
        return Traffic(self.stack.servers, model, self.stack.api_key, texts, pause=0.01)

    def certificate(self, request_id: str, model: str, directory: Path) -> tuple[int, dict[str, Any]]:
        """Download the certificate and check it as an auditor would; exit code and the checks."""
        path = directory / f"{request_id}.json"
        path.write_text(json.dumps(self.get(f"/v1/deletion-requests/{request_id}/certificate?model={model}")))
        artifacts = str(self.stack.state / "artifacts")
        code, document, _ = run_json(
            ["verify", str(path), "--key", str(self.stack.public_key), "--artifacts", artifacts, "--json"]
        )
        return code, document


@contextmanager
def installation(home: Path, backbone: Backbone) -> Iterator[Installation]:
    with running(home, lambda: None) as stack:
        headers = {"Authorization": f"Bearer {stack.api_key}"}
        with (
            httpx.Client(base_url=stack.api_url, headers=headers, timeout=30.0) as http,
            httpx.Client(headers=headers, timeout=30.0) as servers,
        ):
            yield Installation(stack, http, servers, backbone)
