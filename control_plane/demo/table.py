"""The table that the demo shows while its lines sort."""

from typing import Any, Final

from rich.table import Table

WIDE_COLUMNS: Final = 120
_COLUMNS: Final = (
    # wide, narrow: eighty columns must hold a row
    ("line", "line"),
    ("items/s", "it/s"),
    ("verdicts %", "good%"),
    ("p50/p99 ms", "p50/p99"),
    ("ejected", "eject"),
    ("late", "late"),
    ("wrong", "wrong"),
    ("escaped %", "esc%"),
    ("wasted %", "waste%"),
    ("dropped", "drop"),
    ("bundle", "bundle"),
    ("window", "age"),
)


def fleet_table(agents: list[dict[str, Any]], *, wide: bool) -> Table:
    """Returns one row per agent; narrow tables fit 80 columns."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for names in _COLUMNS:
        name = names[0 if wide else 1]
        table.add_column(name, no_wrap=True, justify="left" if name in {"line", "verdicts %", "bundle"} else "right")
    for agent in sorted(agents, key=lambda a: str(a["id"])):
        live = agent["live"] or {}
        shots = live.get("ejections", {})
        table.add_row(
            agent["id"],
            f"{live.get('items_per_s', 0.0):.1f}",
            _mix(live.get("classes", {}), wide=wide),
            f"{live.get('p50_ms', 0.0):.0f}/{live.get('p99_ms', 0.0):.0f}",
            str(shots.get("on_time", 0)),
            str(shots.get("late", 0) + live.get("verdicts_late", 0)),
            str(shots.get("wrong", 0) + shots.get("gap", 0)),
            _percent(agent["escape_rate"]),
            _percent(agent["false_reject_rate"]),
            str(live.get("frames_dropped", 0)),
            agent["active"][:6] or "none",
            "none" if agent["window_age_s"] is None else f"{agent['window_age_s']:.0f} s",
        )
    return table


def _mix(classes: dict[str, int], *, wide: bool) -> str:
    """Verdict mix in percent; only the good share where there is no room."""
    total = sum(classes.values())
    if not total:
        return "-"
    if not wide:
        return f"{100 * classes.get('sound', 0) / total:.0f}"
    return " ".join(f"{k} {100 * v / total:.0f}" for k, v in sorted(classes.items(), key=lambda pair: -pair[1]))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
