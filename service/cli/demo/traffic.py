"""Prediction traffic that keeps running while things change, and what it saw."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from service.cli.demo.assets import DemoError

VERSION_HEADER = "X-Expunge-Version"


@dataclass(frozen=True, slots=True)
class Seen:
    """What all senders saw so far."""

    total: int
    failed: int
    """Answers other than 200, and connections that broke."""
    stale: int
    """Sent after the floor was known to be raised, and answered from below it."""
    after_floor: int
    """Answers to requests sent after that, of the server that gave fewest."""
    versions: tuple[int, ...]
    """Every version that answered."""
    failures: dict[str, int]
    """How often each kind of failure occurred."""


@dataclass
class Traffic:
    """One sender per model server; a sender's next request leaves when the last one is answered, after a pause."""

    servers: Sequence[str]
    model: str
    api_key: str
    texts: Sequence[str]
    pause: float = 0.05
    """Seconds between an answer and the next request."""
    floor: int = 0
    """Set it once the API has said `deactivated`: answers to requests sent from then on count as stale below it."""
    seconds: list[float] = field(default_factory=list[float], init=False)
    """How long each answer took that was a prediction, in the order of their arrival."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _threads: list[threading.Thread] = field(default_factory=list, init=False)
    _total: int = field(default=0, init=False)
    _stale: int = field(default=0, init=False)
    _after: Counter[str] = field(default_factory=Counter, init=False)
    _versions: set[int] = field(default_factory=set, init=False)
    _failures: Counter[str] = field(default_factory=Counter, init=False)

    def start(self) -> None:
        """Begin to send."""
        for server in self.servers:
            thread = threading.Thread(target=self._send, args=(server,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> Seen:
        """Stop after the answers that are on their way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.seen()

    def seen(self) -> Seen:
        """The counts at this moment."""
        with self._lock:
            return Seen(
                self._total,
                self._failures.total(),
                self._stale,
                min((self._after[server] for server in self.servers), default=0),
                tuple(sorted(self._versions)),
                dict(self._failures),
            )

    def wait_for(self, count: int, *, timeout: float = 60.0) -> None:
        """Return when so many more requests were answered. Raises `DemoError` when they are not in time."""
        goal = self.seen().total + count
        self._wait(lambda: self.seen().total >= goal, timeout)

    def wait_for_each(self, count: int, *, timeout: float = 60.0) -> None:
        """Return when every server has answered so many requests that were sent after `floor` was set."""
        self._wait(lambda: self.seen().after_floor >= count, timeout)

    @staticmethod
    def _wait(done: Callable[[], bool], timeout: float) -> None:
        until = time.monotonic() + timeout
        while not done():
            if time.monotonic() > until:
                raise DemoError("the model servers stopped answering predictions")
            time.sleep(0.01)

    def _send(self, server: str) -> None:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        with httpx.Client(base_url=server, headers=headers, timeout=30.0) as client:
            for text in itertools.cycle(self.texts):
                if self._stop.is_set():
                    return
                floor = self.floor  # as known before the request leaves
                sent = time.monotonic()
                try:
                    answer = client.post(f"/v1/models/{self.model}/predict", json={"inputs": [text]})
                    self._note(server, answer, floor, time.monotonic() - sent)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self._note_failure(type(error).__name__)
                self._stop.wait(self.pause)

    def _note(self, server: str, answer: httpx.Response, floor: int, seconds: float) -> None:
        if not answer.is_success:
            self._note_failure(f"HTTP {answer.status_code}")
            return
        version = int(answer.headers[VERSION_HEADER])
        with self._lock:
            self._total += 1
            self.seconds.append(seconds)
            self._versions.add(version)
            self._stale += version < floor
            self._after[server] += floor > 0

    def _note_failure(self, what: str) -> None:
        with self._lock:
            self._total += 1
            self._failures[what] += 1
