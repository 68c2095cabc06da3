"""A toy causal language model for the model server's tests, and a reader of its streams."""

import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import httpx
from serving_kit import RECIPE, Client, ToyEngine, ToyPredictor

from shards.assembly import Assembly
from shards.engine.completion import Sampling, Step

TALK = dataclasses.replace(RECIPE, task="completion", classes=())


class TalkerPredictor(ToyPredictor):
    """Says its mean weight again and again, and counts how often it was asked."""

    engine: "type[Talker]"

    def complete(self, prompt: str, sampling: Sampling) -> Iterator[Step]:
        mean = sum(tensor.weight for tensor in self.tensors) / len(self.tensors)
        for number in range(1, sampling.max_new_tokens + 1):
            time.sleep(self.pace)
            with self.engine.lock:
                self.engine.spoken[mean] += 1
            text = f"{mean:g};{self.engine.filling}"
            last = number == sampling.max_new_tokens
            yield Step(text, number, len(prompt.split()), "length" if last else None)


class Talker(ToyEngine):
    """Make a subclass for each test: it counts."""

    pace = 0.01
    filling = ""
    lock: ClassVar[threading.Lock] = threading.Lock()
    spoken: ClassVar[Counter[float]] = Counter()

    def __init_subclass__(cls) -> None:
        cls.spoken = Counter()

    def build(self, assembly: Assembly) -> TalkerPredictor:
        predictor = TalkerPredictor(super().build(assembly).tensors, self.pace)
        predictor.engine = type(self)
        return predictor


def complete(client: Client, **fields: Any) -> httpx.Response:
    """One call, not streamed."""
    return client.post("/v1/completions", json={"model": client.toy.name, "prompt": "say it"} | fields)


class Heard:
    """A stream as a client hears it, on a thread of its own."""

    def __init__(self, client: Client, **fields: Any) -> None:
        """Begins at once."""
        self.status = 0
        self.version = 0
        self.words: list[str] = []
        self.error: dict[str, Any] = {}
        self.done = False
        self.whole = False
        """Whether the response came to its protocol's end."""
        self.usage: dict[str, int] = {}
        self._stop = threading.Event()
        self._body = {"model": client.toy.name, "prompt": "say it", "stream": True} | fields
        self._url = str(client.base_url).rstrip("/") + "/v1/completions"
        self._headers = {"authorization": f"Bearer {client.toy.token}"}
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def join(self) -> "Heard":
        """Wait for its end."""
        self._thread.join()
        return self

    def hang_up(self) -> None:
        """Go away in the middle."""
        self._stop.set()
        self._thread.join()

    def _listen(self) -> None:
        with (
            httpx.Client(trust_env=False, timeout=20) as client,
            client.stream("POST", self._url, json=self._body, headers=self._headers) as answer,
        ):
            self.status = answer.status_code
            self.version = int(answer.headers.get("x-expunge-version", 0))
            try:
                for line in answer.iter_lines():
                    self._take(line)
                    if self._stop.is_set():
                        return
                self.whole = True
            except httpx.RemoteProtocolError:
                pass

    def _take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            self.error = event.get("error") or self.error
            self.usage = event.get("usage") or self.usage
            for choice in event.get("choices", ()):
                self.words += [word for word in choice["text"].split(";") if word.strip("x")]
