"""What a compliance report counts; requests belong to the month of their receipt, in UTC."""

from dataclasses import dataclass
from datetime import date, datetime
from uuid import UUID


@dataclass(frozen=True, slots=True)
class MonthCount:
    """Requests of one month that are in one state; completed ones by outcome."""

    month: date
    state: str
    outcome: str | None
    requests: int


@dataclass(frozen=True, slots=True)
class Durations:
    """How long something took, in seconds; None where it never happened."""

    requests: int
    median: float | None
    p95: float | None
    most: float | None


@dataclass(frozen=True, slots=True)
class Bin:
    """A bar of a histogram."""

    place: int
    """Its place, from 0 on, among the bars that the query's bounds make."""
    requests: int


@dataclass(frozen=True, slots=True)
class Overdue:
    """A request that has not ended though it was due."""

    request_id: UUID
    state: str
    regime: str | None
    due_at: datetime


@dataclass(frozen=True, slots=True)
class Punctuality:
    """Requests against their due dates."""

    in_time: int
    late: int
    open: int
    overdue: int
    """Of the open ones."""


@dataclass(frozen=True, slots=True)
class ReasonCount:
    """Requests that ended otherwise than by being done."""

    state: str
    reason_code: str | None
    """None: none was given, or its event's retention has ended."""
    requests: int


@dataclass(frozen=True, slots=True)
class YearCount:
    """Requests to delete of one calendar year (CCPA regulations section 7102)."""

    year: int
    scope: str
    """`ccpa`: under that law alone; `all`: of all individuals."""
    received: int
    complied: int
    """In whole or in part."""
    no_match: int
    """Nothing was held on the person."""
    denied: int
    withdrawn: int
    open: int
    median_days: float | None
    """From receipt to the answer: completion or denial."""
    mean_days: float | None


@dataclass(frozen=True, slots=True)
class Compliance:
    """All counts of one range, of one snapshot."""

    as_of: datetime
    since: datetime | None
    until: datetime | None
    months: tuple[MonthCount, ...]
    to_deactivated: Durations
    deactivated_bins: tuple[Bin, ...]
    to_completed: Durations
    allowance_bins: tuple[Bin, ...]
    punctuality: Punctuality
    overdue: tuple[Overdue, ...]
    """The longest overdue; `punctuality` has the number of all."""
    reasons: tuple[ReasonCount, ...]
    years: tuple[YearCount, ...]


DEACTIVATED_BOUNDS = (1.0, 60.0, 3600.0, 86400.0, 7 * 86400.0)
"""Seconds that part the bars of the times to `deactivated`."""
ALLOWANCE_BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the time until the due date that part the bars of the times to completion; the last bar is late."""
