"""Ringing: a message that may be lost, since the relay looks at the states again (protocol.md section 4)."""

import structlog
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from service.store.broker import sender
from workers.app import QUEUES

log = structlog.get_logger()


class Bell:
    """Sends tasks by name; a broker that is away is logged, never an error of the step that rang."""

    def __init__(self, redis_url: str) -> None:
        """Connects to nothing yet. An app of its own: the workers' own one would wait for a Redis that is away."""
        self._app = sender(redis_url)

    def ring(self, task: str, *ids: int | str) -> None:
        """Wake a worker for `task` with ids as its only arguments."""
        try:
            self._app.send_task(task, args=list(ids), queue=QUEUES[task], retry=False)
        except (OperationalError, RedisError, OSError) as error:
            log.warning("bell.unheard", task=task, error=type(error).__name__)

    def waiting(self, queue: str) -> int:
        """Messages that no worker has taken yet."""
        with self._app.connection_for_read() as connection:
            return connection.default_channel.client.llen(queue)
