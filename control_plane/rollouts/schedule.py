"""When a rollout may move: a start, an end, and recurring maintenance windows. Pure; the time comes in.

A window begins by a cron expression of six fields, `cron(minutes hours day-of-month month day-of-week year)`, in UTC,
as AWS IoT Jobs writes it: `*`, `?`, numbers, names (`MON`, `JAN`), lists `1,3`, ranges `MON-FRI` and steps `0/15`.
Days of the week count from 1 = Sunday. Where both days are given, both must match.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from models.errors import InputError

_MONTH_NAMES: Final = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_MONTHS: Final = {name: k + 1 for k, name in enumerate(_MONTH_NAMES)}
_DAYS: Final = {name: k + 1 for k, name in enumerate(("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"))}
_FIELDS: Final[tuple[tuple[str, int, int, dict[str, int]], ...]] = (
    ("minutes", 0, 59, {}),
    ("hours", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, _MONTHS),
    ("day of week", 1, 7, _DAYS),
    ("year", 1970, 2199, {}),
)
_REPEATS_AFTER_DAYS: Final = 28 * 366
_EXAMPLE: Final = "such as cron(30 22 ? * MON-FRI *)"


@dataclass(frozen=True, slots=True)
class Cron:
    """A parsed expression: the numbers each field admits."""

    fields: tuple[frozenset[int], ...]

    def starts_at(self, at: datetime) -> bool:
        """Returns whether a window begins in this minute (UTC)."""
        weekday = at.isoweekday() % 7 + 1
        given = (at.minute, at.hour, at.day, at.month, weekday, at.year)
        return all(value in admitted for value, admitted in zip(given, self.fields, strict=True))

    def next_start(self, after: datetime) -> datetime | None:
        """Returns the first minute at or after a time (UTC) in which a window begins; None = there is none.

        Dates repeat on weekdays after 28 years at most, so later than that there is nothing new to find.
        """
        minutes, hours, days, months, weekdays, years = self.fields
        first = after.astimezone(UTC)
        if first.second or first.microsecond:
            first = first.replace(second=0, microsecond=0) + timedelta(minutes=1)
        for number in range(_REPEATS_AFTER_DAYS):
            day = first.date() + timedelta(days=number)
            if day.year > max(years):
                return None
            fits = day.day in days and day.month in months and day.year in years
            if not fits or day.isoweekday() % 7 + 1 not in weekdays:
                continue
            for hour in sorted(hours):
                for minute in sorted(minutes):
                    found = datetime(day.year, day.month, day.day, hour, minute, tzinfo=UTC)
                    if found >= first:
                        return found
        return None


@dataclass(frozen=True, slots=True)
class MaintenanceSlot:
    """A recurring time in which agents may be given something new."""

    cron: Cron
    minutes: int

    def open_at(self, now: datetime) -> bool:
        """Returns whether the window is open: it began less than `minutes` ago."""
        minute = now.astimezone(UTC).replace(second=0, microsecond=0)
        return any(self.cron.starts_at(minute - timedelta(minutes=back)) for back in range(self.minutes))


def parse_cron(text: str) -> Cron:
    """Returns a parsed cron expression.

    Raises:
        InputError: `rollout.bad_cron`, naming the field.
    """
    body = text.strip()
    if not (body.startswith("cron(") and body.endswith(")")):
        raise InputError("rollout.bad_cron", "This is no recurring time.", expected=_EXAMPLE, got=text[:80])
    parts = body[5:-1].split()
    if len(parts) != len(_FIELDS):
        raise InputError("rollout.bad_cron", "A cron expression has six fields.", expected=_EXAMPLE, got=text[:80])
    return Cron(tuple(_field(part, *bounds) for part, bounds in zip((p.upper() for p in parts), _FIELDS, strict=True)))


def _field(text: str, name: str, low: int, high: int, names: dict[str, int]) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        span, _, step = part.partition("/")
        if span in {"*", "?"}:
            first, last = low, high
        else:
            start, dash, end = span.partition("-")
            first = _number(start, name, names)
            last = _number(end, name, names) if dash else (high if step else first)
        stride = _number(step, name, {}) if step else 1
        if not (low <= first <= last <= high) or stride < 1:
            raise _bad(name, part, low, high)
        found.update(range(first, last + 1, stride))
    return frozenset(found)


def _number(text: str, name: str, names: dict[str, int]) -> int:
    if text in names:
        return names[text]
    if not text.isdecimal() or len(text) > 4:
        raise _bad(name, text, *next((low, high) for field, low, high, _ in _FIELDS if field == name))
    return int(text)


def _bad(name: str, got: str, low: int, high: int) -> InputError:
    return InputError("rollout.bad_cron", f"The field {name} is wrong.", expected=f"{low} to {high}", got=got[:40])


def parse_time(text: str) -> datetime:
    """Returns the time of `2026-05-01T04:30` or `2026-05-01 04:30`, in UTC unless the text names a zone.

    Raises:
        InputError: `rollout.bad_time`.
    """
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        raise InputError("rollout.bad_time", "This is no time.", expected="2026-05-01T04:30", got=text[:64]) from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def may_assign(windows: Sequence[MaintenanceSlot], now: datetime) -> bool:
    """Returns whether agents may be notified now: there are no windows, or one of them is open."""
    return not windows or any(window.open_at(now) for window in windows)


def next_opening(windows: Sequence[MaintenanceSlot], now: datetime) -> datetime | None:
    """Returns when the next window opens, `now` where one is open or none is needed; None = never again."""
    if may_assign(windows, now):
        return now
    starts = [start for window in windows if (start := window.cron.next_start(now)) is not None]
    return min(starts, default=None)


def check_schedule(
    starts_at: datetime | None, ends_at: datetime | None, windows: Sequence[MaintenanceSlot], now: datetime
) -> None:
    """Refuses a schedule in which no agent could ever be notified.

    Raises:
        InputError: `rollout.bad_time` (the end has passed), `rollout.never_opens` (no window opens in time).
    """
    if ends_at is not None and ends_at <= now:
        raise InputError(
            "rollout.bad_time",
            "The end time has passed.",
            expected=f"after {now:%Y-%m-%dT%H:%M} UTC",
            got=f"{ends_at:%Y-%m-%dT%H:%M} UTC",
        )
    opening = next_opening(windows, max(now, starts_at) if starts_at else now)
    if opening is None or (ends_at is not None and opening >= ends_at):
        raise InputError(
            "rollout.never_opens",
            "No maintenance window opens before the rollout ends.",
            expected=f"a window before {ends_at:%Y-%m-%dT%H:%M} UTC" if ends_at else "a window that opens some day",
            got=f"next opening {opening:%Y-%m-%dT%H:%M} UTC" if opening else "none",
        )
