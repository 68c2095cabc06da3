"""Ringing: a message that may be lost, since the relay looks at the states again (protocol.md section 4)."""

import structlog
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from workers.app import QUEUES, app

log = structlog.get_logger()


class Bell:
    """Sends tasks by name; a broker that is away is logged, never an error of the step that rang."""

    def ring(self, task: str, *ids: int | str) -> None:
        """Wake a worker for `task` with ids as its only arguments."""
        try:
            app.send_task(task, args=list(ids), queue=QUEUES[task], retry=False)
        except (OperationalError, RedisError, OSError) as error:
            log.warning("bell.unheard", task=task, error=type(error).__name__)

    def waiting(self, queue: str) -> int:
        """Messages that no worker has taken yet."""
        with app.connection_for_read() as connection:
            return connection.default_channel.client.llen(queue)
