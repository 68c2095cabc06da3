"""The Celery app: JSON only, ids only, late acknowledgement. Redis is a doorbell; Postgres knows what is to be done."""

import logging
from typing import cast

from celery import Celery
from celery.signals import setup_logging, worker_ready
from celery.utils.dispatch import Signal

from service.logs import configure_logs
from service.settings import settings
from service.store.broker import TRANSPORT_OPTIONS, broker_url
from shards.engine.scratch import reap

QUEUES = {
    "targets.plan": "plan",
    "target.erase": "default",
    "target.certify": "default",
    "model.rebuild": "default",
    "model.publish": "default",
    "model.gate": "train",
    "stages.train": "train",
    "stages.replay": "train",
}

app = Celery("expunge", include=["workers.tasks"])


def _reach_broker(**_: object) -> None:
    """Read the URL when a program first needs it, so that the steps can be imported without one."""
    if not settings().redis_url:
        raise SystemExit("EXPUNGE_REDIS_URL is not set: name your Redis or Valkey, or use `expunge up`")
    app.conf.update(broker_url=broker_url(settings().redis_url))


def _sanitised_logs(**_: object) -> None:
    """Our own logging in place of Celery's, whose tracebacks quote rows and messages."""
    configure_logs("worker", level=logging.WARNING)


def _sweep(**_: object) -> None:
    """Remove what training commands of a killed worker left; `train_queued` does so again."""
    reap()


cast("Signal", app.on_configure).connect(_reach_broker)
setup_logging.connect(_sanitised_logs)
worker_ready.connect(_sweep)


app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options=TRANSPORT_OPTIONS,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_serializer="json",
    accept_content=["json"],
    task_routes={name: {"queue": queue} for name, queue in QUEUES.items()},
    task_publish_retry=False,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
)
