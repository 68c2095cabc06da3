"""The threads of one model in one process: heartbeats on a connection of their own, and the loader."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

import psycopg

from service.domain.errors import ExpungeError
from service.logs import get_logger
from service.serving.metrics import ServingMetrics
from service.serving.replica import Pointer, Replica, boottime
from service.store import canaries, forecasts, leases, models, objects
from service.store.database import Connection, connect
from service.store.objects import Object
from shards.errors import ShardsError

IDLE_POLL = 5.0
"""Seconds between looks for newly trained stages; what must be fast comes by NOTIFY and heartbeat."""
DYING_POLL = 0.02
SETTLE = 0.05
"""Pause before loading, after a version was announced."""
SLOWEST_RETRY = 10.0
FREE_TIMEOUT = 5.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    """What a lease needs to know of the process."""

    database_url: str
    name: str
    """The model server's name, for people."""
    ttl_ms: int

    @property
    def ttl(self) -> float:
        """Seconds."""
        return self.ttl_ms / 1000


class Holder(Protocol):
    """What answers of one model come from: the weights in this process, or those that an upstream holds for it."""

    damaged: list[leases.StageObject]
    """Stages whose object turned out missing or altered; for the lease to report."""
    freed: int
    """Below this version no weights are in memory any more."""
    confirms: bool
    """Whether it can ever tell that memory is free again."""

    def apply(self, target: leases.Target) -> bool:
        """Raise the floor, and move to `target` if that needs no loading; whether it is served now. Any thread."""
        ...

    def maintain(
        self, target: leases.Target, clean: Sequence[leases.StageObject], interrupted: Callable[[], bool]
    ) -> bool:
        """Drop what is out of service, load what is missing; whether nothing is left to do. The loader's thread."""
        ...

    def clear(self) -> bool:
        """Let go of everything, after the replica retired; whether nothing is in memory any more."""
        ...

    def retired(self, pointer: Pointer | None) -> None:
        """The replica gave this pointer up."""
        ...


class Lease:
    """Keeps one replica's row: registers, beats every quarter of the time to live, ends it when stopped."""

    def __init__(
        self,
        replica: Replica,
        weights: Holder,
        settings: LeaseSettings,
        metrics: ServingMetrics,
        on_ended: Callable[[], None],
    ) -> None:
        """`on_ended` is called once, when the row was found ended: the process stops listening, and exits (rule 11)."""
        self.process_id = uuid4()  # never reused (rule 2)
        self.replica = replica
        self._weights = weights
        self._settings = settings
        self._metrics = metrics
        self._on_ended = on_ended
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._registered = False
        replica.on_failed = self._wake.set
        self._threads = [
            threading.Thread(target=self._beat_until_stopped, name=f"beat-{replica.model_id}", daemon=True),
            threading.Thread(target=self._load_until_stopped, name=f"load-{replica.model_id}", daemon=True),
        ]

    def start(self) -> None:
        """Begin to load; the row is registered when a version is in memory."""
        for thread in self._threads:
            thread.start()
        self._wake.set()

    def refresh(self, connection: Connection) -> None:
        """Read the target and move to it: after a notification, or when a heartbeat told of another one."""
        self._weights.apply(leases.get_target(connection, self.replica.model_id))
        self._wake.set()

    def stop(self) -> None:
        """Answer nothing more, free the weights, end the row: the barrier need not wait for a clean stop."""
        self._halt("this server is shutting down")
        for thread in self._threads:
            thread.join()
        freed = self._free()
        if not self._registered:
            return
        try:
            with connect(self._settings.database_url) as connection:
                leases.end(connection, self.process_id)
                if freed:
                    leases.mark_freed(connection, self.process_id)
        except (ExpungeError, psycopg.Error) as error:  # the barrier will wait for the lease to run out
            log.warning("lease_not_ended", model=self.replica.model, reason=type(error).__name__)

    def _halt(self, why: str) -> None:
        self._stop.set()
        self._weights.retired(self.replica.retire(why))
        self._wake.set()
        self.replica.covers_rose.set()

    def _free(self) -> bool:
        until = time.monotonic() + (FREE_TIMEOUT if self._weights.confirms else 0)
        while not (freed := self._weights.clear()) and time.monotonic() < until:
            time.sleep(DYING_POLL)
        return freed

    # Heartbeats

    def _beat_until_stopped(self) -> None:
        connection: Connection | None = None
        while not self._stop.is_set():
            self.replica.covers_rose.wait(self._settings.ttl / 4)
            self.replica.covers_rose.clear()
            if self._stop.is_set():
                break
            try:
                connection = connection or connect(self._settings.database_url, autocommit=True)
                self._step(connection)
            except (ExpungeError, psycopg.Error) as error:
                self._metrics.beats.labels(self.replica.model, "failed").inc()
                log.warning("beat_failed", model=self.replica.model, reason=type(error).__name__)
                _close(connection)
                connection = None
                self._stop.wait(min(0.2, self._settings.ttl / 8))
        _close(connection)

    def _step(self, connection: Connection) -> None:
        if not self._registered and not self._register(connection):
            return
        sent_at = boottime()  # before anything is sent (rule 4)
        covers = self.replica.covers()
        if self._stop.is_set():  # a retired fence covers everything
            return
        with connection.transaction():
            answer = leases.beat(
                connection,
                process_id=self.process_id,
                model_id=self.replica.model_id,
                covers=covers,
                freed=self._weights.freed,
            )
        self._metrics.beats.labels(self.replica.model, "granted" if answer.granted else "refused").inc()
        if answer.ended:
            self._ended(connection)
            return
        if answer.granted:
            self.replica.grant(sent_at, self._settings.ttl)
        self._follow(connection, answer)

    def _register(self, connection: Connection) -> bool:
        covers = self.replica.covers()
        if self.replica.pointer is None or self._stop.is_set():
            return False
        with connection.transaction():
            answer = leases.register(
                connection,
                process_id=self.process_id,
                model_id=self.replica.model_id,
                name=self._settings.name,
                covers=covers,
                freed=self._weights.freed,
                ttl_ms=self._settings.ttl_ms,
            )
        self._registered = answer.granted
        if not answer.granted:
            self._follow(connection, answer)
            self.replica.covers_rose.set()
        return self._registered

    def _follow(self, connection: Connection, answer: leases.Beat) -> None:
        """The reply is also the poll that replaces a lost NOTIFY (rule 5)."""
        pointer = self.replica.pointer
        behind = pointer is None or pointer.version < answer.version
        if answer.floor > self.replica.fence.local_floor or (behind and not self.replica.problem):
            self.refresh(connection)

    def _ended(self, connection: Connection) -> None:
        """The barrier ended the row, or it is gone: stop, free, report, leave (rule 11)."""
        log.error("lease_ended", model=self.replica.model, process_id=str(self.process_id))
        self._halt("this server was fenced: a deactivation did not wait for it, and it exits")
        self._on_ended()
        self._threads[1].join()
        if self._free():
            leases.mark_freed(connection, self.process_id)

    # The loader

    def _load_until_stopped(self) -> None:
        connection: Connection | None = None
        wait, retry = 0.0, 0.0
        while not self._stop.is_set():
            woken = self._wake.wait(wait)
            self._wake.clear()
            if woken:  # what can serve without loading has swapped already: let its acknowledgement go first
                self._stop.wait(SETTLE)
            if self._stop.is_set():
                break
            try:
                connection = connection or connect(self._settings.database_url, autocommit=True)
                done = self._load(connection)
                retry = 0.0 if done or woken else retry
            except Exception as error:  # noqa: BLE001 - a loader that died would load and free nothing ever again
                done = False
                self.replica.problem = self.replica.problem or f"the model cannot be loaded: {type(error).__name__}"
                log.warning("load_failed", model=self.replica.model, reason=type(error).__name__)
                if not isinstance(error, ShardsError):
                    _close(connection)
                    connection = None
            retry = 0.0 if done else min(SLOWEST_RETRY, max(DYING_POLL, 2 * retry))
            wait = IDLE_POLL if done else retry
        _close(connection)

    def _load(self, connection: Connection) -> bool:
        if failed := self.replica.failed:
            with connection.transaction():
                canaries.report_failure(connection, self.replica.model_id, failed)
            self.replica.failed = 0
        target = leases.get_target(connection, self.replica.model_id)
        clean = leases.list_clean_artifacts(connection, self.replica.model_id)  # after the target: see `maintain`
        done = self._weights.maintain(target, clean, lambda: self._stop.is_set() or self._wake.is_set())
        self._forecast(connection)
        while self._weights.damaged:  # unusable from now on, and to be trained again (rule 20)
            stage = self._weights.damaged.pop()
            with connection.transaction():
                objects.mark_lost(connection, Object(stage.object_name, stage.digest, stage.stage_key, None))
                models.mark_rebuild_wanted(connection, self.replica.model_id)
        return done

    def _forecast(self, connection: Connection) -> None:
        """While too few shards are live, find when more will be: for whoever is refused."""
        pointer = self.replica.pointer
        short = pointer is not None and pointer.live < max(1, self.replica.min_shards)
        model = models.get_model_by_id(connection, self.replica.model_id) if short else None
        self.replica.expected_at = forecasts.expected_at(connection, model) if model else None


def _close(connection: Connection | None) -> None:
    if connection is not None:
        connection.close()
