"""Attempts that were refused for where something stands: recorded, since who tried what is part of the record."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal
from uuid import UUID

from service.domain.errors import ConflictError
from service.evidence.events import EventKind
from service.store import events
from service.store.database import Pool, transaction

Attempt = Literal["lift", "revoke", "retry", "release_hold", "lift_do_not_train", "export", "serve_version"]


@contextmanager
def recorded(pool: Pool, attempt: Attempt, *, actor: str, request_id: UUID | None = None) -> Generator[None]:
    """Record a `ConflictError` that leaves the block, after its transaction was rolled back.

    Input that is wrong, what does not exist and callers without the right are no attempts on the record.
    """
    try:
        yield
    except ConflictError as refusal:
        with transaction(pool) as connection:
            events.append(
                connection,
                EventKind.ATTEMPT_REFUSED,
                request_id=request_id,
                attempt=attempt,
                reason=type(refusal).__name__,
                actor=actor,
            )
        raise
