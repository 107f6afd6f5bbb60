"""Commands of identity: `sortline ca ...`, `sortline agents enrol | revoke | approve | list`, the mosquitto profile."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from control_plane.cli.operating import agents
from control_plane.cli.output import AsJson, Config, Server, err, say, table_of
from control_plane.cli.serving import broker
from control_plane.client import Client
from control_plane.config import ControlPlaneConfig, load_control_plane_config
from models.errors import ConflictError

DataDir = Annotated[str | None, typer.Option("--data-dir", help="Of the control plane, as for `sortline serve`.")]
RootKey = Annotated[Path | None, typer.Option("--root-key", help="Where the root's key is; keep it off this machine.")]
authority = typer.Typer(no_args_is_help=True, help="The site's certificate authority.")


def _config(config: Path | None, data_dir: str | None) -> ControlPlaneConfig:
    return load_control_plane_config(config, {"data_dir": data_dir} if data_dir else {})


@authority.command("init")
def ca_init(
    name: Annotated[
        list[str] | None, typer.Option("--name", help="DNS name or address of broker and control plane; repeatable.")
    ] = None,
    site: Annotated[str, typer.Option(help="Stands in the certificates.")] = "Sortline",
    root_key: RootKey = None,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make the authority: a root for ten years, an issuing authority for two, certificates of the site's servers.

    Example: `sortline ca init --name broker.plant.example --name 10.0.0.5 --root-key /media/safe/root.key`
    """
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.publication import refresh_site  # noqa: PLC0415

    now = datetime.now(UTC)
    names = ["localhost", "127.0.0.1", *(name or [])]
    folder = _config(config, data_dir).identity_folder
    made = Authority.create(folder, site=site, names=names, now=now, root_key=root_key)
    refresh_site(made, now)
    _show(made.status(now), as_json=as_json)


@authority.command("rotate")
def ca_rotate(
    issuing_only: Annotated[bool, typer.Option(help="Keep the root: agents notice nothing.")] = False,
    root_key: RootKey = None,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Replace the root and the issuing authority. Both roots are trusted until `sortline ca retire`.

    A running server follows within a minute; agents renew at their next look. mosquitto must be restarted once, because
    it reads its trust only when it starts.
    """
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.publication import refresh_site  # noqa: PLC0415

    now = datetime.now(UTC)
    held = Authority(_config(config, data_dir).identity_folder)
    new = held.rotate(now, root_key=root_key, keep_root=issuing_only)
    refresh_site(new, now)
    _show(new.status(now), as_json=as_json)


@authority.command("replica")
def ca_replica(name: str, config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Make certificates for another replica of the control plane; it runs with `broker.replica = "NAME"`."""
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.publication import refresh_site  # noqa: PLC0415

    now = datetime.now(UTC)
    new = Authority(_config(config, data_dir).identity_folder).add_replica(name)
    refresh_site(new, now)
    _show(new.status(now), as_json=as_json)


@authority.command("retire")
def ca_retire(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """End the trust in replaced authorities: an agent that has not renewed since must be enrolled again."""
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.publication import refresh_site  # noqa: PLC0415

    now = datetime.now(UTC)
    new = Authority(_config(config, data_dir).identity_folder).retire()
    refresh_site(new, now)
    _show(new.status(now), as_json=as_json)


@authority.command("status")
def ca_status(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Ages of the authorities, where their keys lie, what to do next."""
    from control_plane.identity.authority import Authority  # noqa: PLC0415

    found = Authority(_config(config, data_dir).identity_folder)
    _show(found.status(datetime.now(UTC)), as_json=as_json)


def _show(status: dict[str, Any], *, as_json: bool) -> None:
    def table(found: dict[str, Any]) -> Table:
        rows = [
            [g["number"], g["state"], g["root_until"][:10], g["issuing_until"][:10], g["root_sha256"][:16]]
            for g in found["generations"]
        ]
        return table_of(["generation", "state", "root until", "issuing until", "root sha256"], rows)

    say(status, as_json=as_json, table=table)
    if as_json:
        return
    err.print(f"servers: {', '.join(status['names'])}; folder {status['folder']}", highlight=False, soft_wrap=True)
    if any(g["root_key_here"] for g in status["generations"] if g["state"] != "retired"):
        err.print(
            "[bold red]the root's key lies on this machine[/]: move root-*.key to a safe, bring it to rotate",
            soft_wrap=True,
        )
    if status["rotate_due"]:
        err.print("[bold red]rotate now[/]: the issuing authority ends within three months")


@agents.command("enrol")
def agent_enrol(agent_id: str, server: Server = "", as_json: AsJson = False) -> None:
    """Make a one-time token for an agent, good for an hour; on the box: `sortline-agent enrol --token ...`."""
    answer = Client(server).post(f"/api/v1/agents/{agent_id}/enrolment", {"actor": "cli"})
    if as_json:
        say(answer, as_json=True)
        return
    typer.echo(answer["token"])
    how = "sortline-agent enrol --control-plane https://HOST:8443 --token ..."
    err.print(f"on {agent_id}, within the hour: {how}", soft_wrap=True)


@agents.command("revoke")
def agent_revoke(
    agent_id: str, reason: Annotated[str, typer.Option(help="Kept in the audit trail.")], server: Server = ""
) -> None:
    """End an agent's identity: no data from now on, no new connection, no renewal. Its line sorts on."""
    say(Client(server).post(f"/api/v1/agents/{agent_id}/revoke", {"reason": reason, "actor": "cli"}), as_json=False)


@agents.command("approve")
def agent_approve(agent_id: str, server: Server = "") -> None:
    """Let an agent whose certificate is past its time renew it once, within a day."""
    say(Client(server).post(f"/api/v1/agents/{agent_id}/approve-renewal", {"actor": "cli"}), as_json=False)


@agents.command("list")
def agent_list(server: Server = "", as_json: AsJson = False) -> None:
    """All agents, worst first, with their identities."""
    client = Client(server)
    found = client.get("/api/v1/agents")
    try:
        identities = {one["agent"]: one for one in client.get("/api/v1/identities")}
    except ConflictError:  # no certificate authority at this site
        identities = {}
    for agent in found:
        agent["identity"] = identities.pop(agent["id"], None)
    found += [{"id": name, "identity": one} for name, one in identities.items()]

    def table(rows: list[dict[str, Any]]) -> Table:
        columns = ["agent", "state", "why", "bundle", "items/s", "p99 ms", "drift", "seen", "identity"]
        return table_of(columns, [_row(agent) for agent in rows])

    say(found, as_json=as_json, table=table)


def _row(agent: dict[str, Any]) -> list[Any]:
    age_s = agent.get("seen_age_s")
    return [
        agent["id"],
        agent.get("state", "never seen"),
        agent.get("reason"),
        (agent.get("active") or "")[:8] or None,
        agent.get("items_per_s"),
        agent.get("p99_ms"),
        agent.get("drift_value"),
        None if age_s is None else f"{age_s:.0f} s",
        _certificate(agent["identity"]),
    ]


def _certificate(identity: dict[str, Any] | None) -> str | None:
    """Until when it is good, or what is the matter with it."""
    if identity is None:
        return None
    if identity["approval_asked_at"] and not identity["approved_until"]:
        return "asks to renew"
    return str(identity["certificate_until"])[:10] if identity["state"] == "enrolled" else str(identity["state"])


@broker.command("mosquitto-profile")
def mosquitto_profile(
    to: Annotated[Path, typer.Option("--to", help="Folder for mosquitto.conf, acl and certificates.")],
    port: Annotated[int, typer.Option(help="mutual TLS")] = 8883,
    host: Annotated[str, typer.Option(help="Address to listen on; empty = all.")] = "",
    config: Config = None,
    data_dir: DataDir = None,
) -> None:
    """Write configuration, access list and certificates for mosquitto; run again, or let `sortline serve` follow.

    Start it with `mosquitto -c DIR/mosquitto.conf`. With `identity.mosquitto_profile = "DIR"` the server rewrites
    access list and revocations after every change and tells mosquitto.
    """
    from control_plane.identity.authority import Authority  # noqa: PLC0415
    from control_plane.identity.mosquitto import write_profile  # noqa: PLC0415

    folder = _config(config, data_dir).identity_folder
    write_profile(Authority(folder), to, host=host, port=port)
    err.print(f"mosquitto -c {to / 'mosquitto.conf'}", highlight=False, soft_wrap=True)
