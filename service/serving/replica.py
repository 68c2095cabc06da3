"""One model in one process: the pointer and the fence behind one lock. No I/O; every method is quick."""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from service.domain.answers import Answers
from service.serving.fence import Fence
from service.serving.metrics import ServingMetrics
from shards.engine.interface import Predictor
from shards.recipe import Recipe

Clock = Callable[[], float]


def boottime() -> float:
    """Seconds on a clock that runs on while the machine sleeps (assumption A1); never a wall clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, slots=True, eq=False)
class Pointer:
    """A version in memory, ready to answer."""

    version: int
    assembly: str
    """Digest."""
    predictor: Predictor
    recipe: Recipe
    live: int
    """Shards that answer."""
    of: int
    """Shards of the recipe."""


@dataclass(frozen=True, slots=True)
class Wish:
    """Which version a request wants to be answered from, where a canary and a stable one do; never by its content."""

    least: int = 0
    """The lowest that it takes."""
    version: int = 0
    """The very one; 0: any."""
    canary: bool | None = None
    """Whether it wants the canary; None: as the dice fall."""


ANY = Wish()


class Replica:
    """What requests, heartbeats and the loader share of one model."""

    def __init__(self, model_id: int, model: str, metrics: ServingMetrics, *, clock: Clock = boottime) -> None:
        """Serves nothing until a version is pointed at and a lease is granted."""
        self.model_id = model_id
        self.model = model
        self.covers_rose = threading.Event()
        """Set when a heartbeat should be sent at once: it acknowledges."""
        self.on_floor: Callable[[], None] = lambda: None
        """Called after the floor rose, on the thread that raised it."""
        self.min_shards = 1
        """With fewer live shards nothing is answered: the model's policy, followed within seconds."""
        self.answers = Answers.PROBABILITIES
        """How much answers tell: the model's policy, followed within seconds."""
        self.expected_at: datetime | None = None
        """While too few shards are live: when a rebuild is expected to serve; None: not known, or none is planned."""
        self.share = 0
        """Per cent of the requests that a canary gets."""
        self.failed = 0
        """Newest canary on which the engine failed; for the lease to report."""
        self.on_failed: Callable[[], None] = lambda: None
        self.reachable = True
        """False where what computes the answers does not respond: an upstream that is down."""
        self.problem = ""
        """Why the newest version is not served; empty when it is."""
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()
        self._fence = Fence()
        self._pointer: Pointer | None = None
        self._stable: Pointer | None = None
        self._told = 0

    @property
    def fence(self) -> Fence:
        """The fence at this moment."""
        return self._fence

    @property
    def pointer(self) -> Pointer | None:
        """What new work would start on; while a canary runs, the canary."""
        return self._pointer

    @property
    def stable(self) -> Pointer | None:
        """What new work starts on beside a canary; None where no canary runs."""
        return self._stable

    @property
    def versions(self) -> list[int]:
        """What new work may start on, oldest first."""
        return [each.version for each in (self._stable, self._pointer) if each]

    @property
    def leased(self) -> bool:
        """Whether the lease is valid now."""
        return self._clock() < self._fence.lease_until

    def begin(self, wish: Wish = ANY) -> Pointer | None:
        """Start work on the newest version, or on the stable one beside a canary.

        End it with `abandon`, or with `check` and `sent`. None where nothing may be answered now: `why_not` says why.
        """
        with self._lock:
            pointer = self._choose(wish)
            if pointer is None or not self._fence.may_answer(pointer.version, self._clock()):
                return None
            self._fence = self._fence.begin(pointer.version)
            return pointer

    def _choose(self, wish: Wish) -> Pointer | None:
        newest, stable = self._pointer, self._stable
        if stable is None or newest is None or wish.least > stable.version:
            return newest
        if wish.version:
            return stable if wish.version == stable.version else newest
        canary = secrets.randbelow(100) < self.share if wish.canary is None else wish.canary
        return newest if canary else stable

    def fail(self, version: int) -> None:
        """The engine failed on `version`: a canary ends with that."""
        if self._stable is not None and version > self._stable.version:
            self.failed = max(self.failed, version)
            self.on_failed()

    def abandon(self, version: int) -> None:
        """Work ends without an answer."""
        with self._lock:
            self._fence = self._fence.abandon(version)
            self._tell()

    def check(self, version: int) -> bool:
        """The final check (rule 7). Where it passes, the answer counts as being sent from this moment.

        Check and count are one step under the lock: a heartbeat thread cannot acknowledge between them.
        """
        with self._lock:
            if not self._fence.may_answer(version, self._clock()):
                return False
            self._fence = self._fence.send(version)
            return True

    def check_part(self, version: int) -> bool:
        """The final check of one part of a stream, whose work goes on until `abandon`; `sent` follows each part."""
        with self._lock:
            if not self._fence.may_answer(version, self._clock()):
                return False
            self._fence = self._fence.send_part(version)
            return True

    def sent(self, version: int) -> None:
        """The answer is with the kernel, or its connection is gone."""
        with self._lock:
            self._fence = self._fence.sent(version)
            self._tell()

    def may_answer(self, version: int) -> bool:
        """The final check again, for an answer that had to wait on its way."""
        return self._fence.may_answer(version, self._clock())

    def why_not(self) -> str:
        """Why nothing is answered now, for a problem's detail."""
        if self._pointer is None:
            return self.problem or "no version of the model is loaded yet"
        return "this server holds no valid lease: it has not reached Postgres for longer than the lease's time to live"

    def advance(self, pointer: Pointer | None, floor: int, stable: int = 0) -> list[Pointer]:
        """Swap to a newer pointer and raise the floor in one step (rule 6). Returns the pointers that went.

        The one of version `stable` goes on answering beside the newer one, if it did until now.
        """
        with self._lock:
            before = self._fence
            held = [each for each in (self._pointer, self._stable) if each]
            self._fence = before.advance(pointer.version if pointer else 0, floor, stable)
            known = {each.version: each for each in ([pointer] if pointer else []) + held}
            old, self._pointer = self._pointer, known.get(self._fence.pointer)
            self._stable = known.get(self._fence.stable)
            raised = self._fence.local_floor > before.local_floor
            swapped = self._pointer is not old
            self._tell()
        if raised:
            self.on_floor()
        if swapped:
            self._metrics.swaps.labels(self.model, "swapped" if self._pointer else "dropped").inc()
        return [each for each in held if each is not self._pointer and each is not self._stable]

    def grant(self, sent_at: float, ttl: float) -> None:
        """A heartbeat that was sent at `sent_at` was granted."""
        with self._lock:
            self._fence = self._fence.grant(sent_at, ttl)

    def retire(self, why: str) -> Pointer | None:
        """Answer nothing, ever again. Returns the pointer that went."""
        with self._lock:
            old, self._pointer, self._stable = self._pointer, None, None
            self._fence = self._fence.retire()
            self.problem = why
        self.on_floor()
        return old

    def covers(self) -> int:
        """What the next heartbeat promises; a later rise sets `covers_rose`."""
        with self._lock:
            self._told = self._fence.covers
            return self._told

    def _tell(self) -> None:
        if self._fence.covers > self._told:
            self.covers_rose.set()

    def observe(self) -> None:
        """Bring the gauges up to date, when they are asked for."""
        pointer = self._pointer
        self._metrics.version.labels(self.model).set(pointer.version if pointer else 0)
        self._metrics.floor.labels(self.model).set(self._fence.local_floor)
        self._metrics.leased.labels(self.model).set(self.leased)
        self._metrics.canary.labels(self.model).set(self.share if self._stable else 0)
        self._metrics.forget_below(self.model, self._fence.covers)
