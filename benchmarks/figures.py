"""Figures of a benchmark run: rows with units and bounds, plots, and one JSON file with all of it."""

import json
import math
import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Value = float | str
Row = tuple[str, Value, str]
"""One row of a table: name, value, unit."""
Bound = tuple[str, float]
"""`<=` or `>=`, and the limit."""


@dataclass(slots=True)
class Figures:
    """Collects the figures of all stages, prints them, and records missed bounds."""

    console: Console
    data: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)
    """Name -> SVG text."""

    def table(self, title: str, rows: list[Row], bounds: dict[str, Bound], *, note: str = "") -> None:
        """Prints a table; a figure that misses its bound, or is not a number, is red and fails the run."""
        unknown = bounds.keys() - {name for name, _, _ in rows}
        if unknown:
            raise ValueError(f"bounds without a figure: {sorted(unknown)}")
        # The table is wide enough for the title, which rich would break over several lines.
        table = Table(title=title, title_justify="left", min_width=len(title) + 2, caption=note, caption_justify="left")
        for head in ("figure", "value", "bound"):
            table.add_column(head, justify="left" if head == "figure" else "right")
        for name, value, unit in rows:
            shown, ok = self._judge(title, name, value, unit, bounds.get(name))
            sign, limit = bounds.get(name, ("", 0.0))
            table.add_row(name, shown if ok else f"[red]{shown}", f"{sign} {limit:g}" if sign else "")
        self.data[title] = {name: value for name, value, _ in rows}
        self.console.print(table)

    def _judge(self, title: str, name: str, value: Value, unit: str, bound: Bound | None) -> tuple[str, bool]:
        shown = value if isinstance(value, str) else f"{value:,.4g} {unit}".rstrip()
        if bound is None:
            return shown, True
        sign, limit = bound
        number = math.nan if isinstance(value, str) else float(value)
        ok = number <= limit if sign == "<=" else number >= limit
        if not ok:
            self.missed.append(f"{title}: {name} is {shown}, bound {sign} {limit:g}")
        return shown, ok

    def skip(self, title: str, why: str) -> None:
        """Records and prints that a stage was not measured, with the reason."""
        self.skipped.append(f"{title}: {why}")
        self.console.print(f"[yellow]skipped[/] {title}: {why}\n")

    def write(self, path: Path, options: dict[str, Any]) -> None:
        """Writes all figures as JSON, with time, machine and versions."""
        about = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "cores": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "versions": {name: version(name) for name in ("numpy", "opencv-python-headless", "onnxruntime")},
            "options": options,
        }
        whole = {"about": about, "figures": self.data, "missed": self.missed, "skipped": self.skipped}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_finite(whole), indent=2) + "\n", encoding="utf-8")

    def write_plots(self, folder: Path) -> None:
        """Writes one SVG file per plot."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.plots.items():
            (folder / f"{name}.svg").write_text(text, encoding="utf-8")
            self.console.print(f"plot: {folder / f'{name}.svg'}", highlight=False)


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
