"""The steps of the demo, through the commands and the REST API that a plant uses."""

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from control_plane.client import Client
from control_plane.demo.dirty_lens import HOLD_S, play_dirty_lens
from control_plane.demo.processes import DemoRun, agent_command, free_port, run_command, wait_for
from control_plane.demo.table import WIDE_COLUMNS, fleet_table
from control_plane.trust.keys import BANNER
from models.errors import ConflictError, SortlineError, UnavailableError

_READY_S: Final = 60.0
_ROLLOUT_S: Final = 180.0
_SPARE_SHARE: Final = 0.75
"""Share of the machine's cores that the lines may take by measure; the rest is for everything else."""


def play(run: DemoRun) -> None:
    """Plays all steps; every failure is a `SortlineError`."""
    options = run.options
    _measure(run)
    with run.stage("Making signing keys"):
        _make_keys(run)
    with run.stage("Making a certificate authority, starting broker and control plane"):
        client = _start_servers(run)
    run.console.print(f"  pages [bold]{client.url}/[/]  API [bold]{client.url}/docs[/]", highlight=False)
    with run.stage(f"Enrolling and starting {options.agents} agents with {options.lanes} lanes each"):
        started_s = time.monotonic()
        _start_agents(run, client)
        wait_for(run, lambda: len(_agents(client)) == options.agents, _READY_S, "all agents to report")
    with run.stage(f"Collecting labelled views of {options.items} items from the line's own pipeline"):
        _collect(run)
    with run.stage("Training, evaluating, converting, checking parity, registering"):
        _train(run, client)
    with run.stage("Releasing it with the release key: agents accept nothing else"):
        _release(run, client)
    with run.stage("Rolling out over MQTT: one agent first, then all"):
        _roll_out(run, client)
    if options.story:
        play_dirty_lens(run, client, started_s)
    _watch(run, client)
    _collect_figures(run, client)


def _measure(run: DemoRun) -> None:
    """Measures what this machine carries, and reduces the lines to that."""
    options = run.options
    with run.stage("Measuring this machine"):
        command = [*agent_command(), "capacity", "--json", "--lanes", str(options.lanes)]
        command += ["--items-per-s", str(options.items_per_s)]
        done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode != 0:
            raise UnavailableError("demo.no_capacity", done.stderr.decode(errors="replace")[-500:])
        capacity = json.loads(done.stdout)
        cores = len(os.sched_getaffinity(0))
        needed = capacity["cores_per_line"] * options.agents
        carried = cores * _SPARE_SHARE
        if needed > carried:
            run.items_per_s = max(1.0, round(options.items_per_s * carried / needed, 1))
        run.facts["capacity"] = capacity | {"cores": cores, "cores_needed": round(needed, 2)}
        asked = options.agents * options.lanes * run.items_per_s
        run.console.print(
            f"  {cores} cores; a line takes {capacity['cores_per_line']:.2f} of one before inference, "
            f"{options.agents} lines at {asked:.0f} items/s in all"
            + ("" if run.items_per_s == options.items_per_s else " (reduced to what fits)"),
            highlight=False,
        )


def _start_servers(run: DemoRun) -> Client:
    """Returns the site's authority, then the broker and the control plane under its certificates."""
    root, options = run.root, run.options
    plane = root / "control-plane"
    if not (plane / "identity").exists():
        run_command(run, "demo.no_authority", "control_plane", "ca", "init", "--data-dir", str(plane), "--site", "Demo")
    ready = root / "broker-ready.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "control_plane.broker", "--port", "0", "--site", str(plane / "identity" / "site")]
    run.start("broker", [*command, "--ready-file", str(ready)])
    wait_for(run, ready.exists, _READY_S, "the broker")
    broker = json.loads(ready.read_text(encoding="utf-8"))
    run.facts["broker_port"] = broker["port"]
    port, enrolment_port = options.port or free_port(), free_port()
    run.facts["enrolment_url"] = f"https://127.0.0.1:{enrolment_port}"
    environment = {
        "SORTLINE__DATA_DIR": str(plane),
        "SORTLINE__SERVER__PORT": str(port),
        "SORTLINE__IDENTITY__PORT": str(enrolment_port),
        "SORTLINE__BROKER__PORT": str(broker["port"]),
        "SORTLINE__BROKER__TLS": "true",
        "SORTLINE__ALARMS__HOLD_S": HOLD_S,
    }
    run.start("control-plane", [sys.executable, "-m", "control_plane", "serve"], environment)
    client = Client(f"http://127.0.0.1:{port}")
    wait_for(run, lambda: _ready(client), _READY_S, "the control plane")
    return client


def _ready(client: Client) -> bool:
    try:
        return bool(client.get("/readyz")["ready"])
    except SortlineError:
        return False


def _start_agents(run: DemoRun, client: Client) -> None:
    """Each agent enrols with a one-time token, then runs; its name and broker come from its identity."""
    options = run.options
    for number in range(options.agents):
        name = f"line-{number + 1}"
        state = str(run.root / name)
        if not (run.root / name / "identity" / "identity.json").exists():
            token = client.post(f"/api/v1/agents/{name}/enrolment", {"actor": "demo"})["token"]
            where = ("--control-plane", run.facts["enrolment_url"], "--state-dir", state)
            run_command(run, "demo.not_enrolled", "edge_agent", "enrol", "--token", "-", *where, text=token)
        environment = {
            "SORTLINE_AGENT__STATE_DIR": state,
            # With --data-dir an identity is older than this broker's port.
            "SORTLINE_AGENT__BROKER__PORT": str(run.facts["broker_port"]),
            "SORTLINE_AGENT__LABELS__SITE": "demo",
            "SORTLINE_AGENT__LABELS__LINE": str(number + 1),
        }
        flags = ["--seed", str(100 + number), "--lanes", str(options.lanes), "--items-per-s", str(run.items_per_s)]
        flags += ["--hollow-share", "0.1"]
        run.start(name, [*agent_command(), "run", *flags], environment)


def _collect(run: DemoRun) -> None:
    command = [*agent_command(), "collect", "--output", str(run.root / f"views-{secrets.token_hex(3)}"), "--json"]
    command += ["--items", str(run.options.items), "--seed", "7", "--defect-share", "0.5", "--hollow-share", "0.3"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise UnavailableError("demo.no_views", done.stderr.decode(errors="replace")[-500:])
    run.facts["collected"] = json.loads(done.stdout)
    run.console.print(f"  {run.facts['collected']['views']} views: {run.facts['collected']['labels']}", highlight=False)


def _train(run: DemoRun, client: Client) -> None:
    client.post(
        "/api/v1/datasets", {"name": "demo-apples", "root": run.facts["collected"]["directory"], "actor": "demo"}
    )
    body = {"dataset": "demo-apples", "name": "apples", "effort": "quick", "folds": 3, "actor": "demo"}
    job = client.post("/api/v1/training-runs", body)
    columns = (TextColumn("  {task.description:<34}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=run.console) as bar:
        task = bar.add_task("waiting for a worker", total=1.0)
        done = client.follow_job(
            job["id"], lambda j: bar.update(task, description=j["stage"] or j["state"], completed=j["progress"])
        )
    if done["state"] != "succeeded":
        raise ConflictError("demo.training_failed", str(done["error"]))
    result = done["result"]
    run.facts["training"] = result
    item, view, parity = result["metrics"]["item"], result["metrics"]["view"], result["parity"]
    run.console.print(
        f"  item AUC {_figure(item['auc'])}, balanced accuracy {_figure(item['balanced_accuracy'])}{_blind(result)}, "
        f"view AUC {_figure(view['auc'])}; parity on {parity['views']} views: largest difference "
        f"{parity['max_difference']:.1e}, {parity['flips']} flips; bundle {result['bundle'][:12]}, "
        f"{result['size_bytes'] / 1024:.0f} KB",
        highlight=False,
    )


def _blind(result: dict[str, Any]) -> str:
    """Returns what the same model says of hollow items without the scale."""
    metrics = result["metrics"]
    blind = metrics.get("item_without_scalars")
    if blind is None or "hollow" not in metrics["item"].get("classes", []):
        return ""
    place = metrics["item"]["classes"].index("hollow")
    caught = [f"{one['confusion_shares'][place][place]['value']:.0%}" for one in (metrics["item"], blind)]
    return f", hollow items found {caught[0]} with the scale and {caught[1]} without"


def _figure(figure: dict[str, Any]) -> str:
    interval = f" ({figure['low']:.3f} to {figure['high']:.3f})" if figure.get("low") is not None else ""
    return f"{figure['value']:.3f}{interval}"


def _trust(run: DemoRun) -> Path:
    return run.root / "control-plane" / "trust"


def _make_keys(run: DemoRun) -> None:
    """The development profile: every key on this machine, and it says so."""
    if not (_trust(run) / "1.root.json").exists():
        run_command(run, "demo.no_keys", "control_plane", "keys", "init", "--development", "--trust", str(_trust(run)))
    run.console.print(f"  [bold white on red] {BANNER} [/]", highlight=False)


def _release(run: DemoRun, client: Client) -> None:
    key = _trust(run) / "development" / "release.pem"
    what = ("models", "release", "apples", "--key", str(key), "--server", client.url)
    run_command(run, "demo.not_released", "control_plane", *what)
    trust = client.get("/api/v1/trust")
    run.facts["trust"] = {"kind": trust["kind"], "versions": {r["role"]: r["version"] for r in trust["roles"]}}


def _roll_out(run: DemoRun, client: Client) -> None:
    body = {"model": "apples", "waves": [1, "100%"], "trial_items": 40, "actor": "demo"}
    rollout: dict[str, Any] = client.post("/api/v1/rollouts", body)

    def done() -> bool:
        nonlocal rollout
        rollout = client.get(f"/api/v1/rollouts/{rollout['id']}")
        return bool(rollout["state"] != "running")

    wait_for(run, done, _ROLLOUT_S, "the rollout")
    run.facts["rollout"] = {"state": rollout["state"], "reason": rollout["reason"], "counts": rollout["counts"]}
    if rollout["state"] != "completed":
        run.problems.append(f"the rollout is {rollout['state']}: {rollout['reason']}")
    run.console.print(f"  {rollout['state']}: {rollout['reason']}", highlight=False)


def _agents(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/api/v1/agents")
    return [agent for agent in found if agent["reported_age_s"] is not None]


def _watch(run: DemoRun, client: Client) -> None:
    """The live table, until the time is over or Ctrl-C."""
    hint = f"for {run.options.seconds:g} s" if run.options.seconds else "until Ctrl-C"
    run.console.print(f"[bold]Sorting[/] {hint}; pages at {client.url}/", highlight=False)
    until = time.monotonic() + run.options.seconds if run.options.seconds else float("inf")
    wide = run.console.width >= WIDE_COLUMNS
    with Live(fleet_table(_agents(client), wide=wide), console=run.console, refresh_per_second=2) as live:
        try:
            while time.monotonic() < until:
                time.sleep(min(1.0, max(0.0, until - time.monotonic())))
                run.check_processes()
                live.update(fleet_table(_agents(client), wide=wide))
        except KeyboardInterrupt:
            live.update(fleet_table(_agents(client), wide=wide))
    if not run.console.is_terminal:  # where nothing moves, the last table ends without a line feed
        run.console.print()


def _collect_figures(run: DemoRun, client: Client) -> None:
    agents = _agents(client)
    run.facts["agents"] = agents
    bundle = run.facts["training"]["bundle"]
    for agent in agents:
        if agent["active"] != bundle or agent["phase"] != "committed":
            run.problems.append(f"{agent['id']} did not commit the bundle: {agent['phase']} {agent['fault']}")
        if not (agent["live"] or {}).get("items"):
            run.problems.append(f"{agent['id']} judged no item")
