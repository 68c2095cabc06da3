from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.deadlines import CCPA_DAYS, VOLUNTARY_DAYS, due_at, one_month_later
from service.domain.requests import Regime

MOMENTS = st.datetimes(datetime(1999, 1, 1), datetime(2399, 12, 1), timezones=st.just(UTC))  # noqa: DTZ001


def day(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}T09:30:00+00:00")


@pytest.mark.parametrize(
    ("received", "due"),
    [
        ("2026-01-15", "2026-02-16"),  # the 15th is a Sunday
        ("2026-03-10", "2026-04-10"),
        ("2026-12-31", "2027-02-01"),  # over the year, a Sunday
        ("2026-12-10", "2027-01-11"),  # over the year, a Sunday
        ("2026-12-01", "2027-01-01"),  # a Friday; public holidays are not counted
        ("2027-01-28", "2027-03-01"),  # Sunday 28 February moves into March
        ("2027-01-29", "2027-03-01"),
        ("2027-01-31", "2027-03-01"),
        ("2029-01-31", "2029-02-28"),  # the month's last day
        ("2028-01-29", "2028-02-29"),  # a leap year
        ("2028-01-31", "2028-02-29"),
        ("2028-02-29", "2028-03-29"),
        ("2100-01-29", "2100-03-01"),  # no leap year; 28 February is a Sunday
        ("2000-01-31", "2000-02-29"),  # a leap year after all
        ("2026-05-31", "2026-06-30"),
        ("2026-08-31", "2026-09-30"),
        ("2026-03-31", "2026-04-30"),
        ("2026-02-28", "2026-03-30"),  # a Saturday
        ("2026-07-01", "2026-08-03"),  # a Saturday
    ],
)
def test_gdpr_month(received: str, due: str) -> None:
    assert one_month_later(day(received)) == day(due)
    assert due_at(day(received), Regime.GDPR) == day(due)
    assert due_at(day(received), None) == day(due)


@given(MOMENTS)
def test_a_month_is_never_a_weekend_and_never_far(moment: datetime) -> None:
    due = one_month_later(moment)
    assert due.isoweekday() <= 5
    assert timedelta(days=28) <= due - moment <= timedelta(days=33)
    assert (due.timetz(), due.tzinfo) == (moment.timetz(), moment.tzinfo)


@given(MOMENTS, st.integers(1, 400))
def test_who_asks_later_is_never_answered_earlier_by_more_than_a_day(moment: datetime, hours: int) -> None:
    assert one_month_later(moment + timedelta(hours=hours)) > one_month_later(moment) - timedelta(days=1)


@given(MOMENTS)
def test_calendar_days(moment: datetime) -> None:
    assert due_at(moment, Regime.CCPA) - moment == timedelta(days=CCPA_DAYS) == timedelta(days=45)
    assert due_at(moment, Regime.VOLUNTARY) - moment == timedelta(days=VOLUNTARY_DAYS)


@given(MOMENTS)
def test_every_regime_has_a_later_due_date(moment: datetime) -> None:
    for regime in (*Regime, None):
        assert due_at(moment, regime) > moment


def test_the_day_is_the_one_in_the_zone_given() -> None:
    """1 a.m. on the 31st in Auckland is the 30th in UTC: the month runs from the day that the zone shows."""
    auckland = timezone(timedelta(hours=13))
    received = datetime(2026, 12, 31, 1, 0, tzinfo=auckland)
    assert one_month_later(received) == datetime(2027, 2, 1, 1, 0, tzinfo=auckland)
    assert one_month_later(received.astimezone(UTC)) == datetime(2027, 2, 1, 12, 0, tzinfo=UTC)
