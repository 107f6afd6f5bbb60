"""Charts as SVG text: small, printable, without script. Colours come from the style sheet's classes."""

import math
from collections.abc import Sequence
from datetime import datetime

from markupsafe import Markup, escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 200, 38, 22


def meter(value: float | None, full: float) -> Markup:
    """A bar of `value` against `full`; marked when it is over."""
    share = 0.0 if value is None else min(max(value / full, 0.0), 1.0)
    over = " over" if value is not None and value > full else ""
    return Markup(
        '<span class="meter{}"><svg viewBox="0 0 64 6" aria-hidden="true">'
        '<rect width="{:.1f}" height="6"/></svg></span>'
    ).format(over, share * 64.0)


def mix(classes: dict[str, int], order: Sequence[str]) -> Markup:
    """A bar of 0-100 % divided by class."""
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
        '<span class="mix" title="{}"><svg viewBox="0 0 132 12" role="img" aria-label="{}">{}</svg></span>'
    ).format(text, text, Markup("").join(parts))


def lines(
    series: Sequence[tuple[str, Sequence[tuple[datetime, float]]]], *, budget: float, marks: Sequence[datetime]
) -> Markup:
    """Lines over time with a budget line and vertical marks where the bundle changed.

    Args:
        series: (class name, points); NaN breaks a line.
        budget: Drawn as a dashed line, and always in range.
        marks: Times of changes.
    """
    known = [(at, value) for _, points in series for at, value in points if math.isfinite(value)]
    if len(known) < 2:
        return Markup('<p class="empty">Not enough windows yet.</p>')
    first, last = min(at for at, _ in known), max(at for at, _ in known)
    span = max((last - first).total_seconds(), 1.0)
    top = max(budget * 1.15, max(value for _, value in known) * 1.1)

    def x(at: datetime) -> float:
        return _LEFT + (_WIDTH - _LEFT - 8) * (at - first).total_seconds() / span

    def y(value: float) -> float:
        return 6 + (_HEIGHT - _BOTTOM - 6) * (1.0 - value / top)

    body = [_axis(y, top), _times(x, first, last)]
    body += [
        Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="6" y2="{1}"/>').format(x(at), _HEIGHT - _BOTTOM)
        + Markup('<text x="{:.1f}" y="14">bundle</text>').format(x(at) + 3)
        for at in marks
    ]
    body.append(
        Markup('<line class="budget" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            _LEFT, _WIDTH - 8, y(budget), y(budget)
        )
    )
    body += [Markup('<path class="{}" d="{}"/>').format(name, _path(points, x, y)) for name, points in series]
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="latency over time">{}</svg>').format(
        _WIDTH, _HEIGHT, Markup("").join(body)
    )


def _axis(y: "object", top: float) -> Markup:
    assert callable(y)  # noqa: S101  a local function of the only caller
    step = 10 ** math.floor(math.log10(top / 2.0))
    step *= 5 if top / step > 12 else (2 if top / step > 5 else 1)
    ticks = [k * step for k in range(int(top / step) + 1)]
    return Markup("").join(
        Markup(
            '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/><text x="4" y="{3:.1f}">{4:g}</text>'
        ).format(_LEFT, _WIDTH - 8, y(tick), y(tick) + 4, tick)
        for tick in ticks
    )


def _times(x: "object", first: datetime, last: datetime) -> Markup:
    assert callable(x)  # noqa: S101  as above
    places = [first + (last - first) * share for share in (0.0, 0.25, 0.5, 0.75)]
    return Markup("").join(
        Markup('<text x="{:.1f}" y="{}">{}</text>').format(x(at), _HEIGHT - 6, escape(f"{at:%H:%M:%S}"))
        for at in places
    )


def _path(points: Sequence[tuple[datetime, float]], x: "object", y: "object") -> str:
    assert callable(x)  # noqa: S101  as above
    assert callable(y)  # noqa: S101
    text, pen = [], "M"
    for at, value in points:
        if not math.isfinite(value):
            pen = "M"
            continue
        text.append(f"{pen}{x(at):.1f} {y(value):.1f}")
        pen = "L"
    return "".join(text)
