"""Commands of rollouts: look before you start, follow, stop, go back."""

import json
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.table import Table

from control_plane.cli.output import Actor, AsJson, Server, acting, say, show, table_of, with_options
from control_plane.client import Client
from models.errors import InputError
from models.messages import Mode, SafeState
from models.text import counted

rollouts = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Bring a version to agents, wave by wave.

    **Look first:** `sortline rollouts preview --model apples:3 --selector 'site=wenatchee,line in (1,2)'` prints how
    many lanes and items per hour each wave touches, and the worst case until the rollout can stop itself. `create`
    prints the same and asks. Then `show ID`, and at any time `pause`, `abort` (recalls every agent that is not done) or
    `rollback` (sends every agent back to what it ran before).""",
)
_WHO: Final = "Who, in which order"
_PACE: Final = "How fast, when to stop"
_WHEN: Final = "When"


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """What goes to whom, in which order, and when the rollout stops itself."""

    model: Annotated[str, typer.Option(help="NAME (its newest version), NAME:NUMBER, or a bundle digest.")]
    selector: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_WHO,
            help="Labels: 'site=north', 'line in (1,2)', '!canary'; several must all hold. Without it, all agents.",
        ),
    ] = None
    agent: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=_WHO, help="Id of an agent; together they replace the selector."),
    ] = None
    wave: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_WHO,
            help="Cumulative size of a wave (3 or 50%) or names (line-1,line-2); once per wave. Without it, one wave.",
        ),
    ] = None
    parameters: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_PACE,
            help="JSON file with AWS IoT Jobs' own parameters: jobExecutionsRolloutConfig, abortConfig, timeoutConfig, "
            "jobExecutionsRetryConfig, schedulingConfig; and waveConfig. Options here change single values of it.",
        ),
    ] = None
    abort_percent: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_PACE, help="Percentage of failed agents, of those that have executed, that stops it."
        ),
    ] = None
    abort_after: Annotated[
        int, typer.Option(rich_help_panel=_PACE, help="Number of agents that must have executed before that counts.")
    ] = 1
    trial_items: Annotated[
        int,
        typer.Option(rich_help_panel=_PACE, help="Items the bundle must judge on trial before an agent commits it."),
    ] = 50

    def body(self) -> dict[str, Any]:
        """Returns the request without policy."""
        return {
            "model": self.model,
            "selector": ",".join(self.selector or []),
            "agents": self.agent or [],
            "waves": [_size(text) for text in self.wave or ["100%"]],
            "trial_items": self.trial_items,
        }

    def policy(self) -> dict[str, Any]:
        """Returns the parameters of the file, with the abort criterion of the options.

        Raises:
            InputError: `rollout.bad_policy`.
        """
        policy = _read(self.parameters)
        if self.abort_percent is not None:
            criteria = {"failureType": "ALL", "action": "CANCEL", "thresholdPercentage": self.abort_percent}
            policy["abortConfig"] = {"criteriaList": [criteria | {"minNumberOfExecutedThings": self.abort_after}]}
        return policy


@dataclass(frozen=True, slots=True)
class PaceOptions:
    """How fast a rollout goes, when it may act, and what an agent must show."""

    rate: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_PACE, help="Largest number of agents that get the bundle in any minute, 1 to 1000."
        ),
    ] = None
    success_percent: Annotated[
        float | None,
        typer.Option(rich_help_panel=_PACE, help="Percentage of a wave that must have succeeded for it to be good."),
    ] = None
    ask_between_waves: Annotated[
        bool,
        typer.Option("--ask-between-waves", rich_help_panel=_PACE, help="Pause after every wave until it is resumed."),
    ] = False
    timeout_min: Annotated[
        int | None,
        typer.Option(rich_help_panel=_PACE, help="Minutes after which an agent that is not done has TIMED_OUT."),
    ] = None
    min_items: Annotated[
        int,
        typer.Option(rich_help_panel=_PACE, help="Items the bundle must have judged before the agent has SUCCEEDED."),
    ] = 1
    start: Annotated[
        str,
        typer.Option(
            rich_help_panel=_WHEN,
            help="Earliest time, such as 2026-05-01T04:30 (UTC unless it names a zone). Without it, at once.",
        ),
    ] = ""
    end: Annotated[
        str, typer.Option(rich_help_panel=_WHEN, help="Latest time, written like the earliest. Without it, no end.")
    ] = ""
    window: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_WHEN,
            help="Recurring window outside of which it waits: 'cron(30 22 ? * MON-FRI *)/120' lasts 120 minutes.",
        ),
    ] = None
    swap: Annotated[
        Literal["belt-gap", "lot-change", "now"],
        typer.Option(rich_help_panel=_WHEN, help="Moment at which a line changes over to the bundle."),
    ] = "belt-gap"
    swap_within_s: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_WHEN,
            help="Seconds after which a line changes over in any case. Without it, the line's own setting.",
        ),
    ] = None
    mode: Annotated[
        Mode,
        typer.Option("--mode", help="What the bundle does on the line; in `shadow` its verdicts move no ejector."),
    ] = Mode.LIVE
    dynamic: Annotated[
        bool,
        typer.Option("--dynamic", rich_help_panel=_WHO, help="Let agents that match later join the last wave."),
    ] = False
    needs_approval: Annotated[
        bool,
        typer.Option("--needs-approval", rich_help_panel=_WHEN, help="Wait until a second person approves."),
    ] = False

    def body(self) -> dict[str, Any]:
        """Returns these options as the API takes them, without policy."""
        return {
            "min_items": self.min_items,
            "swap": self.swap,
            "swap_within_s": self.swap_within_s,
            "mode": str(self.mode),
            "dynamic": self.dynamic,
            "needs_approval": self.needs_approval,
        }

    def change(self, policy: dict[str, Any]) -> dict[str, Any]:
        """Returns the policy with what these options say.

        Raises:
            InputError: `rollout.bad_cron`.
        """
        waves = {"successThresholdPercentage": self.success_percent}
        schedule: dict[str, Any] = {"startTime": self.start, "endTime": self.end}
        given = {
            "jobExecutionsRolloutConfig": {"maximumPerMinute": self.rate},
            "timeoutConfig": {"inProgressTimeoutInMinutes": self.timeout_min},
            "schedulingConfig": schedule | {"maintenanceWindows": _windows(self.window or []) or None},
            "waveConfig": waves | {"successAction": "PAUSE" if self.ask_between_waves else None},
        }
        found = dict(policy)
        for section, values in given.items():
            said = {name: value for name, value in values.items() if value is not None and value != ""}
            if said:
                found[section] = found.get(section, {}) | said
        return found


@rollouts.command("create")
@with_options
def create(
    target: TargetOptions,
    pace: PaceOptions,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without a question.")] = False,
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Start a rollout, after printing what it touches.

    `sortline rollouts create --model apples:3 --selector site=north --wave 1 --wave 50% --wave 100%`

    On a terminal it asks before it starts; in a script it does not.
    """
    body = target.body() | pace.body() | pace.change(target.policy()) | {"actor": acting(actor)}
    client = Client(server)
    show(*_radius(client.post("/api/v1/rollouts/preview", body)), stderr=True)
    if sys.stdin.isatty() and sys.stderr.isatty() and not yes:
        typer.confirm("Start?", abort=True, err=True)
    made = client.post("/api/v1/rollouts", body, key=secrets.token_hex(16))
    say(made, as_json=as_json, table=_progress)


@rollouts.command("preview")
@with_options
def preview(target: TargetOptions, server: Server = "", as_json: AsJson = False) -> None:
    """Print what a rollout would touch, in lanes and items per hour, and its worst case. Changes nothing."""
    body = target.body() | target.policy()
    say(Client(server).post("/api/v1/rollouts/preview", body), as_json=as_json, table=_radius)


def _size(text: str) -> str | list[str]:
    return text if text.removesuffix("%").isdecimal() else [name.strip() for name in text.split(",")]


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
        raise InputError(
            "rollout.bad_policy", f"{parameters} is no object.", expected="a JSON object", got=type(found).__name__
        )
    return found


def _radius(found: dict[str, Any]) -> list[Table | str]:
    rows = [
        [
            number + 1,
            wave["agents"],
            wave["lanes"],
            f"{wave['items_per_h']:,}"
            + (f", and {counted(wave['unknown'], 'agent')} without figures" if wave["unknown"] else ""),
            ", ".join(wave["names"][:4]) + (" ..." if len(wave["names"]) > 4 else ""),
        ]
        for number, wave in enumerate(found["waves"])
    ]
    worst = found["worst_case"]
    case = f"worst case: {counted(worst['items'], 'item')} judged on trial by {counted(worst['agents'], 'agent')}"
    return [
        table_of(["wave", "agents", "lanes", "items/h", "who"], rows),
        f"{found['model']}:{found['version']} · {case}; {worst['reason']}",
        *_stuck(found),
    ]


def _stuck(found: dict[str, Any]) -> list[str]:
    """Returns a line about the agents without a way back; none where all have one."""
    stuck = found["without_way_back"]
    named = "; ".join(f"{a['agent']} ({a['reason']})" for a in stuck[:4]) + ("; ..." if len(stuck) > 4 else "")
    return [f"{counted(len(stuck), 'agent')} without a way back: {named}"] if stuck else []


def _progress(found: dict[str, Any]) -> list[Table | str]:
    rows = [
        [
            a["agent"],
            a["wave"] + 1,
            a["returned_outcome"] or a["outcome"],
            a["phase"] or None,
            a["active"][:10] or None,
            a["return_reason"] or a["reason"] or None,
        ]
        for a in found["agents"]
    ]
    reason = f" ({found['reason']})" if found["reason"] else ""
    rate = found["rate"]
    return [
        table_of(["agent", "wave", "outcome", "phase", "runs", "why"], rows),
        f"rollout {found['id']} {found['model']}:{found['version']} is {found['state']}{reason}",
        f"{rate['last_minute']} of at most {counted(rate['per_minute'], 'agent')} got it in the last minute",
        *(_abort(criterion) for criterion in found["aborts"]),
        *([f"waits for {found['waiting']['for']}, since {found['waiting']['since']}"] if found["waiting"] else []),
        *_stuck(found),
    ]


def _abort(criterion: dict[str, Any]) -> str:
    """Returns how near a rollout is to one of its abort criteria."""
    what = {"ALL": "failures of any kind"}.get(criterion["failure_type"], criterion["failure_type"])
    executed, needed = criterion["executed"], criterion["min_executed"]
    now = f"{criterion['percentage']:g} % of {counted(executed, 'executed agent')}" if executed else "none has executed"
    return (
        f"stops at {criterion['threshold_percentage']:g} % {what} once {counted(needed, 'agent')} executed; now: {now}"
    )


@rollouts.command("list")
def list_all(server: Server = "", as_json: AsJson = False) -> None:
    """List rollouts, newest first."""

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


RolloutId = Annotated[int, typer.Argument(help="Number of the rollout.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept with the rollout and in the audit trail.")]


@rollouts.command("show")
def show_one(rollout_id: RolloutId, server: Server = "", as_json: AsJson = False) -> None:
    """Print one rollout: every agent, the rate, and how near it is to stopping itself."""
    say(Client(server).get(f"/api/v1/rollouts/{rollout_id}"), as_json=as_json, table=_progress)


def _add_action(name: str, text: str) -> None:
    def command(
        rollout_id: RolloutId, reason: Reason = "", actor: Actor = "", server: Server = "", as_json: AsJson = False
    ) -> None:
        body = {"reason": reason, "actor": acting(actor)}
        found = Client(server).post(f"/api/v1/rollouts/{rollout_id}/{name}", body, key=secrets.token_hex(16))
        say(found, as_json=as_json, table=_progress)

    rollouts.command(name, help=text)(command)


SafeStateOption = Annotated[
    SafeState, typer.Option("--safe-state", help="What agents without a way back do: eject-all, pass-all or stop.")
]
Sure = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask when agents have no way back.")]


def _add_return(name: str, text: str) -> None:
    def command(
        rollout_id: RolloutId,
        safe_state: SafeStateOption = SafeState.NONE,
        reason: Reason = "",
        yes: Sure = False,
        actor: Actor = "",
        server: Server = "",
        as_json: AsJson = False,
    ) -> None:
        client = Client(server)
        stuck = _stuck(client.get(f"/api/v1/rollouts/{rollout_id}"))
        if stuck:
            does = f"they will {safe_state}" if safe_state else "they go on with what they have committed"
            show(*stuck, does, stderr=True)
            if sys.stdin.isatty() and sys.stderr.isatty() and not yes:
                typer.confirm("Go on?", abort=True, err=True)
        body = {"reason": reason, "actor": acting(actor), "safe_state": str(safe_state)}
        found = client.post(f"/api/v1/rollouts/{rollout_id}/{name}", body, key=secrets.token_hex(16))
        say(found, as_json=as_json, table=_progress)

    rollouts.command(name, help=text)(command)


@rollouts.command("exclude")
def exclude(
    rollout_id: RolloutId,
    agent: Annotated[list[str], typer.Argument(help="Agents that leave it.")],
    reason: Reason = "",
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Take agents out of a rollout: they no longer hold it up, and get nothing more of it."""
    body = {"agents": agent, "reason": reason, "actor": acting(actor)}
    say(Client(server).post(f"/api/v1/rollouts/{rollout_id}/exclude", body), as_json=as_json, table=_progress)


for _name, _text in (
    ("approve", "Let a rollout begin that another person has made with --needs-approval."),
    ("pause", "Give the bundle to no further agent; agents that have it go on."),
    ("resume", "Go on, also past the threshold at which the rollout paused itself."),
    ("finish", "End it where it is: no further agent gets the bundle, agents that have begun may go on."),
):
    _add_action(_name, _text)

for _name, _text in (
    ("abort", "Stop it and recall every agent that is not done; agents that have committed keep the bundle."),
    ("rollback", "Send every agent back to the bundle it had committed before; possible also after it has completed."),
):
    _add_return(_name, _text)
