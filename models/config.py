"""Configuration of both sides: a TOML file, overlaid by the environment, checked before anything starts.

`SORTLINE_AGENT__BROKER__PORT=1884` sets `port` in `[broker]` of the agent's configuration: prefix, then one double
underscore per level. Unknown keys are refused with the nearest known one; every field has its type, bounds and
default in the configuration's struct. Built once in the command line, passed down, never global.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from models.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)
_MAX_CONFIG_BYTES = 1024 * 1024


def load_config(
    kind: type[T],
    path: Path | None,
    *,
    environment: Mapping[str, str],
    prefix: str,
    overrides: Mapping[str, Any] | None = None,
) -> T:
    """Builds a configuration: defaults < file < environment < `overrides` (command line flags).

    Args:
        kind: A frozen msgspec struct; nested structs are sections.
        path: TOML file, or None for none.
        environment: Usually `os.environ`.
        prefix: Such as `SORTLINE_AGENT`.
        overrides: Nested mapping of what the command line says.

    Raises:
        ConfigError: `config.unreadable`, `config.malformed`, `config.unknown_key`, `config.bad_value`.
    """
    values = _read(path) if path else {}
    for name, text in sorted(environment.items()):
        if name.startswith(f"{prefix}__"):
            _place(values, [part.lower() for part in name[len(prefix) + 2 :].split("__")], text, name)
    _overlay(values, overrides or {})
    _check_keys(values, kind, "")
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            "config.bad_value", f"A configuration value is not acceptable: {error}.", source=path or prefix
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "config.unreadable", f"{path} cannot be read.", expected="a TOML file", got=error.strerror
        ) from error
    try:
        if len(data) > _MAX_CONFIG_BYTES:
            raise ValueError(f"{len(data)} bytes")
        return tomllib.loads(data.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(
            "config.malformed", f"{path} is not TOML.", expected="TOML, UTF-8, <= 1 MiB", got=error
        ) from error


def _place(values: dict[str, Any], keys: list[str], text: str, name: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError("config.bad_value", f"{name} names a section that is a value.", got=key)
    values[keys[-1]] = text


def _overlay(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, change in changes.items():
        if isinstance(change, Mapping) and isinstance(values.get(key, {}), dict):
            _overlay(values.setdefault(key, {}), change)
        else:
            values[key] = change


def _check_keys(values: Mapping[str, Any], kind: type, where: str) -> None:
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
            hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise ConfigError(
                "config.unknown_key", f"{where}{key} is no configuration key; {hint}", expected=sorted(fields), got=key
            )
        section = _struct_in(fields[key])
        if section is not None and isinstance(value, Mapping):
            _check_keys(value, section, f"{where}{key}.")


def _struct_in(kind: Any) -> type | None:
    """Returns the struct a field holds, also behind `| None`; None for plain values."""
    for candidate in (kind, *getattr(kind, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None
