"""Schedules are read as cron reads them, in UTC or a zone; what is none is refused with the field's name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline_operator.decide.cron import BadSchedule, Cron

MONDAY = datetime(2026, 1, 5, 12, 0, tzinfo=UTC)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("schedule", "following"),
    [
        ("* * * * *", "2026-01-05T12:01"),
        ("*/15 * * * *", "2026-01-05T12:15"),
        ("5/20 * * * *", "2026-01-05T12:05"),
        ("0 3 * * *", "2026-01-06T03:00"),
        ("30 9-17/4 * * mon-fri", "2026-01-05T13:30"),
        ("0 0 * * 7", "2026-01-11T00:00"),
        ("0 0 * * sun", "2026-01-11T00:00"),
        ("0 0 29 2 *", "2028-02-29T00:00"),
        ("0 0 31 * *", "2026-01-31T00:00"),
        ("0 0 1,15 * *", "2026-01-15T00:00"),
        ("0 0 13 * fri", "2026-01-09T00:00"),
        ("0 0 ? jan,JUN ?", "2026-01-06T00:00"),
        ("@hourly", "2026-01-05T13:00"),
        ("@daily", "2026-01-06T00:00"),
        ("@midnight", "2026-01-06T00:00"),
        ("@weekly", "2026-01-11T00:00"),
        ("@monthly", "2026-02-01T00:00"),
        ("@yearly", "2027-01-01T00:00"),
        ("@Annually", "2027-01-01T00:00"),
    ],
)
def test_the_next_moment(schedule: str, following: str) -> None:
    assert Cron.parse(schedule).next(MONDAY) == at(following)


@pytest.mark.parametrize(
    ("schedule", "fault"),
    [
        ("99 * * * *", "minute: '99' is not within 0-59"),
        ("* 24 * * *", "hour"),
        ("* * 0 * *", "day of month"),
        ("* * * 13 *", "month"),
        ("* * * * 8", "day of week"),
        ("* * * * fun", "neither a number nor a name"),
        ("5-1 * * * *", "from low to high"),
        ("*/0 * * * *", "step of at least 1"),
        ("*/x * * * *", "step of at least 1"),
        ("* * * *", "4 fields"),
        ("@often", "1 fields"),
        ("", "0 fields"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: str, fault: str) -> None:
    with pytest.raises(BadSchedule, match=fault):
        Cron.parse(schedule)


def test_a_day_that_never_comes_has_no_next_moment() -> None:
    never = Cron.parse("0 0 30 2 *")
    assert never.next(MONDAY) is None
    assert never.latest(after=MONDAY - timedelta(days=4000), until=MONDAY) is None


def test_summer_time_runs_a_skipped_hour_later_and_a_doubled_one_once() -> None:
    berlin, nightly = ZoneInfo("Europe/Berlin"), Cron.parse("30 2 * * *")
    assert nightly.next(at("2026-03-28T12:00"), berlin) == at("2026-03-29T01:30")  # 02:30 is skipped: 03:30 there
    first = nightly.next(at("2026-10-24T12:00"), berlin)
    assert first == at("2026-10-25T00:30")
    assert first is not None
    assert nightly.next(first, berlin) == at("2026-10-26T01:30")


_schedules = st.builds(
    lambda minute, hour, day, month, weekday: f"{minute} {hour} {day} {month} {weekday}",
    st.sampled_from(["*", "0", "7,21", "*/10", "10-20"]),
    st.sampled_from(["*", "3", "9-17", "*/6"]),
    st.sampled_from(["*", "1", "28-31", "*/7"]),
    st.sampled_from(["*", "1", "2,8"]),
    st.sampled_from(["*", "0", "1-5", "7"]),
)


@given(_schedules, st.integers(0, 60 * 24 * 800))
def test_latest_is_the_last_of_the_next_ones(schedule: str, minutes: int) -> None:
    cron, until = Cron.parse(schedule), MONDAY + timedelta(minutes=minutes)
    following = cron.next(until)
    assert following is not None
    assert following > until
    assert cron.next(following - timedelta(minutes=1)) == following
    assert cron.latest(after=until, until=following) == following
    assert cron.latest(after=until, until=following - timedelta(minutes=1)) is None


@given(_schedules, st.integers(0, 60 * 24 * 400))
def test_a_moment_matches_each_field(schedule: str, minutes: int) -> None:
    """Against a reading of the five fields by brute force."""
    moment = Cron.parse(schedule).next(MONDAY + timedelta(minutes=minutes))
    assert moment is not None
    minute, hour, day, month, weekday = schedule.split()
    assert _has(minute, moment.minute, 0, 59)
    assert _has(hour, moment.hour, 0, 23)
    assert _has(month, moment.month, 1, 12)
    of_month, of_week = _has(day, moment.day, 1, 31), _has(weekday.replace("7", "0"), moment.isoweekday() % 7, 0, 6)
    is_either = not day.startswith("*") and not weekday.startswith("*")
    assert (of_month or of_week) if is_either else (of_month and of_week)


def _has(field: str, value: int, low: int, high: int) -> bool:
    if field.startswith("*/"):
        return (value - low) % int(field[2:]) == 0
    if field == "*":
        return True
    if "-" in field:
        first, last = field.split("-")
        return int(first) <= value <= int(last)
    return value in {int(part) for part in field.split(",")}
