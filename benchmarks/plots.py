"""Line charts as SVG text, one file, no script, no dependency."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 150, 34, 40
_COLOURS = ("#0b6fb8", "#d9730d", "#2e7d4f", "#8a4fa3", "#6b6b6b")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Content of one panel."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[tuple[str, Points]]
    bound: float | None = None
    """A value that is drawn as a dashed line and always in range."""
    from_zero: bool = True
    x_ticks: Sequence[float] | None = None


def render(charts: Sequence[Chart], caption: str) -> str:
    """Returns the panels below each other, with a caption."""
    height = HEIGHT * len(charts) + 26
    size, font = f'width="{WIDTH}" height="{height}"', 'font-family="Arial" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {size} {font}>',
        f'<rect {size} fill="#ffffff"/>',
    ]
    for number, chart in enumerate(charts):
        parts.append(f'<g transform="translate(0 {number * HEIGHT})">{_panel(chart)}</g>')
    parts.append(f'<text x="{_LEFT}" y="{height - 8}" fill="#555">{escape(caption)}</text></svg>')
    return "\n".join(parts) + "\n"


def _panel(chart: Chart) -> str:
    points = [p for _, line in chart.series for p in line if math.isfinite(p[0]) and math.isfinite(p[1])]
    # Points without a value count too, because the panels of one run share their time axis.
    xs = [x for _, line in chart.series for x, _ in line if math.isfinite(x)] or [0.0, 1.0]
    ys = [y for _, y in points] + ([chart.bound] if chart.bound is not None else [])
    low = 0.0 if chart.from_zero else min(ys, default=0.0)
    y_ticks = _ticks(low, max(ys, default=1.0))
    left, right, bottom, top = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1.0, y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (WIDTH - _LEFT - _RIGHT) * (x - left) / (right - left),
            HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (y - bottom) / (top - bottom),
        )

    title = f"{chart.title}, {chart.y_label}"
    out = [f'<text x="{_LEFT}" y="18" font-weight="bold" font-size="13">{escape(title)}</text>']
    for y in y_ticks:
        level = at(left, y)[1]
        out.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}" stroke="#e3e3e3"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{level + 4:.1f}" text-anchor="end" fill="#444">{y:g}</text>')
    below = HEIGHT - _BOTTOM + 16
    out += [
        f'<text x="{at(x, bottom)[0]:.1f}" y="{below}" text-anchor="middle" fill="#444">{x:g}</text>'
        for x in chart.x_ticks or _ticks(left, right)
        if left <= x <= right
    ]
    edge, beside = WIDTH - _RIGHT, WIDTH - _RIGHT + 12
    out.append(f'<text x="{edge}" y="{HEIGHT - 8}" text-anchor="end" fill="#444">{escape(chart.x_label)}</text>')
    if chart.bound is not None:
        level = at(left, chart.bound)[1]
        out.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}" stroke="#b00020" '
            f'stroke-dasharray="6 4"/><text x="{edge - 4}" y="{level - 5:.1f}" text-anchor="end" fill="#b00020">'
            f"bound {chart.bound:g}</text>"
        )
    for number, (name, line) in enumerate(chart.series):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [at(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(places) <= 24:
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        legend = _TOP + 14 + 17 * number
        out.append(
            f'<line x1="{beside}" x2="{beside + 18}" y1="{legend}" y2="{legend}" stroke="{colour}" '
            f'stroke-width="3"/><text x="{beside + 23}" y="{legend + 4}">{escape(name)}</text>'
        )
    return "".join(out)


def _ticks(low: float, high: float) -> list[float]:
    """Returns four to seven round numbers that enclose the range."""
    span = max(high - low, 1e-9)
    step = 10.0 ** math.floor(math.log10(span / 4.0))
    step *= next(factor for factor in (1.0, 2.0, 5.0, 10.0) if span / (step * factor) <= 6.0)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 10) for k in range(first, max(last, first + 1) + 1)]
