"""The doorbell: wakes workers from a thread of its own; no answer waits for Redis (protocol.md section 4)."""

import threading
import time
from enum import StrEnum

from service.logs import get_logger
from service.store.broker import sender

COALESCE_SECONDS = 0.01
PAUSE_SECONDS = 1.0
"""Between attempts while Redis does not answer."""

log = get_logger(__name__)


class Task(StrEnum):
    """Tasks that the API rings, by name."""

    PLAN = "targets.plan"
    REBUILD = "model.rebuild"


QUEUES = {Task.PLAN: "plan", Task.REBUILD: "default"}


class Doorbell:
    """Sends each (task, argument) at most once per 10 ms. It may lose all: the relay reads the states."""

    def __init__(self, redis_url: str) -> None:
        """Connects to nothing yet."""
        self._app = sender(redis_url)
        self._pending: set[tuple[Task, int]] = set()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="doorbell", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; what was not sent is the relay's. Waits no longer than one send may take."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * PAUSE_SECONDS)
        self._app.close()

    def ring(self, task: Task, model_id: int) -> None:
        """Have the task sent soon; returns at once, raises nothing."""
        with self._wake:
            self._pending.add((task, model_id))
            self._wake.notify()

    def _run(self) -> None:
        heard = True
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._pending or self._stopping)
                if self._stopping:
                    return
                batch, self._pending = self._pending, set()
            failed = self._send(batch)
            if failed and heard:
                log.warning("doorbell_unheard", hint="Redis does not answer; the relay moves requests on")
            elif not failed and not heard:
                log.info("doorbell_heard")
            heard = not failed
            with self._wake:
                self._pending |= failed
            time.sleep(PAUSE_SECONDS if failed else COALESCE_SECONDS)

    def _send(self, batch: set[tuple[Task, int]]) -> set[tuple[Task, int]]:
        """Send a batch; what could not be sent."""
        left = set(batch)
        for task, model_id in sorted(batch):
            try:
                self._app.send_task(task.value, args=[model_id], queue=QUEUES[task], retry=False)
            except Exception as error:  # noqa: BLE001 - a doorbell may fail in any way of three libraries
                log.debug("doorbell_failed", error=type(error).__qualname__)
                return left
            left.discard((task, model_id))
        return left
