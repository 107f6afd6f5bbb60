"""Commands on data sets: folders of labelled photographs that are registered under a name."""

from pathlib import Path
from typing import Annotated

import typer

from control_plane.cli.output import Actor, AsJson, Server, acting, say, table_of
from control_plane.client import Client

datasets = typer.Typer(no_args_is_help=True, help="Folders of labelled photographs.")


@datasets.command("list")
def dataset_list(server: Server = "", as_json: AsJson = False) -> None:
    """List all data sets."""
    say(
        Client(server).get("/api/v1/datasets"),
        as_json=as_json,
        table=lambda rows: table_of(
            ["name", "folder", "versions"], [[r["name"], r["root"], len(r["versions"])] for r in rows]
        ),
    )


@datasets.command("add")
def dataset_add(
    name: Annotated[str, typer.Argument(help="Name of the data set: letters, digits, `.`, `_`, `-`.")],
    root: Annotated[Path, typer.Argument(help="Folder on the control plane's machine.")],
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Register a folder under a name."""
    body = {"name": name, "root": str(root.resolve()), "actor": acting(actor)}
    say(Client(server).post("/api/v1/datasets", body), as_json=as_json)
