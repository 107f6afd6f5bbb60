"""Commands that operate a running control plane through its API: data sets, models, agents, settings."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from control_plane.cli.output import Actor, AsJson, Config, Server, err, me, say, table_of
from control_plane.client import Client
from control_plane.config import load_control_plane_config
from models.errors import ConflictError, UnavailableError

datasets = typer.Typer(no_args_is_help=True, help="Folders of labelled photographs.")
models = typer.Typer(no_args_is_help=True, help="Models and their versions.")
agents = typer.Typer(no_args_is_help=True, help="The fleet.")
settings = typer.Typer(no_args_is_help=True, help="Configuration.")


@datasets.command("list")
def dataset_list(server: Server = "", as_json: AsJson = False) -> None:
    """All data sets."""
    found = Client(server).get("/api/v1/datasets")
    say(
        found,
        as_json=as_json,
        table=lambda rows: table_of(
            ["name", "folder", "versions"], [[r["name"], r["root"], len(r["versions"])] for r in rows]
        ),
    )


@datasets.command("add")
def dataset_add(name: str, root: Path, server: Server = "", as_json: AsJson = False) -> None:
    """Register a folder."""
    body = {"name": name, "root": str(root.resolve()), "actor": "cli"}
    say(Client(server).post("/api/v1/datasets", body), as_json=as_json)


@models.command("list")
def model_list(server: Server = "", as_json: AsJson = False) -> None:
    """All models and versions."""

    def table(found: list[dict[str, Any]]) -> Table:
        rows = [
            [f"{m['name']}:{v['number']}", v["stage"], v["bundle"][:12], v["size_bytes"] // 1024, v["created_at"][:16]]
            for m in found
            for v in m["versions"]
        ]
        return table_of(["version", "stage", "bundle", "KB", "made"], rows)

    say(Client(server).get("/api/v1/models"), as_json=as_json, table=table)


@models.command("show")
def model_show(reference: str, server: Server = "", as_json: AsJson = False) -> None:
    """One version: NAME, NAME:NUMBER or a bundle digest."""
    say(Client(server).get(f"/api/v1/versions/{reference}"), as_json=as_json)


@models.command("stage")
def model_stage(reference: str, stage: str, reason: Annotated[str, typer.Option()], server: Server = "") -> None:
    """Move a version to none, staging, production or archived."""
    body = {"stage": stage, "reason": reason, "actor": "cli"}
    say(Client(server).post(f"/api/v1/versions/{reference}/stage", body), as_json=False)


@models.command("push")
def model_push(directory: Path, server: Server = "", as_json: AsJson = False) -> None:
    """Register a bundle from disk."""
    from models.bundle import pack, read_bundle  # noqa: PLC0415

    read_bundle(directory)
    say(Client(server).post("/api/v1/versions?actor=cli", content=pack(directory)), as_json=as_json)


@agents.command("list")
def agent_list(server: Server = "", as_json: AsJson = False) -> None:
    """All agents, worst first."""

    def table(found: list[dict[str, Any]]) -> Table:
        rows = [
            [a["id"], a["state"], a["reason"], a["active"][:12], a["items_per_s"], a["p99_ms"], a["drift_value"]]
            for a in found
        ]
        return table_of(["agent", "state", "why", "bundle", "items/s", "p99 ms", "drift"], rows)

    say(Client(server).get("/api/v1/agents"), as_json=as_json, table=table)


@agents.command("show")
def agent_show(agent_id: str, server: Server = "", as_json: AsJson = False) -> None:
    """One agent."""
    say(Client(server).get(f"/api/v1/agents/{agent_id}"), as_json=as_json)


_TERMS = {
    "lot": "The recipe has terms for this lot.",
    "variety": "The recipe has terms for this variety.",
    "recipe": "The recipe has no terms for this lot or variety: its own hold.",
}


@agents.command("lot")
def agent_lot(
    agent_id: str,
    lot: Annotated[str, typer.Option(help="Name of the lot that runs from now on; '' = not known.")],
    variety: Annotated[str, typer.Option(help="What it is, as the recipe calls it; '' = not known.")],
    reason: Annotated[str, typer.Option(help="Kept in the audit trail.")] = "",
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Name the lot that runs on a line from now on, and wait for the agent's answer.

    An agent that is not connected gets nothing: name the lot at the line (`sortline-agent lot`).
    """
    client = Client(server)
    body = {"lot": lot, "variety": variety, "reason": reason, "actor": actor or me()}
    asked = client.post(f"/api/v1/agents/{agent_id}/lot", body)
    if asked["terms"]:
        err.print(_TERMS[asked["terms"]])
    found = client.follow_lot(agent_id, asked["request_id"])
    if found["state"] == "refused":
        raise ConflictError(found["fault"]["code"], found["fault"]["message"])
    if found["state"] != "accepted":
        raise UnavailableError(
            "command.unanswered",
            "The agent has not answered; look at what it reports.",
            expected="an answer",
            got="none",
        )
    say(found, as_json=as_json)


@settings.command("check")
def config_check(config: Config = None) -> None:
    """Say whether the configuration is good."""
    _ = load_control_plane_config(config).token
    err.print("the configuration is good")


@settings.command("show")
def config_show(config: Config = None) -> None:
    """Print the whole configuration, defaults included."""
    import msgspec  # noqa: PLC0415

    say(msgspec.to_builtins(load_control_plane_config(config)), as_json=False)
