"""Commands that run until they are stopped: control plane, worker, demo."""

from typing import Annotated, Any

import typer

from control_plane.cli.output import Config, with_options
from control_plane.config import load_control_plane_config
from control_plane.demo.options import DemoOptions


def serve(
    config: Config = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Without it, `server.host`, which is 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 chooses a free one. Without it, `server.port`: 8080.")
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="Folder of database, bundles and jobs. Without it, `data_dir`, which is sortline-data."),
    ] = None,
) -> None:
    """Run the control plane: API, pages, rollouts and worker processes, until it is stopped.

    It needs signing keys (`sortline keys init`) and a broker (`sortline broker run`, or mosquitto).
    """
    from control_plane.server import serve as run  # noqa: PLC0415

    server = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    overrides: dict[str, Any] = {"server": server} if server else {}
    if data_dir is not None:
        overrides["data_dir"] = data_dir
    raise typer.Exit(run(load_control_plane_config(config, overrides)))


def worker(config: Config = None) -> None:
    """Run one worker process for training jobs, on this or another machine with the same database and data folder."""
    from control_plane.server import work  # noqa: PLC0415

    work(load_control_plane_config(config))


@with_options
def demo(options: DemoOptions) -> None:
    """Run the whole loop on this machine: train, push, sort, watch. It takes about three minutes until lines sort."""
    from control_plane.demo.run import run_demo  # noqa: PLC0415

    raise typer.Exit(run_demo(options))
