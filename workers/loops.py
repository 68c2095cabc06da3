"""The loops as one program: barrier, sequencer, relay, reaper, replays, supplements. `python -m workers.loops`.

Any number of them may run.
"""

import signal
import threading
from collections.abc import Callable

import psycopg
import structlog
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from service.domain.errors import UnavailableError
from service.logs import configure_logs
from service.store.database import Connection, connect, make_pool
from workers.barrier import Barrier
from workers.context import Context, context
from workers.reaper import Reaper
from workers.relay import Relay
from workers.replays import Replays
from workers.sequencer import PUBLISH_SECONDS, SEQUENCE_SECONDS, Sequencer
from workers.supplements import Supplements

log = structlog.get_logger()

RELAY_SECONDS = 0.25
REAPER_SECONDS = 1.0
REPLAY_SECONDS = 5.0
SUPPLEMENT_SECONDS = 5.0
WAITING_SECONDS = 0.02
"""How often the barrier looks while a floor is waited for, should a notification be lost."""
ACKNOWLEDGE_SECONDS = 0.01
"""How long the barrier lets replicas go first after a version was published."""
IDLE_SECONDS = 0.5
RETRY_SECONDS = 0.5
PASSING = (UnavailableError, psycopg.OperationalError, RedisError, OperationalError, OSError)
"""Stores that are away: wait and look again."""


def every(stop: threading.Event, name: str, seconds: float, look: Callable[[], object]) -> None:
    """Call `look` until `stop`; a store that is away is logged and tried again."""
    while not stop.wait(seconds):
        try:
            look()
        except PASSING as error:
            log.warning("loop.waiting", loop=name, error=type(error).__name__)
            stop.wait(RETRY_SECONDS)


def watch(stop: threading.Event, chosen: Context, barrier: Barrier) -> None:
    """The barrier at the pace of acknowledgements: LISTEN, commit, then read (protocol.md section 4)."""
    listener: Connection | None = None
    waiting = True
    while not stop.is_set():
        try:
            if listener is None or listener.closed:
                listener = connect(chosen.settings.listen_url, autocommit=True)
                listener.execute("LISTEN expunge_ack")
                listener.execute("LISTEN expunge_model")
                waiting = True
            told = list(listener.notifies(timeout=WAITING_SECONDS if waiting else IDLE_SECONDS, stop_after=1))
            if told and told[0].channel == "expunge_model":  # the processors are the replicas' until one has answered
                list(listener.notifies(timeout=ACKNOWLEDGE_SECONDS, stop_after=1))
            waiting = barrier.look()
        except PASSING as error:
            log.warning("loop.waiting", loop="barrier", error=type(error).__name__)
            if listener is not None:
                listener.close()
            listener = None
            stop.wait(RETRY_SECONDS)
    if listener is not None:
        listener.close()


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    configure_logs("loops")
    chosen = context()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    lease = chosen.settings
    barrier = Barrier(chosen.pool, margin=lease.lease_margin_ms / 1000, ttl=lease.lease_ttl_ms / 1000)
    relay = Relay(chosen.pool, chosen.bell)
    reaper = Reaper(
        chosen.pool,
        chosen.artifacts,
        job_attempts=chosen.settings.job_attempts,
        certificate_days=chosen.settings.certificate_days,
        do_not_train_days=chosen.settings.do_not_train_days,
    )
    replays = Replays(chosen.pool, chosen.bell, sample=chosen.settings.replay_daily_sample)
    numbers = make_pool(chosen.settings.database_url, size=2, checked=False)  # of its own: it is asked all the time
    numbers.open()
    sequencer = Sequencer(numbers, chosen.artifacts, chosen.settings)
    loops = [
        threading.Thread(target=watch, args=(stop, chosen, barrier)),
        threading.Thread(target=every, args=(stop, "relay", RELAY_SECONDS, relay.look)),
        threading.Thread(target=every, args=(stop, "reaper", REAPER_SECONDS, reaper.look)),
        threading.Thread(target=every, args=(stop, "replays", REPLAY_SECONDS, replays.look)),
        threading.Thread(target=every, args=(stop, "supplements", SUPPLEMENT_SECONDS, Supplements(chosen).look)),
        threading.Thread(target=every, args=(stop, "sequencer", SEQUENCE_SECONDS, sequencer.look)),
        threading.Thread(target=every, args=(stop, "ledger", PUBLISH_SECONDS, sequencer.look_and_publish)),
    ]
    for loop in loops:
        loop.start()
    while not stop.wait(1):
        if not all(loop.is_alive() for loop in loops):
            log.error("loops.died")  # the supervisor starts the program again
            stop.set()
    for loop in loops:
        loop.join(timeout=5)
    numbers.close()
    chosen.pool.close()


if __name__ == "__main__":
    main()
