"""Commands on alarms: list, show, answer, comment, confirm what they ask for."""

import secrets
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.table import Table

from control_plane.cli.output import Actor, AsJson, Server, acting, alarming, facts_of, note, say, table_of
from control_plane.client import Client

alarms = typer.Typer(no_args_is_help=True, help="Alarms: what is wrong where, and who looks after it.")
AlarmId = Annotated[int, typer.Argument(help="Number of the alarm.", min=1)]
Reason = Annotated[str, typer.Option(help="Why; kept with the alarm and in the audit trail.")]


@alarms.command("list")
def alarm_list(
    state: Annotated[
        str, typer.Option(help="State: open, acknowledged, silenced, resolved, active (all but resolved) or all.")
    ] = "active",
    severity: Annotated[str, typer.Option(help="Severity: info, warning or critical. Without it, any.")] = "",
    cause: Annotated[str, typer.Option(help="Cause, such as camera-dirty. Without it, any.")] = "",
    site: Annotated[str, typer.Option(help="Name of the site. Without it, all sites.")] = "",
    line: Annotated[str, typer.Option(help="Id of the line's agent. Without it, all lines.")] = "",
    limit: Annotated[int, typer.Option(help="Largest number of alarms.", min=1, max=1000)] = 50,
    before: Annotated[int, typer.Option(help="Number below which the list begins; 0 begins at the newest.", min=0)] = 0,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """List alarms, newest first."""
    query: dict[str, Any] = {"state": state, "severity": severity, "cause": cause, "site": site, "line": line}
    query |= {"limit": limit} | ({"before": before} if before else {})
    found = Client(server).get(f"/api/v1/alarms?{urlencode(query)}")
    say(found, as_json=as_json, table=_table)
    if found["next"] and not as_json:
        note(f"older ones: --before {found['next']}")


def _table(found: dict[str, Any]) -> Table:
    columns = ["alarm", "severity", "state", "where", "cause", "effect", "cost/h", "since", "owner", "what to do"]
    return table_of(columns, [_row(alarm) for alarm in found["alarms"]])


def _row(alarm: dict[str, Any]) -> list[Any]:
    where = alarm["line"] or alarm["site"] or "fleet"
    severity = alarm["severity"]
    return [
        alarm["id"],
        alarming(severity) if severity == "critical" and alarm["state"] == "open" else severity,
        alarm["state"],
        where if alarm["lane"] is None else f"{where} lane {alarm['lane']}",
        alarm["cause"],
        f"{alarm['effect']:.3g} {alarm['effect_unit']}",
        alarm["cost"].get("per_h"),
        alarm["raised_at"][:16].replace("T", " "),
        alarm["owner"] or None,
        alarm["action"],
    ]


@alarms.command("show")
def alarm_show(alarm_id: AlarmId, server: Server = "", as_json: AsJson = False) -> None:
    """Show one alarm with evidence, comments, messages and requests."""
    say(Client(server).get(f"/api/v1/alarms/{alarm_id}"), as_json=as_json, table=_shown)


def _shown(alarm: dict[str, Any]) -> list[Table | str]:
    lists = ("comments", "deliveries", "decisions", "group")
    found: list[Table | str] = [alarm["action"], facts_of({k: v for k, v in alarm.items() if k not in lists})]
    found += [f"{one['at'][:16]} {one['actor']}: {one['text']}" for one in alarm["comments"]]
    found += [f"request {one['id']}: {one['request']} is {one['state']}: {one['reason']}" for one in alarm["decisions"]]
    found += [
        f"{one['event']} to {one['receiver']}: {one['state']} after {one['attempts']} attempts"
        + (f": {one['error']}" if one["error"] else "")
        for one in alarm["deliveries"]
    ]
    found += [
        f"same cause: alarm {one['id']}, {one['line'] or one['site']}, {one['severity']}, {one['state']}"
        for one in alarm["group"]
    ]
    return found


def _post(server: str, path: str, body: dict[str, Any], actor: str, done: str, *, as_json: bool) -> None:
    body = body | {"actor": acting(actor)}
    found = Client(server).post(f"/api/v1/alarms/{path}", body, key=secrets.token_hex(16))
    if as_json:
        say(found, as_json=True)
    else:
        note(done)


@alarms.command("ack")
def alarm_ack(
    alarm_id: AlarmId, reason: Reason = "", actor: Actor = "", server: Server = "", as_json: AsJson = False
) -> None:
    """Answer for an alarm: it is escalated no further, and yours where nobody owns it."""
    done = f"alarm {alarm_id} is acknowledged"
    _post(server, f"{alarm_id}/acknowledge", {"reason": reason}, actor, done, as_json=as_json)


@alarms.command("silence")
def alarm_silence(
    alarm_id: AlarmId,
    minutes: Annotated[float, typer.Option(help="Minutes of quiet, at most seven days.", min=0.1, max=10_080)] = 60.0,
    reason: Reason = "",
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Keep an alarm quiet for a while, unless it becomes worse."""
    done = f"alarm {alarm_id} is silenced for {minutes:g} minutes"
    _post(server, f"{alarm_id}/silence", {"reason": reason, "minutes": minutes}, actor, done, as_json=as_json)


@alarms.command("resolve")
def alarm_resolve(
    alarm_id: AlarmId, reason: Reason = "", actor: Actor = "", server: Server = "", as_json: AsJson = False
) -> None:
    """End an alarm. Where its cause is still there, a new one is raised."""
    done = f"alarm {alarm_id} is resolved"
    _post(server, f"{alarm_id}/resolve", {"reason": reason}, actor, done, as_json=as_json)


@alarms.command("comment")
def alarm_comment(
    alarm_id: AlarmId,
    text: Annotated[str, typer.Argument(help="What you found or did.")],
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Add a comment to an alarm, also to one that is over."""
    _post(server, f"{alarm_id}/comments", {"text": text}, actor, f"alarm {alarm_id} has a comment", as_json=as_json)


@alarms.command("own")
def alarm_own(
    alarm_id: AlarmId,
    owner: Annotated[str, typer.Argument(help="Name of who looks after it; '' for nobody.")],
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Name who looks after an alarm."""
    done = f"alarm {alarm_id} belongs to {owner or 'nobody'}"
    _post(server, f"{alarm_id}/owner", {"owner": owner}, actor, done, as_json=as_json)


RequestId = Annotated[int, typer.Argument(help="Number of the request, as `show` prints it.", min=1)]


@alarms.command("confirm")
def alarm_confirm(
    alarm_id: AlarmId,
    request_id: RequestId,
    reason: Reason = "",
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Let a request of an alarm stand."""
    path = f"{alarm_id}/requests/{request_id}/confirm"
    _post(server, path, {"reason": reason}, actor, f"request {request_id} stands", as_json=as_json)


@alarms.command("decline")
def alarm_decline(
    alarm_id: AlarmId,
    request_id: RequestId,
    reason: Reason = "",
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Decline a request of an alarm."""
    path = f"{alarm_id}/requests/{request_id}/decline"
    _post(server, path, {"reason": reason}, actor, f"request {request_id} is declined", as_json=as_json)
