"""How Celery reaches Redis or Valkey: one conversion and one set of options for every program."""

from typing import Any
from urllib.parse import parse_qs, urlsplit

from celery import Celery

VISIBILITY_TIMEOUT = 6 * 3600
"""Seconds, longer than the longest stage. Shared by all consumers of one Redis db: the smallest would win."""
TRANSPORT_OPTIONS: dict[str, Any] = {
    "visibility_timeout": VISIBILITY_TIMEOUT,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    "socket_timeout": 1.0,
    "socket_connect_timeout": 1.0,
}
PUBLISH_OPTIONS: dict[str, Any] = {**TRANSPORT_OPTIONS, "max_retries": 0}
"""For a program that only sends: without it a send waits 6 s for a Redis that is away, `retry=False` or not."""


def sender(redis_url: str) -> Celery:
    """A Celery app that only sends, by task name, and gives up at once where Redis is away."""
    app = Celery("expunge-bell", broker=broker_url(redis_url), set_as_current=False)
    app.conf.update(
        broker_connection_retry=False,
        broker_transport_options=PUBLISH_OPTIONS,
        task_ignore_result=True,
        task_serializer="json",
    )
    return app


def broker_url(redis_url: str) -> str:
    """Celery's spelling of a Redis URL: `unix:///path?db=0` becomes `redis+socket:///path?virtual_host=0`.

    Raises:
        ValueError: neither `redis://`, `rediss://` nor `unix://`.
    """
    parts = urlsplit(redis_url)
    if parts.scheme in {"redis", "rediss"}:
        return redis_url
    if parts.scheme != "unix" or not parts.path:
        raise ValueError("EXPUNGE_REDIS_URL must be redis://host:port/db or unix:///path?db=0")
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{parts.path}?virtual_host={database}"
