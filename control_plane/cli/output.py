"""What every command shares: where data and messages go, options of the same name, tables, bars."""

import getpass
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

err = Console(stderr=True)
out = Console()


def me() -> str:
    """Who is at the keyboard."""
    try:
        return getpass.getuser()[:64]
    except (KeyError, OSError):
        return "cli"


Actor = Annotated[str, typer.Option("--actor", envvar="SORTLINE_ACTOR", help="Who acts; kept in the audit trail.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Server = Annotated[str, typer.Option("--server", envvar="SORTLINE_URL", help="URL of the control plane.")]
Config = Annotated[Path | None, typer.Option("--config", help="TOML; SORTLINE__SECTION__KEY overrides it.")]


def say(value: Any, *, as_json: bool, table: Callable[[Any], Table] | None = None) -> None:
    """Prints data: JSON for a script or where there is no table for it, else the table."""
    if as_json or table is None:
        sys.stdout.write(json.dumps(value, indent=None if as_json else 2, default=str) + "\n")
    else:
        out.print(table(value))


def table_of(columns: list[str], rows: list[list[Any]]) -> Table:
    """A plain table; None is shown as a dash."""
    found = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        found.add_column(column)
    for row in rows:
        found.add_row(*("-" if cell is None else str(cell) for cell in row))
    return found


def progress_bar() -> Progress:
    """A bar on standard error, silent where that is no terminal."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=err,
        transient=False,
        disable=not sys.stderr.isatty(),
    )
