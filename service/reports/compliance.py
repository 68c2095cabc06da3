"""The compliance report: counts as the words, bars and rows of a PDF."""

from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import Any

from service.domain.compliance import (
    ALLOWANCE_BOUNDS,
    DEACTIVATED_BOUNDS,
    Bin,
    Compliance,
    Durations,
    MonthCount,
    YearCount,
)
from service.evidence.leaves import moment
from shards.digest import canonical, sha256_hex

MONTHS = 60
"""More bars than that would be a line each, so years take their place."""
GROUPS = ("completed", "nothing held", "in progress", "failed", "denied", "withdrawn")
"""What a reader needs to tell apart; the export of requests has every state."""
STATES = {
    "failed": "failed",
    "rejected": "denied",
    "expired": "denied",
    "revoked": "withdrawn",
    "lifted": "withdrawn",
    "duplicate": "withdrawn",
}
WITHIN = ("1 second", "1 minute", "1 hour", "1 day", "1 week", "longer")
REASONS = {
    "rejected": "denied",
    "expired": "denied: identity or approval did not come in time",
    "revoked": "withdrawn by whoever asked",
    "lifted": "restriction lifted",
    "duplicate": "duplicate of another request",
}


def compose(found: Compliance) -> dict[str, Any]:
    """The content of template `compliance`; its digest is over everything else that it shows."""
    counts: Counter[str] = Counter()
    for row in found.months:
        counts[_group(row)] += row.requests
    received = counts.total()
    shown: dict[str, Any] = {
        "date": moment(found.as_of),
        "since": moment(found.since) if found.since else None,
        "until": moment(found.until) if found.until else None,
        "received": received,
        "groups": [{"name": name, "requests": counts[name]} for name in GROUPS],
        "outcomes": _outcomes(found.months),
        "months": _months(found.months),
        "to_deactivated": _durations(found.to_deactivated),
        "within": _bars(WITHIN, found.deactivated_bins, len(DEACTIVATED_BOUNDS) + 1),
        "to_completed": _durations(found.to_completed),
        "allowance": _bars(_shares(), found.allowance_bins, len(ALLOWANCE_BOUNDS) + 1),
        "in_time": found.punctuality.in_time,
        "late": found.punctuality.late,
        "open": found.punctuality.open,
        "overdue": found.punctuality.overdue,
        "overdue_list": [
            {
                "request": str(each.request_id),
                "state": each.state,
                "regime": each.regime or "none",
                "due": moment(each.due_at)[:10],
                "days": (found.as_of - each.due_at).days,
            }
            for each in found.overdue
        ],
        "reasons": [
            {"what": REASONS[each.state], "code": each.reason_code, "requests": each.requests} for each in found.reasons
        ],
        "years": [_year(each) for each in found.years],
    }
    source = canonical(shown)
    return {
        **shown,
        "digest": sha256_hex(source),
        "attached": {"name": "report.json", "text": source.decode(), "about": "The figures of this report."},
    }


def _group(row: MonthCount) -> str:
    if row.state == "completed":
        return "nothing held" if row.outcome == "no_match" else "completed"
    return STATES.get(row.state, "in progress")


def _outcomes(months: Sequence[MonthCount]) -> list[dict[str, Any]]:
    counts: Counter[str] = Counter()
    for row in months:
        if row.outcome is not None:
            counts[row.outcome.replace("_", " ")] += row.requests
    return [{"name": name, "requests": counts[name]} for name in sorted(counts)]


def _months(rows: Sequence[MonthCount]) -> dict[str, Any]:
    """Bars from the first to the last month with a request, those without one between them, too."""
    if not rows:
        return {"unit": "month", "bars": []}
    first, last = min(row.month for row in rows), max(row.month for row in rows)
    span = (last.year - first.year) * 12 + last.month - first.month + 1
    yearly = span > MONTHS
    labels = (
        [str(year) for year in range(first.year, last.year + 1)]
        if yearly
        else [
            _label(date(first.year + (first.month - 1 + k) // 12, (first.month - 1 + k) % 12 + 1, 1))
            for k in range(span)
        ]
    )
    counts: dict[str, Counter[str]] = {label: Counter() for label in labels}
    for row in rows:
        counts[str(row.month.year) if yearly else _label(row.month)][_group(row)] += row.requests
    bars = [{"label": label, "values": [counts[label][group] for group in GROUPS]} for label in labels]
    return {"unit": "year" if yearly else "month", "bars": bars}


def _label(month: date) -> str:
    return f"{month.year}-{month.month:02}"


def _bars(labels: Sequence[str], bins: Sequence[Bin], size: int) -> list[dict[str, Any]]:
    if len(labels) != size:
        raise AssertionError("a label for each bar")
    counts = {each.place: each.requests for each in bins}
    return [{"label": label, "values": [counts.get(place, 0)]} for place, label in enumerate(labels)]


def _shares() -> list[str]:
    return [*(f"{100 * bound:.0f}%" for bound in ALLOWANCE_BOUNDS), "late"]


def _durations(found: Durations) -> dict[str, Any]:
    return {
        "requests": found.requests,
        "median": _time(found.median),
        "p95": _time(found.p95),
        "most": _time(found.most),
    }


def _time(seconds: float | None) -> str:
    """In the unit in which it is a number that people can picture."""
    if seconds is None:
        return "-"
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "s")):
        if abs(seconds) >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.0f} ms"


def _year(row: YearCount) -> dict[str, Any]:
    return {
        "year": str(row.year),
        "scope": row.scope,
        "counts": [row.received, row.complied, row.no_match, row.denied, row.withdrawn, row.open],
        "median": "-" if row.median_days is None else f"{row.median_days:.1f}",
        "mean": "-" if row.mean_days is None else f"{row.mean_days:.1f}",
    }
