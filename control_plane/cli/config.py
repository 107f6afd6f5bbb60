"""Commands on the settings of the control plane."""

import typer

from control_plane.cli.output import AsJson, Config, note, say
from control_plane.config import load_control_plane_config

settings = typer.Typer(no_args_is_help=True, help="Settings of the control plane.")


@settings.command("check")
def config_check(config: Config = None) -> None:
    """Check the settings: names, types, bounds, and the files they name."""
    found = load_control_plane_config(config)
    _ = found.token, found.read_token
    note("the configuration is good")


@settings.command("show")
def config_show(config: Config = None, as_json: AsJson = False) -> None:
    """Print every setting, defaults included."""
    import msgspec  # noqa: PLC0415

    say(msgspec.to_builtins(load_control_plane_config(config)), as_json=as_json)
