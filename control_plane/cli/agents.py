"""Commands on agents: enrol, approve, revoke, list, show, what they counted, name a lot, export for a stick."""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer
from rich.table import Table

from control_plane.cli.output import Actor, AsJson, Server, acting, note, say, show, table_of
from control_plane.client import Client
from models.errors import ConflictError, UnavailableError

agents = typer.Typer(no_args_is_help=True, help="The fleet: identities, states, lots.")
AgentId = Annotated[str, typer.Argument(help="Id of the agent.")]


def _path(agent_id: str, rest: str = "") -> str:
    return f"/api/v1/agents/{quote(agent_id, safe='')}{rest}"


@agents.command("enrol")
def agent_enrol(agent_id: AgentId, actor: Actor = "", server: Server = "", as_json: AsJson = False) -> None:
    """Make a one-time token for an agent, good for an hour; the box uses it in `sortline-agent enrol --token ...`."""
    client = Client(server)
    answer = client.post(_path(agent_id, "/enrolment"), {"actor": acting(actor)})
    if as_json:
        say(answer, as_json=True)
        return
    show(answer["token"])
    note(f"on {agent_id}, within the hour: sortline-agent enrol --control-plane {answer['url']} --token ...")


@agents.command("revoke")
def agent_revoke(
    agent_id: AgentId,
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")],
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """End an agent's identity: no data from now on, no new connection, no renewal. Its line goes on sorting."""
    found = Client(server).post(_path(agent_id, "/revoke"), {"reason": reason, "actor": acting(actor)})
    if as_json:
        say(found, as_json=True)
    else:
        note(f"{agent_id} is revoked")


@agents.command("forget")
def agent_forget(
    agent_id: AgentId,
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")],
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Forget an agent that is gone for good: no selector, wave or page waits for it any more.

    The audit trail keeps what was last known of it, rollouts keep its part in their history. Its identity stays: end
    that with `sortline agents revoke`.
    """
    found = Client(server).post(_path(agent_id, "/forget"), {"reason": reason, "actor": acting(actor)})
    if as_json:
        say(found, as_json=True)
    else:
        note(f"{agent_id} is forgotten; the audit trail keeps what was known of it")


@agents.command("safe-state")
def agent_safe_state(
    agent_id: AgentId,
    safe_state: Annotated[str, typer.Argument(help="State to go into: eject-all, pass-all or stop; judge leaves it.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")] = "",
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Put one line into a safe state instead of judging, or back to judging with the bundle it has committed."""
    wanted = "" if safe_state == "judge" else safe_state
    body = {"safe_state": wanted, "reason": reason, "actor": acting(actor)}
    found = Client(server).post(_path(agent_id, "/safe-state"), body)
    if as_json:
        say(found, as_json=True)
    else:
        note(f"{agent_id} is asked to {safe_state.replace('-', ' ')}")


@agents.command("approve")
def agent_approve(agent_id: AgentId, actor: Actor = "", server: Server = "", as_json: AsJson = False) -> None:
    """Let an agent whose certificate is past its time renew it once, within a day."""
    found = Client(server).post(_path(agent_id, "/approve-renewal"), {"actor": acting(actor)})
    if as_json:
        say(found, as_json=True)
    else:
        note(f"{agent_id} may renew its certificate once, within a day")


@agents.command("list")
def agent_list(server: Server = "", as_json: AsJson = False) -> None:
    """List all agents, worst first, with their identities."""
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
    """Returns until when the certificate is good, or what its state is."""
    if identity is None:
        return None
    if identity["approval_asked_at"] and not identity["approved_until"]:
        return "asks to renew"
    return str(identity["certificate_until"])[:10] if identity["state"] == "enrolled" else str(identity["state"])


@agents.command("show")
def agent_show(agent_id: AgentId, server: Server = "", as_json: AsJson = False) -> None:
    """Print everything that is known of one agent."""
    say(Client(server).get(_path(agent_id)), as_json=as_json)


_TERMS = {
    "lot": "The recipe has terms for this lot.",
    "variety": "The recipe has terms for this variety.",
    "recipe": "The recipe has no terms for this lot or variety: its own hold.",
}


@agents.command("lot")
def agent_lot(
    agent_id: AgentId,
    lot: Annotated[str, typer.Option(help="Name of the lot that runs from now on; '' = not known.")],
    variety: Annotated[str, typer.Option(help="Variety of the lot, as the recipe calls it; '' = not known.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")] = "",
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Name the lot that runs on a line from now on, and wait up to 20 seconds for the agent's answer.

    For an agent that is not connected the command is refused: name the lot at the line (`sortline-agent lot`).
    """
    client = Client(server)
    body = {"lot": lot, "variety": variety, "reason": reason, "actor": acting(actor)}
    asked = client.post(_path(agent_id, "/lot"), body)
    if asked["terms"]:
        note(_TERMS[asked["terms"]])
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
    if as_json:
        say(found, as_json=True)
    else:
        note(f"{agent_id} runs lot {lot or 'not known'} of variety {variety or 'not known'}")


Since = Annotated[str, typer.Option("--from", help="Begin, such as 2026-03-14T10:00; without a zone it is UTC.")]
Until = Annotated[str, typer.Option(help="End; empty = now.")]


@agents.command("statistics")
def agent_statistics(
    agent_id: AgentId,
    span: Annotated[str, typer.Option(help="Span that each row adds up: minute, hour, day or lot.")] = "hour",
    since: Since = "",
    until: Until = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Rows of a page.")] = 200,
    after: Annotated[str, typer.Option(help="Begin of the next page, as the page before printed it.")] = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """List what a line counted over time: by minute, hour, day, or by lot."""
    options = {"span": span, "from": since, "until": until, "limit": str(limit), "after": after}
    found = Client(server).get(_path(agent_id, "/statistics") + _query(options))

    def table(page: dict[str, Any]) -> Table:
        columns = ["from", "to", "lot", "variety", "bundle", "items", "rejected", "unsure", "p99 ms", "windows"]
        return table_of(columns, [_statistics_row(row) for row in page["rows"]])

    say(found, as_json=as_json, table=table)
    if found["next"] and not as_json:
        note(f"more: --after {found['next']}")


def _query(options: dict[str, str]) -> str:
    return "?" + urlencode({name: value for name, value in options.items() if value})


def _statistics_row(row: dict[str, Any]) -> list[Any]:
    left_out = f", {row['left_out']} left out" if row["left_out"] else ""
    return [
        *(row[name][:19].replace("T", " ") for name in ("first_at", "last_at")),
        row["lot"] or None,
        row["variety"] or None,
        row["bundle"][:8] or None,
        row["items"],
        _percent(row["reject_share"]),
        _percent(row["unsure_share"]),
        row["p99_ms"],
        f"{row['windows']}{left_out}",
    ]


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


@agents.command("fidelity")
def agent_fidelity(
    agent_id: AgentId,
    span: Annotated[str, typer.Option(help="Span that each row covers: hour or day.")] = "hour",
    since: Since = "",
    until: Until = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Show how far a line's data can be trusted: missing records and items, late and impossible windows, its clock."""
    found = Client(server).get(_path(agent_id, "/fidelity") + _query({"span": span, "from": since, "until": until}))

    def table(rows: list[dict[str, Any]]) -> Table:
        columns = ["from", "state", "items accounted", "complete", "timely", "consistent", "accurate", "missing"]
        columns += ["late", "back-filled", "repeated", "clock ms"]
        return table_of(columns, [_fidelity_row(row) for row in rows])

    say(found, as_json=as_json, table=table)


def _fidelity_row(row: dict[str, Any]) -> list[Any]:
    return [
        row["start"][:16].replace("T", " "),
        row["state"],
        *(_percent(row[name]) for name in ("items_accounted", "complete", "timely", "consistent", "accurate")),
        row["missing_records"],
        *(row[name] for name in ("late", "backfilled", "duplicates", "clock_offset_ms")),
    ]


@agents.command("as-of")
def agent_as_of(
    agent_id: AgentId,
    at: Annotated[str, typer.Option(help="Moment, such as 2026-03-14T10:32; without a zone it is UTC.")],
    lane: Annotated[int | None, typer.Option(min=0, max=63, help="Also the counts of this lane, from 0.")] = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Show what held on a line at a moment: bundle, recipe, terms, camera, lot, who approved it, what the line saw."""
    options = {"at": at, "lane": "" if lane is None else str(lane)}
    say(Client(server).get(_path(agent_id, "/as-of") + _query(options)), as_json=as_json)


def export(
    agent: Annotated[str, typer.Option(help="Id of the agent.")],
    to: Annotated[Path, typer.Option(help="A stick or any folder, which may hold other files.")],
    server: Server = "",
) -> None:
    """Write what an agent without network needs: signed metadata, its assignment, its bundle.

    It goes to `sortline/AGENT` on the stick; repeated, it is brought up to date. On the box: `sortline-agent import
    FOLDER`. The agent verifies it as if it had come over the network.
    """
    from control_plane.trust.export import export_agent  # noqa: PLC0415

    facts = export_agent(Client(server), agent, to)
    size = f"{facts['files']} files, {facts['bytes'] / 1e6:.1f} MB"
    note(f"{size} for {agent} in {facts['folder']}, {facts['written']} of them new: bundle {facts['bundle'][:12]}")
