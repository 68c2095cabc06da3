"""Due dates: the law's clock, computed once when a request is received."""

import calendar
from datetime import datetime, timedelta

from service.domain.requests import Regime

CCPA_DAYS = 45
"""CCPA regulations section 7021: 45 calendar days from receipt, whatever verification takes."""
VOLUNTARY_DAYS = 30


def due_at(received_at: datetime, regime: Regime | None) -> datetime:
    """When the request must be answered; without a regime the strictest common clock, GDPR's month, applies."""
    match regime:
        case Regime.CCPA:
            return received_at + timedelta(days=CCPA_DAYS)
        case Regime.VOLUNTARY:
            return received_at + timedelta(days=VOLUNTARY_DAYS)
        case _:
            return one_month_later(received_at)


def one_month_later(moment: datetime) -> datetime:
    """GDPR article 12(3) with Regulation 1182/71, article 3: the same-numbered day, or the month's last; a due
    date on a weekend moves to Monday (public holidays differ by country and are not counted).
    """
    year, month = (moment.year + 1, 1) if moment.month == 12 else (moment.year, moment.month + 1)
    day = min(moment.day, calendar.monthrange(year, month)[1])
    due = moment.replace(year=year, month=month, day=day)
    return due + timedelta(days={6: 2, 7: 1}.get(due.isoweekday(), 0))
