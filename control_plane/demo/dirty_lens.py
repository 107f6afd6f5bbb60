"""The demo's story of a lens that gets dirty: an alarm names it with evidence; it is wiped; the alarm closes by itself.

The lens is that of a simulated camera; everything behind it is the product: the agent looks at its belt, windows carry
what it saw, detection names the cause, and the alarm is raised and closed by the loop that runs in every plant.
"""

import time
from collections.abc import Callable
from typing import Any, Final

from control_plane.client import Client
from control_plane.demo.processes import DemoRun, run_command, wait_for

CAUSE: Final = "camera-dirty"
_DIRT: Final = "dirt=0.8 dirt_x=0.8 dirt_y=0.2"
"""A smudge at the upper right of the picture."""
_LEARNING_S: Final = 130.0
"""The agent learns its camera from thirty looks, one a second; detection learns the usual dirt from sixty more."""
_RAISED_S: Final = 120.0
_CLOSED_S: Final = 240.0
HOLD_S: Final = "20"
"""`alarms.hold_s` in the demo: nobody wants to wait a minute more to see an alarm close."""


def play_dirty_lens(run: DemoRun, client: Client, agents_started_s: float) -> None:
    """Plays it on the last line.

    Args:
        run: What is running.
        client: Of the control plane.
        agents_started_s: Monotonic time at which the agents were started.

    Raises:
        UnavailableError: `demo.timeout`: no alarm came, or it did not close; `demo.no_fault`, `demo.process_died`.
    """
    line = f"line-{run.options.agents}"
    learnt_s = agents_started_s + _LEARNING_S
    if time.monotonic() < learnt_s:
        with run.stage("Learning how the belts look through clean lenses"):
            wait_for(run, lambda: time.monotonic() >= learnt_s, _LEARNING_S + 30.0, "the cameras to learn")
    with run.stage(f"The lens of {line} gets dirty: waiting for the alarm"):
        set_fault(run, line, _DIRT)
        found, seconds = _timed(run, lambda: _alarm_of(client, line), _RAISED_S, "an alarm of the dirty lens")
        alarm = client.get(f"/api/v1/alarms/{found['id']}")
        run.console.print(f"  [bold]{alarm['severity']}[/]: {alarm['action']}", highlight=False)
        run.console.print(f"  after {seconds:.0f} s; evidence at {client.url}/alarms/{alarm['id']}", highlight=False)
        others = [one for one in _active(client) if one["cause"] == CAUSE and one["line"] != line]
        if others:
            run.problems.append(f"{others[0]['line']} has an alarm of a dirty lens and is clean")
        if not alarm["evidence"].get("dirt"):
            run.problems.append("the alarm of the dirty lens shows no grid of dirt")
    with run.stage(f"The lens of {line} is wiped: waiting for the alarm to close by itself"):
        set_fault(run, line, "clear")
        over, closed_s = _timed(run, lambda: _closed(client, alarm["id"]), _CLOSED_S, "the alarm to close")
        run.console.print(f"  {over['state']} by {over['resolved_by']}: {over['reason']}", highlight=False)
    run.facts["dirty_lens"] = {
        "line": line,
        "raised_after_s": round(seconds, 1),
        "closed_after_s": round(closed_s, 1),
        "severity": alarm["severity"],
        "action": alarm["action"],
    }


def set_fault(run: DemoRun, line: str, faults: str) -> None:
    """Says what is wrong with a simulated line from now on.

    Raises:
        UnavailableError: `demo.no_fault`.
    """
    run_command(run, "demo.no_fault", "edge_agent", "trouble", faults, "--state-dir", str(run.root / line))


def _timed(
    run: DemoRun, look: Callable[[], dict[str, Any] | None], timeout_s: float, what: str
) -> tuple[dict[str, Any], float]:
    """Waits until something is there; returns it, and after how many seconds."""
    started, found = time.monotonic(), None

    def done() -> bool:
        nonlocal found
        found = look()
        return found is not None

    wait_for(run, done, timeout_s, what)
    return found or {}, time.monotonic() - started


def _active(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/api/v1/alarms?limit=200")["alarms"]
    return found


def _alarm_of(client: Client, line: str) -> dict[str, Any] | None:
    return next((one for one in _active(client) if one["line"] == line and one["cause"] == CAUSE), None)


def _closed(client: Client, alarm_id: int) -> dict[str, Any] | None:
    alarm: dict[str, Any] = client.get(f"/api/v1/alarms/{alarm_id}")
    return alarm if alarm["state"] == "resolved" else None
