"""All models of one process: finds them, hears of new versions, starts and stops their replicas."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import psycopg

from service.domain.errors import ExpungeError
from service.logs import get_logger
from service.serving.lease import Holder, Lease, LeaseSettings
from service.serving.metrics import ServingMetrics
from service.serving.predict import Served
from service.serving.replica import Replica
from service.store import leases, models
from service.store.database import Connection, connect
from service.store.models import Model

POLL = 1.0
"""Seconds between looks for new models."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What the fleet needs to know."""

    lease: LeaseSettings
    listen_url: str
    """Direct to the primary: LISTEN does not pass poolers."""


@dataclass(frozen=True, slots=True)
class Status:
    """One model, for readiness."""

    model: str
    version: int
    floor: int
    leased: bool
    problem: str
    reachable: bool = True

    @property
    def ready(self) -> bool:
        """Whether it may be answered from now."""
        return self.version > 0 and self.leased and self.reachable


@dataclass(slots=True)
class _Member:
    served: Served
    lease: Lease


def is_served_here(model: Model) -> bool:
    """Every model but those of engine `external`, whose artefacts are for a server of the operator's own."""
    return model.recipe["engine"] != "external"


@dataclass(slots=True)
class Fleet:
    """The replicas of a process, by model id. `start` and `find` are for the event loop's thread."""

    settings: FleetSettings
    hold: Callable[[Replica], Holder]
    """Makes what answers a model; it loads nothing yet."""
    metrics: ServingMetrics
    on_ended: Callable[[], None]
    """Called when a lease was found ended: the process must exit (rule 11)."""
    wanted: Callable[[Model], bool] = is_served_here
    """Which models to serve."""
    leaving: bool = False
    """The process will stop soon: it answers, and says that it is not ready."""
    _members: dict[int, _Member] = field(default_factory=dict)
    _names: dict[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _looked: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look for models from now on; answers that wait on their way are taken back on `loop`."""
        self._loop = loop
        self._thread = threading.Thread(target=self._listen_until_stopped, name="listen", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop cleanly: every row is ended, every weight freed. Requests must have ended. Blocks."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for member in self._members.values():
            member.lease.stop()

    def find(self, name: str) -> Served | None:
        """The model of that name, if anything of it was ever published."""
        model_id = self._names.get(name)
        return None if model_id is None else self._members[model_id].served

    def names(self) -> list[str]:
        """The models of which anything was ever published."""
        return sorted(self._names)

    def statuses(self) -> list[Status] | None:
        """Where each model stands; None before the first look at the database."""
        if not self._looked.is_set():
            return None
        return [_status(member.served.replica) for member in list(self._members.values())]

    def observe(self) -> None:
        """Bring the gauges up to date."""
        for member in list(self._members.values()):
            member.served.replica.observe()

    def _listen_until_stopped(self) -> None:
        connection: Connection | None = None
        known = False
        while not self._stop.is_set():
            try:
                if connection is None:
                    connection = connect(self.settings.listen_url, autocommit=True)
                    leases.listen(connection)  # committed; only now read the state, also after a reconnect
                    self._refresh(connection, list(self._members))
                    known = False
                if not known:  # else an acknowledgement is on its way, and needs the processor
                    self._discover(connection)
                # A list: the generator holds the connection's lock, which `_refresh` needs.
                told = [notice.payload for notice in connection.notifies(timeout=POLL, stop_after=1)]
                known = bool(told) and all(map(self._is_known, told))
                for payload in told:
                    self._refresh(connection, [int(payload)] if self._is_known(payload) else list(self._members))
            except (ExpungeError, psycopg.Error) as error:
                log.warning("listen_failed", reason=type(error).__name__)
                if connection is not None:
                    connection.close()
                connection = None
                self._stop.wait(0.2)
        if connection is not None:
            connection.close()

    def _is_known(self, payload: str) -> bool:
        """Whether a notification names a model that is here already; where the hint is unclear all are looked at."""
        return payload.isdecimal() and int(payload) in self._members

    def _refresh(self, connection: Connection, model_ids: list[int]) -> None:
        for model_id in model_ids:
            self._members[model_id].lease.refresh(connection)

    def _discover(self, connection: Connection) -> None:
        for model in models.list_models(connection):
            if self.wanted(model) and model.version > 0 and model.model_id not in self._members:
                self._add(model.model_id, model.name)
        self._looked.set()

    def _add(self, model_id: int, name: str) -> None:
        replica = Replica(model_id, name, self.metrics)
        lease = Lease(replica, self.hold(replica), self.settings.lease, self.metrics, self.on_ended)
        served = Served(replica)
        replica.on_floor = lambda: self._cut(served)
        self._members[model_id] = _Member(served, lease)
        self._names[name] = model_id
        lease.start()

    def _cut(self, served: Served) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nothing waits
                self._loop.call_soon_threadsafe(lambda: served.outbox.cut(served.replica.fence.local_floor))


def _status(replica: Replica) -> Status:
    pointer, fence = replica.pointer, replica.fence
    version = pointer.version if pointer else 0
    return Status(replica.model, version, fence.local_floor, replica.leased, replica.problem, replica.reachable)
