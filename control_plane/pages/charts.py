"""Charts as SVG text: small, printable, without script. Colours come from the style sheet's classes."""

import math
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 200, 38, 22
Mark = tuple[datetime, str]


def meter(value: float | None, full: float) -> Markup:
    """Returns a bar of `value` against `full`; marked when it is over."""
    share = 0.0 if value is None else min(max(value / full, 0.0), 1.0)
    over = " over" if value is not None and value > full else ""
    return Markup(
        '<span class="meter{}"><svg viewBox="0 0 64 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect width="{:.1f}" height="6"/></svg></span>'
    ).format(over, share * 64.0)


def mix(classes: dict[str, int], order: Sequence[str]) -> Markup:
    """Returns a bar of 0-100 % divided by class."""
    total = sum(classes.values())
    if not total:
        return Markup('<span class="mix" title="no verdicts yet"></span>')
    parts, at = [], 0.0
    for index, name in enumerate(order):
        width = 132.0 * classes.get(name, 0) / total
        parts.append(Markup('<rect class="k{}" x="{:.2f}" width="{:.2f}" height="12"/>').format(index % 8, at, width))
        at += width
    text = ", ".join(f"{name} {classes.get(name, 0) / total:.1%}" for name in order if classes.get(name))
    return Markup(
        '<span class="mix" title="{}"><svg viewBox="0 0 132 12" preserveAspectRatio="none" role="img" '
        'aria-label="{}">{}</svg></span>'
    ).format(text, text, Markup("").join(parts))


class Scale(NamedTuple):
    """Maps a time and a value to places in the picture."""

    first: datetime
    last: datetime
    top: float

    def x(self, at: datetime) -> float:
        """Returns the horizontal position of a time, in pixels."""
        span = max((self.last - self.first).total_seconds(), 1.0)
        return _LEFT + (_WIDTH - _LEFT - 8) * (at - self.first).total_seconds() / span

    def y(self, value: float) -> float:
        """Returns the vertical position of a value, in pixels; 0 is at the bottom."""
        return 6 + (_HEIGHT - _BOTTOM - 6) * (1.0 - value / self.top)


def lines(
    series: Sequence[tuple[str, Sequence[tuple[datetime, float]]]], *, budget: float, marks: Sequence[Mark]
) -> Markup:
    """Returns lines over time with a budget line and vertical marks.

    Args:
        series: (class name, points); NaN breaks a line.
        budget: Drawn as a dashed line, and always in range.
        marks: (time, word) of changes.
    """
    known = [(at, value) for _, points in series for at, value in points if math.isfinite(value)]
    if len(known) < 2:
        return Markup('<p class="empty">Not enough windows yet.</p>')
    top = max(budget * 1.15, max(value for _, value in known) * 1.1)
    times = [at for _, points in series for at, _ in points]
    scale = Scale(min(times), max(times), top)
    limit = Markup('<line class="budget" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
        _LEFT, _WIDTH - 8, scale.y(budget), scale.y(budget)
    )
    drawn = [Markup('<path class="{}" d="{}"/>').format(name, _path(points, scale)) for name, points in series]
    return _chart("latency over time", [_axis(scale), _times(scale), _marks(scale, marks), limit, *drawn])


def shares(points: Sequence[tuple[datetime, dict[str, int]]], order: Sequence[str], *, marks: Sequence[Mark]) -> Markup:
    """Returns the shares of classes over time, stacked from 0 to 100 %, one step per window.

    Args:
        points: (end of the window, count by class) in order of time; windows without items leave a gap.
        order: Classes from the bottom up; the place decides the colour.
        marks: (time, word) of changes.
    """
    if sum(1 for _, counts in points if sum(counts.values())) < 2:
        return Markup('<p class="empty">Not enough windows yet.</p>')
    scale = Scale(points[0][0], points[-1][0], 100.0)
    drawn = [_column(scale, (before, at), counts, order) for (before, _), (at, counts) in pairwise(points)]
    return _chart("verdicts over time", [_axis(scale), *drawn, _times(scale), _marks(scale, marks)])


def _column(scale: Scale, between: tuple[datetime, datetime], counts: dict[str, int], order: Sequence[str]) -> Markup:
    total, below = sum(counts.values()), 0
    left, right = scale.x(between[0]), scale.x(between[1])
    parts = []
    for index, name in enumerate(order):
        if not (count := counts.get(name, 0)):
            continue
        bottom, top = scale.y(100.0 * below / total), scale.y(100.0 * (below + count) / total)
        below += count
        parts.append(
            Markup('<rect class="k{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                index % 8, left, top, right - left + 0.3, bottom - top
            )
        )
    return Markup("").join(parts)


def _chart(label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, label, Markup("").join(parts)
    )


def _marks(scale: Scale, marks: Sequence[Mark]) -> Markup:
    """Returns vertical lines with their words."""
    return Markup("").join(
        Markup('<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="6" y2="{1}"/>').format(scale.x(at), _HEIGHT - _BOTTOM)
        + Markup('<text x="{:.1f}" y="14">{}</text>').format(scale.x(at) + 3, word)
        for at, word in marks
    )


def _axis(scale: Scale) -> Markup:
    step = 10 ** math.floor(math.log10(scale.top / 2.0))
    step *= 5 if scale.top / step > 12 else (2 if scale.top / step > 5 else 1)
    ticks = [k * step for k in range(int(scale.top / step) + 1)]
    return Markup("").join(
        Markup(
            '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/><text x="4" y="{3:.1f}">{4:g}</text>'
        ).format(_LEFT, _WIDTH - 8, scale.y(tick), scale.y(tick) + 4, tick)
        for tick in ticks
    )


def _times(scale: Scale) -> Markup:
    places = [scale.first + (scale.last - scale.first) * share for share in (0.0, 0.25, 0.5, 0.75)]
    # Over midnight a time alone would be of any day.
    form = "%H:%M:%S" if scale.first.date() == scale.last.date() else "%d %b %H:%M"
    return Markup("").join(
        Markup('<text x="{:.1f}" y="{}">{}</text>').format(scale.x(at), _HEIGHT - 6, at.strftime(form)) for at in places
    )


def _path(points: Sequence[tuple[datetime, float]], scale: Scale) -> str:
    text, pen = [], "M"
    for at, value in points:
        if not math.isfinite(value):
            pen = "M"
            continue
        text.append(f"{pen}{scale.x(at):.1f} {scale.y(value):.1f}")
        pen = "L"
    return "".join(text)
