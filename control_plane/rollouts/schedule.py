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
_EXAMPLE: Final = "such as cron(30 22 ? * MON-FRI *)"


@dataclass(frozen=True, slots=True)
class Cron:
    """A parsed expression: the numbers each field admits."""

    fields: tuple[frozenset[int], ...]

    def starts_at(self, at: datetime) -> bool:
        """Whether a window begins in this minute (UTC)."""
        weekday = at.isoweekday() % 7 + 1
        given = (at.minute, at.hour, at.day, at.month, weekday, at.year)
        return all(value in admitted for value, admitted in zip(given, self.fields, strict=True))


@dataclass(frozen=True, slots=True)
class MaintenanceSlot:
    """A recurring time in which agents may be given something new."""

    cron: Cron
    minutes: int

    def open_at(self, now: datetime) -> bool:
        """Whether it is open: it began at most `minutes` ago."""
        minute = now.astimezone(UTC).replace(second=0, microsecond=0)
        return any(self.cron.starts_at(minute - timedelta(minutes=back)) for back in range(self.minutes))


def parse_cron(text: str) -> Cron:
    """Reads an expression.

    Raises:
        InputError: `rollout.bad_cron`, naming the field.
    """
    body = text.strip()
    if not (body.startswith("cron(") and body.endswith(")")):
        raise InputError("rollout.bad_cron", "This is no time that comes again.", expected=_EXAMPLE, got=text[:80])
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
    """`2026-05-01T04:30` or `2026-05-01 04:30`, UTC unless it names a zone.

    Raises:
        InputError: `rollout.bad_time`.
    """
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        raise InputError("rollout.bad_time", "This is no time.", expected="2026-05-01T04:30", got=text[:64]) from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def may_assign(windows: Sequence[MaintenanceSlot], now: datetime) -> bool:
    """Whether agents may be given something now: there are no windows, or one of them is open."""
    return not windows or any(window.open_at(now) for window in windows)
