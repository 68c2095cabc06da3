"""Figures for `/metrics`, counted from the state tables: none names a subject, a record or a request."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import LiteralString

from psycopg.rows import class_row, scalar_row

from service.store import grid, ledger, models, replays, served
from service.store.database import Connection
from service.store.grid import JobCount
from service.store.ledger import LedgerFigures
from service.store.models import Model
from service.store.replays import OutcomeCount
from service.store.served import Share

COUNT_REQUESTS: LiteralString = """
SELECT state, count(*) AS requests FROM deletion_request GROUP BY state ORDER BY state
"""
OLDEST_OPEN: LiteralString = """
SELECT min(received_at) FROM deletion_request
WHERE state NOT IN ('completed', 'rejected', 'revoked', 'expired', 'duplicate', 'lifted')
"""


@dataclass(frozen=True, slots=True)
class RequestCount:
    """How many requests show a state."""

    state: str
    requests: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One look at the tables."""

    requests: list[RequestCount]
    jobs: list[JobCount]
    models: list[Model]
    oldest_open: datetime | None
    replays: list[OutcomeCount]
    shares: list[Share]
    ledger: LedgerFigures

    @property
    def requests_by_state(self) -> dict[str, int]:
        """Requests; a state without one is left out."""
        return {row.state: row.requests for row in self.requests}

    @property
    def jobs_by_state(self) -> dict[str, int]:
        """Jobs of all models; a state without one is left out."""
        counts: Counter[str] = Counter()
        for row in self.jobs:
            counts[row.state] += row.jobs
        return dict(counts)

    @property
    def replays_by_outcome(self) -> dict[str, int]:
        """Ended replays; an outcome without one is left out."""
        return {row.outcome: row.replays for row in self.replays}

    @property
    def replayable_by_model(self) -> dict[str, float]:
        """Share of served stages that today's machines can train again; models of unknown machines are left out."""
        return {row.model: row.replayable / row.served for row in self.shares}

    @property
    def oldest_open_timestamp(self) -> float:
        """Unix time, 0 where no request is open."""
        return self.oldest_open.timestamp() if self.oldest_open else 0.0


def read_figures(connection: Connection) -> Figures:
    """Count everything once."""
    with connection.cursor(row_factory=class_row(RequestCount)) as cursor:
        requests = cursor.execute(COUNT_REQUESTS).fetchall()
    with connection.cursor(row_factory=scalar_row) as cursor:
        oldest: datetime | None = cursor.execute(OLDEST_OPEN).fetchone()
    return Figures(
        requests,
        grid.count_jobs(connection),
        models.list_models(connection),
        oldest,
        replays.count_outcomes(connection),
        served.list_shares(connection),
        ledger.get_figures(connection),
    )
