"""The counts of a compliance report, each one grouped query over the rows of an export of requests."""

from dataclasses import dataclass
from typing import LiteralString, TypeVar

from psycopg.rows import class_row

from service.domain.compliance import (
    ALLOWANCE_BOUNDS,
    DEACTIVATED_BOUNDS,
    Bin,
    Compliance,
    Durations,
    MonthCount,
    Overdue,
    Punctuality,
    ReasonCount,
    YearCount,
)
from service.store.database import Connection, get_time
from service.store.export_rows import LIST_REQUESTS, Range

LISTED = 20
"""Overdue requests that are named; all of them are in an export of requests."""
T = TypeVar("T")

REQUESTS: LiteralString = "WITH q AS (" + LIST_REQUESTS + ") "
COUNT_MONTHS: LiteralString = (
    REQUESTS
    + """
SELECT date_trunc('month', received_at)::date AS month, state, outcome, count(*) AS requests
FROM q GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""
)
TO_DEACTIVATED: LiteralString = (
    REQUESTS
    + """
SELECT count(*) AS requests, percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds) AS median,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY seconds) AS p95, max(seconds) AS most
FROM (SELECT extract(epoch FROM deactivated_at - created_at)::float8 AS seconds FROM q
      WHERE deactivated_at IS NOT NULL) s
"""
)
BINS_DEACTIVATED: LiteralString = (
    REQUESTS
    + """
SELECT width_bucket(extract(epoch FROM deactivated_at - created_at)::float8, %(bounds)s::float8[]) AS place,
       count(*) AS requests
FROM q WHERE deactivated_at IS NOT NULL GROUP BY 1 ORDER BY 1
"""
)
TO_COMPLETED: LiteralString = (
    REQUESTS
    + """
SELECT count(*) AS requests, percentile_cont(0.5) WITHIN GROUP (ORDER BY days) * 86400 AS median,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY days) * 86400 AS p95, max(days) * 86400 AS most
FROM q WHERE state = 'completed'
"""
)
BINS_ALLOWANCE: LiteralString = (
    REQUESTS
    + """
SELECT width_bucket((extract(epoch FROM ended_at - received_at)
                     / extract(epoch FROM due_at - received_at))::float8, %(bounds)s::float8[]) AS place,
       count(*) AS requests
FROM q WHERE state = 'completed' GROUP BY 1 ORDER BY 1
"""
)
COUNT_PUNCTUAL: LiteralString = (
    REQUESTS
    + """
SELECT count(*) FILTER (WHERE state = 'completed' AND NOT overdue) AS in_time,
       count(*) FILTER (WHERE state = 'completed' AND overdue) AS late,
       count(*) FILTER (WHERE is_open) AS open,
       count(*) FILTER (WHERE is_open AND overdue) AS overdue
FROM (SELECT *, state NOT IN ('completed', 'rejected', 'revoked', 'expired', 'duplicate', 'lifted') AS is_open
      FROM q) p
"""
)
LIST_OVERDUE: LiteralString = (
    REQUESTS
    + """
SELECT request_id, state, regime, due_at FROM q
WHERE overdue AND state NOT IN ('completed', 'rejected', 'revoked', 'expired', 'duplicate', 'lifted')
ORDER BY due_at, request_id LIMIT %(limit)s::int
"""
)
COUNT_REASONS: LiteralString = (
    REQUESTS
    + """
SELECT state, reason_code, count(*) AS requests FROM q
WHERE state IN ('rejected', 'expired', 'revoked', 'lifted', 'duplicate')
GROUP BY 1, 2 ORDER BY 1, 3 DESC, 2
"""
)
COUNT_YEARS: LiteralString = (
    REQUESTS
    + """
SELECT year, scope, count(*) AS received,
       count(*) FILTER (WHERE state = 'completed' AND outcome <> 'no_match') AS complied,
       count(*) FILTER (WHERE outcome = 'no_match') AS no_match,
       count(*) FILTER (WHERE state IN ('rejected', 'expired')) AS denied,
       count(*) FILTER (WHERE state IN ('revoked', 'lifted', 'duplicate')) AS withdrawn,
       count(*) FILTER (WHERE state NOT IN ('completed', 'rejected', 'expired', 'revoked', 'lifted', 'duplicate'))
           AS open,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY days) FILTER (WHERE state IN ('completed', 'rejected', 'expired'))
           AS median_days,
       avg(days) FILTER (WHERE state IN ('completed', 'rejected', 'expired')) AS mean_days
FROM (SELECT *, extract(year FROM received_at)::int AS year FROM q WHERE kind = 'erase') e
JOIN (VALUES ('ccpa'), ('all')) s (scope) ON scope = 'all' OR regime = scope
GROUP BY 1, 2 ORDER BY 2 DESC, 1
"""
)


@dataclass(frozen=True, slots=True)
class _Reader:
    connection: Connection
    chosen: Range

    def rows(self, kind: type[T], query: LiteralString, **more: object) -> tuple[T, ...]:
        chosen = self.chosen
        values = {"since": chosen.since, "until": chosen.until, "request_id": chosen.request_id, **more}
        with self.connection.cursor(row_factory=class_row(kind)) as cursor:
            return tuple(cursor.execute(query, values).fetchall())


def count(connection: Connection, chosen: Range) -> Compliance:
    """The counts, of the caller's snapshot."""
    read = _Reader(connection, chosen).rows
    (to_deactivated,) = read(Durations, TO_DEACTIVATED)
    (to_completed,) = read(Durations, TO_COMPLETED)
    (punctuality,) = read(Punctuality, COUNT_PUNCTUAL)
    return Compliance(
        as_of=get_time(connection),
        since=chosen.since,
        until=chosen.until,
        months=read(MonthCount, COUNT_MONTHS),
        to_deactivated=to_deactivated,
        deactivated_bins=read(Bin, BINS_DEACTIVATED, bounds=list(DEACTIVATED_BOUNDS)),
        to_completed=to_completed,
        allowance_bins=read(Bin, BINS_ALLOWANCE, bounds=list(ALLOWANCE_BOUNDS)),
        punctuality=punctuality,
        overdue=read(Overdue, LIST_OVERDUE, limit=LISTED),
        reasons=read(ReasonCount, COUNT_REASONS),
        years=read(YearCount, COUNT_YEARS),
    )
