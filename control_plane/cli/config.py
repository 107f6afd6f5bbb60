"""Commands on the settings of the control plane."""

from typing import Any
from urllib.parse import urlsplit

import typer

from control_plane.cli.output import AsJson, Config, note, say
from control_plane.config import load_control_plane_config
from models.text import MASK, mask

settings = typer.Typer(no_args_is_help=True, help="Settings of the control plane.")


@settings.command("check")
def config_check(config: Config = None) -> None:
    """Check the settings: names, types, bounds, and the files they name."""
    found = load_control_plane_config(config)
    _ = found.token, found.read_token
    found.alarms.check()
    note("the configuration is good")


@settings.command("show")
def config_show(config: Config = None, as_json: AsJson = False) -> None:
    """Print every setting, defaults included."""
    import msgspec  # noqa: PLC0415

    found = msgspec.to_builtins(load_control_plane_config(config))
    found["alarms"]["webhooks"] = [hook | {"url": _host_of(hook["url"])} for hook in found["alarms"]["webhooks"]]
    say(_masked(found), as_json=as_json)


def _host_of(url: str) -> str:
    """Returns an address without its path, which of many receivers is the secret."""
    parts = urlsplit(url)
    return url if parts.path in {"", "/"} and not parts.query else f"{parts.scheme}://{parts.netloc}/{MASK}"


def _masked(value: Any) -> Any:
    """Hides the secrets of every address, at any depth."""
    if isinstance(value, dict):
        return {name: _masked(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(entry) for entry in value]
    return mask(value) if isinstance(value, str) else value
