"""Draws the evidence of alarms as SVG text: the grid of dirt over the lens, histograms before and since, shares."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup

_WIDTH: Final = 320.0
_HEIGHT: Final = 240.0
_MOST_CELLS: Final = 4096


def grid_of(value: object) -> list[list[float]]:
    """Returns a grid of shares within [0, 1]; empty where the value is none."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return []
    rows = []
    for row in value:
        if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != len(value[0]):
            return []
        rows.append([min(max(float(v), 0.0), 1.0) if isinstance(v, int | float) else 0.0 for v in row])
    return rows if rows[0] and len(rows) * len(rows[0]) <= _MOST_CELLS else []


def dirt_map(value: object, picture: str = "") -> Markup:
    """Returns the picture as the camera sees it with the dirty places marked; empty where there is no grid.

    Args:
        value: Rows from the top, each from the left, share of looks in which the place was dirty.
        picture: Address of a picture to lay beneath; empty = none.
    """
    grid = grid_of(value)
    if not grid:
        return Markup("")
    high, wide = _HEIGHT / len(grid), _WIDTH / len(grid[0])
    cells = [
        Markup(
            '<rect class="dirt" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.2f}"/>'
        ).format(column * wide, row * high, wide, high, share)
        for row, shares in enumerate(grid)
        for column, share in enumerate(shares)
        if share >= 0.05
    ]
    below = (
        Markup('<image href="{}" width="320" height="240" preserveAspectRatio="none"/>').format(picture)
        if picture
        else Markup("")
    )
    text = f"dirt in {sum(share >= 0.5 for row in grid for share in row)} of {len(grid) * len(grid[0])} places"
    return Markup(
        '<svg class="lens" viewBox="0 0 320 240" role="img" aria-label="{}">'
        '<rect class="ground" width="320" height="240"/>{}{}<rect class="frame" width="320" height="240"/></svg>'
    ).format(text, below, Markup("").join(cells))


def histogram(before: Sequence[float], since: Sequence[float], label: str) -> Markup:
    """Returns the shares per bin: before as an outline, since as bars."""
    top = max([*before, *since, 1e-9])
    wide = 240.0 / max(len(since), len(before), 1)

    def height(share: float) -> float:
        return 84.0 * share / top

    bars = Markup("").join(
        Markup('<rect class="since" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            k * wide + 1, 88 - height(share), wide - 2, height(share)
        )
        for k, share in enumerate(since)
    )
    steps = "".join(f"L{k * wide:.1f} {88 - height(s):.1f}H{(k + 1) * wide:.1f}" for k, s in enumerate(before))
    outline = Markup('<path class="before" d="M0 88{}V88"/>').format(steps) if any(before) else Markup("")
    return Markup(
        '<svg class="histogram" viewBox="0 0 240 90" role="img" aria-label="{}">{}{}'
        '<line class="grid" x1="0" x2="240" y1="88.5" y2="88.5"/></svg>'
    ).format(label, bars, outline)


def share_bars(usual: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Markup, str, str]]:
    """Returns (name, bar, usual, now) of each class, the largest change first."""
    names = [name for name in {**usual, **now} if _number(usual.get(name)) or _number(now.get(name))]
    found = []
    for name in sorted(names, key=lambda n: -abs(_number(now.get(n)) - _number(usual.get(n)))):
        a, b = _number(usual.get(name)), _number(now.get(name))
        bar = Markup(
            '<svg class="sharebar" viewBox="0 0 160 12" aria-hidden="true"><rect class="ground" y="3" width="160"'
            ' height="6"/><rect class="value" y="3" width="{:.1f}" height="6"/><rect class="mark" x="{:.1f}" width="2"'
            ' height="12"/></svg>'
        ).format(160 * min(b, 1.0), min(160 * min(a, 1.0), 158.0))
        found.append((name, bar, f"{a:.1%}", f"{b:.1%}"))
    return found


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def figure_rows(evidence: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns (name, before, now, limit) of the figures that evidence gives for before and now."""
    before = evidence.get("before") if isinstance(evidence.get("before"), Mapping) else {"": evidence.get("usual")}
    after = evidence.get("now", evidence.get("after"))
    now = after if isinstance(after, Mapping) else {"": after}
    limits = evidence.get("threshold")
    limit = limits if isinstance(limits, Mapping) else {}
    names = [name for name in now if now[name] is not None]
    words = {name: str(name).replace("_", " ") or "value" for name in names}
    return [(words[n], _shown((before or {}).get(n)), _shown(now[n]), _shown(limit.get(n))) for n in names]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


DRAWN: Final = frozenset(
    {
        *("dirt", "features", "usual_shares", "shares", "counts", "before", "now", "after", "threshold", "usual"),
        *("explains", "harm", "direction"),
    }
)
"""Evidence that is drawn, or is no reading for people; the rest is listed."""


def other_facts(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, value) of the evidence that nothing draws, in one line each."""
    found = []
    for name, value in evidence.items():
        if name in DRAWN:
            continue
        if isinstance(value, Mapping):
            text = ", ".join(f"{key} {_shown(entry)}" for key, entry in value.items())
        elif isinstance(value, list | tuple):
            text = ", ".join(_shown(entry) for entry in value[:20]) + (" …" if len(value) > 20 else "")
        else:
            text = _shown(value)
        found.append((str(name).replace("_", " "), text[:400]))
    return found
