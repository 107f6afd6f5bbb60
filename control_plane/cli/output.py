"""Output and options that all commands share: text, tables and bars on the terminal, options of the same name.

Data goes to standard output, everything else to standard error. No other file of this folder writes to a console. Text
of users, agents and servers is never markup, and its control characters are made visible.
"""

import functools
import getpass
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_type_hints

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from models.errors import BundleError, InputError
from models.text import visible

_PIPED_COLUMNS: Final = 240
"""Width of a table that goes to a file or a pipe; there is no reason to wrap it at 80."""
R = TypeVar("R")
Shown = Table | str
"""A table, or a line that is printed without wrapping."""


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPED_COLUMNS
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


def note(text: str, *, style: str = "") -> None:
    """Prints a message of one line on standard error."""
    _console(stderr=True).print(Text(visible(text), style=style), soft_wrap=True)


def warn(lead: str, text: str) -> None:
    """Prints a message whose beginning stands out in red."""
    _console(stderr=True).print(Text.assemble((visible(lead), "bold red"), ": ", visible(text)), soft_wrap=True)


def banner(text: str) -> None:
    """Prints a warning in white on red."""
    note(f" {text} ", style="bold white on red")


def show(*parts: Shown, stderr: bool = False) -> None:
    """Prints tables and lines as data."""
    console = _console(stderr=stderr)
    for part in parts:
        if isinstance(part, Table):
            console.print(part)
        else:
            console.print(Text(visible(part)), soft_wrap=True)


def say(value: Any, *, as_json: bool, table: Callable[[Any], Shown | Iterable[Shown]] | None = None) -> None:
    """Prints data: one JSON document where `--json` asks for it, else its table; without a table, its fields."""
    if as_json:
        sys.stdout.write(json.dumps(value, default=str) + "\n")
        return
    shown = facts_of(value) if table is None else table(value)
    show(*([shown] if isinstance(shown, Table | str) else shown))


def table_of(columns: list[str], rows: Iterable[Iterable[Any]]) -> Table:
    """Returns a plain table; None is shown as a dash."""
    found = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        found.add_column(column)
    for row in rows:
        found.add_row(*map(cell, row))
    return found


def cell(value: Any) -> RenderableType:
    """Returns a value as a table shows it; a `Text` keeps its style."""
    return value if isinstance(value, Text) else Text("-" if value is None else visible(str(value)))


def alarming(text: str) -> Text:
    """Returns a cell that stands out."""
    return Text(visible(text), style="bold red")


def facts_of(value: dict[str, Any]) -> Table:
    """Returns the fields of a document, one a row; nested names are joined by dots."""
    found = Table(box=None, show_header=False, pad_edge=False)
    found.add_column(style="bold", no_wrap=True)
    found.add_column(overflow="fold")
    for name, entry in _flat(value, ""):
        found.add_row(cell(name), cell(entry))
    return found


def _flat(value: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, entry in value.items():
        if isinstance(entry, dict) and entry:
            yield from _flat(entry, f"{prefix}{name}.")
        elif isinstance(entry, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(str, entry)) or None
        else:
            yield f"{prefix}{name}", None if entry in ({}, "") else entry


def progress_bar() -> Progress:
    """Returns a bar on standard error, silent where that is no terminal."""
    return Progress(
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=_console(stderr=True),
        transient=False,
        disable=not sys.stderr.isatty(),
    )


# -- what is checked before the first long step -----------------------------------------------------------------------


def new_directory(path: Path) -> Path:
    """Returns the path of a directory that a command will make, after trying that it can.

    Raises:
        BundleError: `bundle.exists`.
        InputError: `output.not_writable`, with the reason of the operating system.
    """
    if _exists(path):
        raise BundleError("bundle.exists", f"{path} is already there.", expected="a new directory", got=path)
    return _writable(path)


def new_file(path: Path) -> Path:
    """Returns the path of a file that a command will write, after trying that it can.

    Raises:
        InputError: `output.not_writable`, with the reason of the operating system.
    """
    if _exists(path) and path.is_dir():
        raise InputError("output.not_writable", f"{path} is a directory.", expected="a file", got="a directory")
    return _writable(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:
        raise _not_writable(path, error) from error


def _writable(path: Path) -> Path:
    """Writes and removes a file in the nearest folder above that exists: a full or read-only place fails now."""
    folder = path.absolute().parent
    while not _exists(folder):
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".sortline-") as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except (OSError, ValueError) as error:
        raise _not_writable(path, error) from error
    return path


def _not_writable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError("output.not_writable", f"{path} cannot be written.", expected="a place to write", got=reason)


# -- options that several commands have -------------------------------------------------------------------------------


def acting(actor: str) -> str:
    """Returns who acts: the name given, else the account at the keyboard."""
    if actor.strip():
        return actor
    try:
        return getpass.getuser()[:64]
    except (KeyError, OSError):
        return "cli"


Actor = Annotated[
    str,
    typer.Option(
        "--actor",
        envvar="SORTLINE_ACTOR",
        help="Name of who acts, kept in the audit trail. Without it, the name of your account on this machine.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead of a table.")]
Server = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="SORTLINE_URL",
        help="URL of the control plane. Without it, http://127.0.0.1:8080.",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file with settings; environment variables SORTLINE__SECTION__KEY override it. Without it, defaults.",
        show_default=False,
    ),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        "--data-dir",
        help="Data folder of the control plane. Without it, `data_dir` of the settings, which is sortline-data.",
        show_default=False,
    ),
]


def with_options(command: Callable[..., R]) -> Callable[..., R]:
    """Lets a command take dataclasses whose fields are its options.

    Every parameter that is annotated with a dataclass is replaced by one option per field; the command gets the object.
    Several commands share a group of options that way, and its rules stand with the object.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {n: p.annotation for n, p in signature.parameters.items() if is_dataclass(p.annotation)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        for one in fields(groups[name]):
            default = inspect.Parameter.empty if one.default is MISSING else one.default
            parameters.append(
                inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[one.name])
            )

    @functools.wraps(command)
    def run(**values: Any) -> R:
        for name, group in groups.items():
            values[name] = group(**{one.name: values.pop(one.name) for one in fields(group)})
        return command(**values)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run
