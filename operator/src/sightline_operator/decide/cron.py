"""Cron expressions of five fields: parsed once, then asked for the moments they name, in UTC or a zone of their own."""

from __future__ import annotations

import calendar
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo

_NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_abbr) if name}
_DAYS = {"sun": 0, "mon": 1, "tue": 2, "wed": 3, "thu": 4, "fri": 5, "sat": 6}
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 7, _DAYS),
)
_HORIZON_DAYS = 366 * 8 + 1
"""29 February comes at most eight years apart (1896–1904, 2096–2104)."""


class BadSchedule(ValueError):
    """Not a cron expression; the message says which field and why."""


@dataclass(frozen=True)
class Cron:
    """The moments that a schedule names.

    is_either_day   both day fields are restricted: then a day of either counts, as in every cron since Vixie's
    """

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    is_either_day: bool

    @classmethod
    def parse(cls, text: str) -> Cron:
        """Read `minute hour day month weekday`, lists, ranges, steps and names included, or a nickname like `@daily`.

        Raises BadSchedule: it isn't one.
        """
        parts = _NICKNAMES.get(text.strip().lower(), text).split()
        if len(parts) != len(_FIELDS):
            raise BadSchedule(f"{text!r} has {len(parts)} fields; a schedule has {len(_FIELDS)}")
        sets = [_parse_field(part.lower(), *field) for part, field in zip(parts, _FIELDS, strict=True)]
        return cls(
            minutes=tuple(sorted(sets[0])),
            hours=tuple(sorted(sets[1])),
            days=sets[2],
            months=sets[3],
            weekdays=frozenset(day % 7 for day in sets[4]),
            is_either_day=not parts[2].startswith(("*", "?")) and not parts[4].startswith(("*", "?")),
        )

    def latest(self, *, after: datetime, until: datetime, zone: tzinfo | None = None) -> datetime | None:
        """The last moment in (after, until], None when there is none."""
        day = until.astimezone(zone or UTC).date()
        oldest = max(after.astimezone(zone or UTC).date(), day - timedelta(days=_HORIZON_DAYS))
        while day >= oldest:
            moments = [moment for moment in self._moments(day, zone) if after < moment <= until]
            if moments:
                return moments[-1]
            day -= timedelta(days=1)
        return None

    def next(self, after: datetime, zone: tzinfo | None = None) -> datetime | None:
        """The first moment after that; None when there is none in eight years (30 February)."""
        day = after.astimezone(zone or UTC).date()
        for _ in range(_HORIZON_DAYS):
            moment = next((moment for moment in self._moments(day, zone) if moment > after), None)
            if moment is not None:
                return moment
            day += timedelta(days=1)
        return None

    def _has(self, day: date) -> bool:
        if day.month not in self.months:
            return False
        of_month, of_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return of_month or of_week if self.is_either_day else of_month and of_week

    def _moments(self, day: date, zone: tzinfo | None) -> list[datetime]:
        """Of one day, in order, in UTC.

        A time that the clock jumps over in spring counts as so much later; one that comes twice in autumn counts once.
        """
        if not self._has(day):
            return []
        wall = [
            datetime.combine(day, time(hour, minute), zone or UTC) for hour in self.hours for minute in self.minutes
        ]
        return sorted({moment.astimezone(UTC) for moment in wall})


def _parse_field(text: str, name: str, low: int, high: int, names: dict[str, int]) -> frozenset[int]:
    values: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        if slash and not (step.isdecimal() and int(step)):
            raise BadSchedule(f"{name}: {part!r} has no whole step of at least 1")
        first, last = _parse_span(span, name, low, high, names, is_open=bool(slash))
        values.update(range(first, last + 1, int(step) if slash else 1))
    return frozenset(values)


def _parse_span(span: str, name: str, low: int, high: int, names: dict[str, int], *, is_open: bool) -> tuple[int, int]:
    """First and last of `*`, `3`, `3-5`; `3/2` means from 3 to the end."""
    if span in {"*", "?"}:
        return low, high
    first_text, dash, last_text = span.partition("-")
    first = _parse_number(first_text, name, names)
    last = _parse_number(last_text, name, names) if dash else (high if is_open else first)
    if not low <= first <= last <= high:
        raise BadSchedule(f"{name}: {span!r} is not within {low}-{high}, from low to high")
    return first, last


def _parse_number(text: str, name: str, names: dict[str, int]) -> int:
    if text in names:
        return names[text]
    if not text.isdecimal():
        raise BadSchedule(f"{name}: {text!r} is neither a number nor a name")
    return int(text)
