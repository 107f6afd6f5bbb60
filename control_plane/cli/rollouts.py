"""Commands of rollouts: look before you start, follow, stop, go back."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from control_plane.cli.output import Actor, AsJson, Server, err, me, say, table_of
from control_plane.client import Client
from models.errors import InputError
from models.messages import Mode

rollouts = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Bring a version to agents, wave by wave.

    **Look first:** `sortline rollouts preview --model apples:3 --selector 'site=wenatchee,line in (1,2)'` says how many
    lanes and items per hour each wave touches, and the worst case until it can stop itself. `create` shows the same
    and asks. Then `show ID`, and at any time `pause`, `abort` (recalls whoever is not done) or `rollback` (sends
    everybody back to what they ran before).""",
)


Model = Annotated[str, typer.Option(help="NAME, NAME:VERSION or a bundle digest.")]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--selector",
        rich_help_panel="Who, in which order",
        help="Labels: 'site=north', 'line in (1,2)', '!canary'; again = and. Empty = all.",
    ),
]
Agents = Annotated[
    list[str] | None,
    typer.Option("--agent", rich_help_panel="Who, in which order", help="Exactly these agents, instead of a selector."),
]
Waves = Annotated[
    list[str] | None,
    typer.Option(
        "--wave",
        rich_help_panel="Who, in which order",
        help="Cumulative size (3 or 50%) or names (line-1,line-2); again for the next wave.",
    ),
]
Parameters = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel="How fast, when to stop",
        help="JSON with AWS IoT Jobs' own parameters: jobExecutionsRolloutConfig, abortConfig, timeoutConfig, "
        "jobExecutionsRetryConfig, schedulingConfig; and waveConfig. The options below change single values.",
    ),
]
Rate = Annotated[
    int | None,
    typer.Option(rich_help_panel="How fast, when to stop", help="Most agents that are told in any minute, 1-1000."),
]
AbortAt = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="How fast, when to stop", help="Stop when this percentage of the executed agents failed."
    ),
]
AbortAfter = Annotated[
    int, typer.Option(rich_help_panel="How fast, when to stop", help="... once so many have executed.")
]
SuccessAt = Annotated[
    float | None,
    typer.Option(
        rich_help_panel="How fast, when to stop", help="A wave is good when this percentage of it has succeeded."
    ),
]
AskBetween = Annotated[
    bool,
    typer.Option(
        "--ask-between-waves",
        rich_help_panel="How fast, when to stop",
        help="Pause after every wave until somebody resumes.",
    ),
]
Timeout = Annotated[
    int | None,
    typer.Option(
        rich_help_panel="How fast, when to stop", help="An agent that works on it for longer has TIMED_OUT, minutes."
    ),
]
Start = Annotated[
    str, typer.Option(rich_help_panel="When", help="Not before, such as 2026-05-01T04:30 (UTC unless it names a zone).")
]
End = Annotated[str, typer.Option(rich_help_panel="When", help="Not after.")]
Window = Annotated[
    list[str] | None,
    typer.Option(
        "--window",
        rich_help_panel="When",
        help="Only in this recurring window: 'cron(30 22 ? * MON-FRI *)/120' lasts 120 minutes.",
    ),
]
TrialItems = Annotated[
    int,
    typer.Option(
        rich_help_panel="How fast, when to stop", help="Items the bundle must judge before an agent commits it."
    ),
]
MinItems = Annotated[
    int,
    typer.Option(
        rich_help_panel="How fast, when to stop", help="Items it must have judged before the agent counts as succeeded."
    ),
]
SwapAt = Annotated[
    Literal["belt-gap", "lot-change", "now"], typer.Option(rich_help_panel="When", help="When a line changes over.")
]
SwapWithin = Annotated[
    float | None, typer.Option(rich_help_panel="When", help="... at the latest after so many seconds.")
]
How = Annotated[Mode, typer.Option("--mode", help="What the bundle does on the line.")]
Dynamic = Annotated[
    bool,
    typer.Option(
        "--dynamic", rich_help_panel="Who, in which order", help="Agents that match later join the last wave."
    ),
]
Approval = Annotated[
    bool,
    typer.Option("--needs-approval", rich_help_panel="When", help="Nothing happens until a second person approves."),
]


@rollouts.command("create")
def create(
    model: Model,
    selector: Labels = None,
    agent: Agents = None,
    wave: Waves = None,
    parameters: Parameters = None,
    rate: Rate = None,
    abort_percent: AbortAt = None,
    abort_after: AbortAfter = 1,
    success_percent: SuccessAt = None,
    ask_between_waves: AskBetween = False,
    timeout_min: Timeout = None,
    start: Start = "",
    end: End = "",
    window: Window = None,
    trial_items: TrialItems = 50,
    min_items: MinItems = 1,
    swap: SwapAt = "belt-gap",
    swap_within_s: SwapWithin = None,
    mode: How = Mode.LIVE,
    dynamic: Dynamic = False,
    needs_approval: Approval = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Start a rollout, after showing what it touches.

    `sortline rollouts create --model apples:3 --selector site=north --wave 1 --wave 50% --wave 100%`

    On a terminal it asks before it starts; in a script it does not.
    """
    policy = _policy(
        parameters,
        rate=rate,
        abort_percent=abort_percent,
        abort_after=abort_after,
        success_percent=success_percent,
        ask_between_waves=ask_between_waves,
        timeout_min=timeout_min,
        start=start,
        end=end,
        windows=window or [],
    )
    body = _body(model, selector, agent, wave, actor) | policy
    body |= {"trial_items": trial_items, "min_items": min_items, "swap": swap, "swap_within_s": swap_within_s}
    body |= {"mode": str(mode), "dynamic": dynamic, "needs_approval": needs_approval}
    client = Client(server)
    err.print(_radius_table(client.post("/api/v1/rollouts/preview", body)))
    if sys.stdin.isatty() and sys.stderr.isatty() and not yes:
        typer.confirm("Start?", abort=True, err=True)
    say(client.post("/api/v1/rollouts", body), as_json=as_json, table=_rollout_table)


@rollouts.command("preview")
def preview(
    model: Model,
    selector: Labels = None,
    agent: Agents = None,
    wave: Waves = None,
    parameters: Parameters = None,
    abort_percent: AbortAt = None,
    abort_after: AbortAfter = 1,
    trial_items: TrialItems = 50,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """What a rollout would touch, in lanes and items per hour, and its worst case. Changes nothing."""
    policy = _policy(parameters, abort_percent=abort_percent, abort_after=abort_after)
    body = _body(model, selector, agent, wave, "") | policy | {"trial_items": trial_items}
    say(Client(server).post("/api/v1/rollouts/preview", body), as_json=as_json, table=_radius_table)


def _body(
    model: str, selector: list[str] | None, agents: list[str] | None, waves: list[str] | None, actor: str
) -> dict[str, Any]:
    def size(text: str) -> str | list[str]:
        return text if text.removesuffix("%").isdecimal() else [name.strip() for name in text.split(",")]

    return {
        "model": model,
        "selector": ",".join(selector or []),
        "agents": agents or [],
        "waves": [size(text) for text in waves or ["100%"]],
        "actor": actor or me(),
    }


def _policy(
    parameters: Path | None,
    *,
    rate: int | None = None,
    abort_percent: float | None = None,
    abort_after: int = 1,
    success_percent: float | None = None,
    ask_between_waves: bool = False,
    timeout_min: int | None = None,
    start: str = "",
    end: str = "",
    windows: list[str] | None = None,
) -> dict[str, Any]:
    policy = _read(parameters)

    def put(section: str, **values: Any) -> None:
        given = {name: value for name, value in values.items() if value not in {None, ""}}
        if given:
            policy[section] = policy.get(section, {}) | given

    put("jobExecutionsRolloutConfig", maximumPerMinute=rate)
    put("timeoutConfig", inProgressTimeoutInMinutes=timeout_min)
    put("schedulingConfig", startTime=start, endTime=end)
    put("waveConfig", successThresholdPercentage=success_percent)
    if ask_between_waves:
        put("waveConfig", successAction="PAUSE")
    if windows:
        policy["schedulingConfig"] = policy.get("schedulingConfig", {}) | {"maintenanceWindows": _windows(windows)}
    if abort_percent is not None:
        criteria = {"failureType": "ALL", "action": "CANCEL", "thresholdPercentage": abort_percent}
        policy["abortConfig"] = {"criteriaList": [criteria | {"minNumberOfExecutedThings": abort_after}]}
    return policy


def _windows(texts: list[str]) -> list[dict[str, Any]]:
    found = []
    for text in texts:
        cron, _, minutes = text.rpartition("/")
        if not cron or not minutes.isdecimal():
            raise InputError(
                "rollout.bad_cron", "A window needs its length.", expected="cron(30 22 ? * MON-FRI *)/120", got=text
            )
        found.append({"startTime": cron, "durationInMinutes": int(minutes)})
    return found


def _read(parameters: Path | None) -> dict[str, Any]:
    if parameters is None:
        return {}
    try:
        found = json.loads(parameters.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "rollout.bad_policy", f"{parameters} cannot be read.", expected="a JSON document", got=error
        ) from error
    if not isinstance(found, dict):
        raise InputError("rollout.bad_policy", f"{parameters} is no object.", expected="a JSON object", got=type(found))
    return found


def _radius_table(found: dict[str, Any]) -> Table:
    rows = [
        [
            number + 1,
            wave["agents"],
            wave["lanes"],
            f"{wave['items_per_h']:,}" + (f" + {wave['unknown']} agents unknown" if wave["unknown"] else ""),
            ", ".join(wave["names"][:4]) + (" ..." if len(wave["names"]) > 4 else ""),
        ]
        for number, wave in enumerate(found["waves"])
    ]
    table = table_of(["wave", "agents", "lanes", "items/h", "who"], rows)
    worst = found["worst_case"]
    table.caption = (
        f"{found['model']}:{found['version']} · worst case: {worst['items']:,} items judged on trial by "
        f"{worst['agents']} agents; {worst['reason']}"
    )
    table.caption_justify = "left"
    return table


def _rollout_table(found: dict[str, Any]) -> Table:
    rows = [
        [a["agent"], a["wave"] + 1, a["outcome"], a["phase"] or None, a["active"][:10] or None, a["reason"] or None]
        for a in found["agents"]
    ]
    table = table_of(["agent", "wave", "outcome", "phase", "runs", "why"], rows)
    aborts = ", ".join(
        f"{a['failure_type']} {a['percentage']:g}/{a['threshold_percentage']:g} % of {a['executed']}"
        f" (from {a['min_executed']})"
        for a in found["aborts"]
    )
    table.caption = (
        f"rollout {found['id']} {found['model']}:{found['version']} is {found['state']}"
        + (f" ({found['reason']})" if found["reason"] else "")
        + f"\n{found['rate']['last_minute']} of {found['rate']['per_minute']} agents told in the last minute"
        + f" · stops at {aborts}"
    )
    table.caption_justify = "left"
    return table


@rollouts.command("list")
def list_all(server: Server = "", as_json: AsJson = False) -> None:
    """All rollouts, newest first."""

    def table(found: list[dict[str, Any]]) -> Table:
        rows = [
            [
                r["id"],
                f"{r['model']}:{r['version']}",
                r["state"],
                f"{r['wave'] + 1}/{len(r['wave_progress'])}",
                ", ".join(f"{n} {name.lower().replace('_', ' ')}" for name, n in r["counts"].items()),
                r["reason"],
            ]
            for r in found
        ]
        return table_of(["id", "model", "state", "wave", "agents", "reason"], rows)

    say(Client(server).get("/api/v1/rollouts"), as_json=as_json, table=table)


@rollouts.command("show")
def show(rollout_id: int, server: Server = "", as_json: AsJson = False) -> None:
    """One rollout: every agent, the rate, and how near it is to stopping itself."""
    say(Client(server).get(f"/api/v1/rollouts/{rollout_id}"), as_json=as_json, table=_rollout_table)


Reason = Annotated[str, typer.Option("--reason", help="Why; kept with the rollout and in the audit trail.")]


def _add_action(name: str, text: str) -> None:
    def command(
        rollout_id: int, reason: Reason = "", actor: Actor = "", server: Server = "", as_json: AsJson = False
    ) -> None:
        body = {"reason": reason, "actor": actor or me()}
        found = Client(server).post(f"/api/v1/rollouts/{rollout_id}/{name}", body)
        say(found, as_json=as_json, table=_rollout_table)

    rollouts.command(name, help=text)(command)


for _name, _text in (
    ("approve", "Let a rollout begin that somebody else has made with --needs-approval."),
    ("pause", "Give the bundle to nobody further; who has it goes on."),
    ("resume", "Go on, also past the threshold at which it paused itself."),
    ("finish", "End it where it is: nobody further gets the bundle, who has begun may go on."),
    ("abort", "Stop it and recall every agent that is not done; who has committed keeps the bundle."),
    ("rollback", "Send everybody back to what they ran before; possible also after it has completed."),
):
    _add_action(_name, _text)
