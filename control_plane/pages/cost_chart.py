"""The cost curve of a recipe as SVG: what mistakes cost at each threshold, where the recipe's lies, what gets through.

Two pictures, one above the other, share the axis of thresholds: costs with their interval, and the rates of escape
and false rejects. On a page the style sheet colours them; alone, as a file, they bring their own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from markupsafe import Markup

_WIDTH, _LEFT, _RIGHT = 760, 62, 24
_TOP, _MIDDLE, _GAP, _LOW = 58, 190, 44, 120
_HEIGHT = _TOP + _MIDDLE + _GAP + _LOW + 40
_STYLE: Final = Markup("""<style>
svg { background: #ffffff; font: 12px "DejaVu Sans", sans-serif; }
text { fill: #5c6b7a; } .title { fill: #16202a; font-weight: 600; } .grid { stroke: #e1e4e8; }
path { fill: none; stroke-width: 1.8; } .cost { stroke: #5f6f82; } .band { fill: #5f6f82; opacity: .16; stroke: none; }
.mark { stroke: #1f6feb; stroke-width: 1.6; } .mark-text { fill: #1f6feb; font-weight: 600; }
.best { fill: #2e7d32; } .best-line { stroke: #2e7d32; stroke-width: 3; }
.unsure { fill: #9a7b00; opacity: .16; } .unsure-text { fill: #9a7b00; }
.escape { stroke: #c62828; } .waste { stroke: #d9730d; stroke-dasharray: 6 4; }
.escape-text { fill: #c62828; } .waste-text { fill: #d9730d; }
</style>""")
Row = dict[str, Any]
Place = Callable[[float], float]


def cost_chart(shown: dict[str, Any], *, alone: bool = False) -> Markup:
    """Draws what `control_plane.registry.recipes.described` returns; a sentence where costs are not known.

    Args:
        shown: A described recipe.
        alone: A file of its own, with colours and name space.
    """
    costs = shown["costs"]
    if costs is None:
        return Markup('<p class="empty">This bundle brings no held-out items: its costs are not known.</p>')
    curve: list[Row] = costs["curve"]
    # The ends (throw everything away, nothing away) may cost many times what is of interest.
    seen = [row["cost"] for row in curve] + [costs["recipe"]["cost"]["high"]]
    top: float = max(min(max(seen), 4.0 * max(costs["recipe"]["cost"]["high"], costs["minimum"]["cost"])), 1e-9) * 1.08

    def x(t: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * t

    def y(cost: float) -> float:
        return _TOP + _MIDDLE * (1.0 - min(cost, top) / top)

    def share(value: float) -> float:
        return _TOP + _MIDDLE + _GAP + _LOW * (1.0 - value)

    parts = [
        _frame(x, y, top),
        _band(curve, x, y),
        _line("cost", curve, "cost", x, y),
        _rates(curve, x, share),
        _minimum(costs["minimum"], x, y),
        _places(shown, costs, x),
    ]
    label = "Cost of mistakes over the threshold; the recipe's own is marked"
    head = Markup(' xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}"').format(_WIDTH, _HEIGHT)
    return Markup('<svg class="chart costs"{} viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>').format(
        head if alone else "", _WIDTH, _HEIGHT, label, _STYLE if alone else "", Markup("").join(parts)
    )


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _frame(x: Place, y: Place, top: float) -> Markup:
    """Titles, grids and axes of both pictures."""
    foot = _TOP + _MIDDLE + _GAP + _LOW
    parts = [
        _text("title", _LEFT, 18, "Cost of mistakes per 1000 items, above perfect grading"),
        _text("title", _LEFT, _TOP + _MIDDLE + _GAP - 10, "Share of items"),
        _text(
            "axis", (x(0.0) + x(1.0)) / 2, foot + 34, "threshold: defect probability from which items leave", "middle"
        ),
    ]
    step = 10.0 ** math.floor(math.log10(top / 2.0))
    step *= 5 if top / step > 12 else (2 if top / step > 5 else 1)
    for cost in (k * step for k in range(int(top / step) + 1)):
        parts += [_grid(x(0.0), x(1.0), y(cost)), _text("axis", _LEFT - 8, y(cost) + 4, f"{cost:,.4g}", "end")]
    for share in (0.0, 0.5, 1.0):
        at = _TOP + _MIDDLE + _GAP + _LOW * (1.0 - share)
        parts += [_grid(x(0.0), x(1.0), at), _text("axis", _LEFT - 8, at + 4, f"{share:.0%}", "end")]
    parts += [_text("axis", x(k / 10), foot + 17, f"{k * 10} %", "middle") for k in range(0, 11, 2)]
    return Markup("").join(parts)


def _grid(left: float, right: float, at: float) -> Markup:
    return Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(left, right, at, at)


def _points(curve: Sequence[Row], key: str, x: Place, y: Place) -> str:
    return " ".join(f"{x(row['threshold']):.1f},{y(row[key]):.1f}" for row in curve)


def _line(kind: str, curve: Sequence[Row], key: str, x: Place, y: Place) -> Markup:
    return Markup('<path class="{}" d="M{}"/>').format(kind, _points(curve, key, x, y))


def _band(curve: Sequence[Row], x: Place, y: Place) -> Markup:
    return Markup('<polygon class="band" points="{} {}"/>').format(
        _points(curve, "high", x, y), _points(curve[::-1], "low", x, y)
    )


def _rates(curve: Sequence[Row], x: Place, share: Place) -> Markup:
    head = _TOP + _MIDDLE + _GAP - 10
    return Markup("").join(
        [
            _line("escape", curve, "escape_rate", x, share),
            _line("waste", curve, "false_reject_rate", x, share),
            _text("escape-text", x(1.0), head, "defects that escape", "end"),
            _text("waste-text", x(1.0) - 150, head, "good items thrown away (dashed)", "end"),
        ]
    )


def _minimum(best: Row, x: Place, y: Place) -> Markup:
    """Returns the lowest place of the curve, and the interval in which resampled items put it, at the foot."""
    foot = _TOP + _MIDDLE
    left, right = x(best["low"]), max(x(best["high"]), x(best["low"]) + 2.0)
    line = Markup('<line class="best-line" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(left, right, foot, foot)
    dot = Markup('<circle class="best" cx="{:.1f}" cy="{:.1f}" r="4.5"/>').format(x(best["threshold"]), y(best["cost"]))
    return line + dot


def _places(shown: dict[str, Any], costs: dict[str, Any], x: Place) -> Markup:
    """Draws where the recipe's thresholds and its band lie, and the legend of the marks."""
    parts, foot, drawn = [], _TOP + _MIDDLE + _GAP + _LOW, set[float]()
    for name, cut in shown["thresholds"].items():
        if cut["unsure"]:
            low, high = cut["unsure"]
            parts.append(
                Markup('<rect class="unsure" x="{:.1f}" width="{:.1f}" y="{}" height="{}"/>').format(
                    x(low), max(x(high) - x(low), 1.0), _TOP, foot - _TOP
                )
            )
        at = cut["threshold"]
        if at is None or round(at, 4) in drawn:
            continue
        drawn.add(round(at, 4))
        parts.append(
            Markup('<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x(at), _TOP, foot)
        )
        text = f"{name} {at:.1%}" if len(shown["thresholds"]) > 1 else f"threshold {at:.1%}"
        side = "end" if at > 0.8 else "start"
        parts.append(_text("mark-text", x(at) + (-5 if side == "end" else 5), _TOP + 13 * len(drawn), text, side))
    best = costs["minimum"]
    legend = f"● cheapest {best['threshold']:.1%}, bar: 95 % interval {best['low']:.1%} to {best['high']:.1%}"
    parts.append(_text("best", _LEFT, 38, legend))
    if any(cut["unsure"] for cut in shown["thresholds"].values()):
        own = costs["recipe"]["abstain"]
        text = f"unsure: {own['value']:.1%} of items, budget {own['budget']:.1%}"
        parts.append(_text("unsure-text", x(1.0), 38, text, "end"))
    return Markup("").join(parts)
