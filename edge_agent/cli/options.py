"""What the subcommands of `sortline-agent` share: flags, configuration from flags, checks of outputs, printing.

Every check here runs before the first long step, so that a mistake in the last argument costs a second, not an hour.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.state_directory import StateDirectory
from models.connection import parse_broker
from models.errors import ConfigError, InputError

_LINE_FLAGS = ("camera", "lanes", "items_per_s", "seed", "photos", "defect_share", "hollow_share", "trouble")


def line_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a line: configuration file, camera, lanes, simulation."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML; SORTLINE_AGENT__SECTION__KEY overrides it")
    parser.add_argument("--camera", help="simulated, a video, a folder of frames, /dev/video0, rtsp://...")
    parser.add_argument("--unpaced", action="store_true", help="recordings: as fast as possible, every frame")
    parser.add_argument("--loop", action="store_true", help="recordings: again from the start at the end")
    parser.add_argument("--lanes", type=int, help="lanes in the image (default: 2)")
    parser.add_argument("--items-per-s", type=float, help="simulated: items per second and lane (default: 9)")
    parser.add_argument("--seed", type=int, help="simulated: which world")
    parser.add_argument("--photos", metavar="DIR", help="simulated: roll these real photographs")
    parser.add_argument("--defect-share", type=float, help="simulated: share of defective items")
    parser.add_argument("--hollow-share", type=float, help="simulated: share of the others that only a scale reveals")
    parser.add_argument("--trouble", metavar="SCHEDULE", help='simulated: such as "30s brightness=0.7; 60s clear"')


def config_of(arguments: argparse.Namespace) -> Any:
    """Returns the agent's configuration: defaults < file < environment < flags.

    Raises:
        ConfigError: See `models.config.load_config` and `models.connection.parse_broker`.
    """
    from edge_agent.config import load_agent_config  # noqa: PLC0415

    line = {name: getattr(arguments, name) for name in _LINE_FLAGS if getattr(arguments, name, None) is not None}
    if getattr(arguments, "unpaced", False):
        line["paced"] = False
    if getattr(arguments, "loop", False):
        line["loop"] = True
    overrides: dict[str, Any] = {"line": line} if line else {}
    for flag, key in (("id", "id"), ("state_dir", "state_dir")):
        if getattr(arguments, flag, None) is not None:
            overrides[key] = str(getattr(arguments, flag))
    if getattr(arguments, "broker", None) is not None:
        address = parse_broker(arguments.broker)
        overrides["broker"] = {"host": address.host, "tls": address.tls}
        if address.port is not None:
            overrides["broker"]["port"] = address.port
    if getattr(arguments, "password_file", None):
        overrides.setdefault("broker", {})["password_file"] = arguments.password_file
    return load_agent_config(arguments.config, overrides)


def agent_directory(root: Path) -> StateDirectory:
    """Returns the state directory of an agent that has run here.

    Raises:
        ConfigError: `agent.no_state`.
    """
    places = StateDirectory(root)
    if not places.lock_file.exists():
        raise ConfigError("agent.no_state", f"{root} holds no agent.", expected="--state-dir of an agent", got=root)
    return places


def at_least(least: float, kind: Callable[[str], float] = float) -> Callable[[str], Any]:
    """A type of an argument: a finite number of this kind, at least this large."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least:g}")
        return value

    return read


def check_file(path: Path) -> None:
    """Refuses an output file that could not be written at the end; writes nothing that stays.

    Raises:
        InputError: `output.not_writable`.
        OSError: Such as a full disk.
    """
    if path.is_dir():
        raise _not_writable(path, "a folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise _not_writable(path, "a file that may not be changed")
    _try_folder(path, path.parent)


def check_folder(path: Path) -> None:
    """Refuses an output folder in which nothing could be written at the end; makes nothing that stays.

    Raises:
        InputError: `output.not_writable`.
        OSError: Such as a full disk.
    """
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    _try_folder(path, nearest)


def _try_folder(path: Path, folder: Path) -> None:
    """Permissions alone do not say what a read-only or a full disk will do: a file is tried."""
    if not folder.is_dir():
        raise _not_writable(path, f"{folder} is no folder" if folder.exists() else f"there is no folder {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"\0" * 4096)
            stream.flush()
    except PermissionError as error:
        raise _not_writable(path, error.strerror) from error


def _not_writable(path: Path, got: object) -> InputError:
    return InputError(
        "output.not_writable", f"{path} cannot be written.", expected="a place that can be written", got=got
    )


def progress_line(what: str, unit: str) -> Callable[[int, int], None]:
    """Shows how far a long step is, on a terminal only."""

    def show(done: int, wanted: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{what} {done}/{wanted} {unit} ")

    return show


def end_progress() -> None:
    """Ends the line of `progress_line`."""
    if sys.stderr.isatty():
        sys.stderr.write("\n")


def print_facts(facts: dict[str, Any], *, as_json: bool) -> None:
    """Prints facts on standard output: one line each, or one JSON object."""
    if as_json:
        sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
        return
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        sys.stdout.write(f"{key.replace('_', ' '):<{width}}  {value}\n")
