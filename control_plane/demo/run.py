"""The whole loop on one machine, with real processes: broker, control plane, agents; train, push, sort, watch.

Everything goes through the same commands and the same REST API a plant uses: `sortline ca init`, `sortline broker`,
`sortline serve`, `sortline-agent enrol`, `sortline-agent run`, data set, training run, rollout. Nothing here is a
shortcut: every agent enrols with a one-time token and speaks by mutual TLS, and the agents are started as their own
program: this side does not import theirs.
"""

import contextlib
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from control_plane.client import Client
from control_plane.trust.keys import BANNER
from models.errors import ConflictError, SortlineError, UnavailableError
from models.files import write_atomically

_READY_S: Final = 60.0
_ROLLOUT_S: Final = 180.0
_SPARE_SHARE: Final = 0.75
"""Of the machine's cores that the lines may take by measure; the rest is for everything else."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the person at the keyboard decides."""

    seconds: float = 0.0
    report: Path | None = None
    port: int = 8080
    agents: int = 3
    lanes: int = 2
    items_per_s: float = 9.0
    items: int = 600
    data_dir: Path | None = None


@dataclass(slots=True)
class _Run:
    """What is running, and what was measured."""

    options: DemoOptions
    root: Path
    console: Console
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    items_per_s: float = 9.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage and says that it is done."""
        started = time.monotonic()
        self.console.print(f"[bold]{name}[/] ...", highlight=False)
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)
        self.console.print(f"  [green]done[/] in {self.seconds[name]:.1f} s", highlight=False)

    def start(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
        """Starts a process whose output goes to a log of its own."""
        log = (self.root / "logs" / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {}), "OMP_NUM_THREADS": "1"},
            # Ctrl-C is ours: the processes are stopped in order, not all at once.
            start_new_session=True,
        )
        log.close()

    def check_processes(self) -> None:
        """A process that died is a failed demo.

        Raises:
            UnavailableError: `demo.process_died`, with the end of its log.
        """
        for name, process in self.processes.items():
            if process.poll() is not None:
                log = (self.root / "logs" / f"{name}.log").read_text(errors="replace")[-1500:]
                self.problems.append(f"{name} died with exit status {process.returncode}")
                raise UnavailableError("demo.process_died", f"{name} died.\n{log}", got=process.returncode)

    def stop(self) -> None:
        """Stops everything, agents first, and makes sure that nothing is left."""
        order = sorted(self.processes, key=lambda name: (name == "broker", name == "control-plane"))
        for group in (order[:-2], order[-2:-1], order[-1:]):
            for name in group:
                if self.processes[name].poll() is None:
                    self.processes[name].send_signal(signal.SIGTERM)
            for name in group:
                try:
                    self.processes[name].wait(12.0)
                except subprocess.TimeoutExpired:
                    self.problems.append(f"{name} had to be killed")
                    self.processes[name].kill()
        for name, process in self.processes.items():
            if not _vanishes(process.pid, 3.0):
                self.problems.append(f"{name} left a process behind")
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)


def _vanishes(group: int, timeout_s: float) -> bool:
    """Whether a process group is empty within the time."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def run_demo(options: DemoOptions) -> int:
    """Runs the demo; returns the exit status: non-zero when an agent did not commit, a process died or a line idled."""
    console = Console(stderr=False)
    with tempfile.TemporaryDirectory(prefix="sortline-demo-") as scratch:
        root = (options.data_dir or Path(scratch)).resolve()
        (root / "logs").mkdir(parents=True, exist_ok=True)
        run = _Run(options, root, console, items_per_s=options.items_per_s)
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            _play(run)
        except KeyboardInterrupt:
            console.print("\nstopping ...")
        except SortlineError as error:
            run.problems.append(f"{error.code}: {error}")
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            run.stop()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return _conclude(run)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _play(run: _Run) -> None:
    options = run.options
    _measure(run)
    with run.stage("Making signing keys"):
        _make_keys(run)
    with run.stage("Making a certificate authority, starting broker and control plane"):
        client = _start_servers(run)
    run.console.print(f"  pages [bold]{client.url}/[/]  API [bold]{client.url}/docs[/]", highlight=False)
    with run.stage(f"Enrolling and starting {options.agents} agents with {options.lanes} lanes each"):
        _start_agents(run, client)
        _wait(run, lambda: len(_agents(client)) == options.agents, _READY_S, "all agents to report")
    with run.stage(f"Collecting labelled views of {options.items} items from the line's own pipeline"):
        _collect(run)
    with run.stage("Training, evaluating, converting, checking parity, registering"):
        _train(run, client)
    with run.stage("Releasing it with the release key: agents accept nothing else"):
        _release(run, client)
    with run.stage("Rolling out over MQTT: one agent first, then all"):
        _roll_out(run, client)
    _watch(run, client)
    _collect_figures(run, client)


def _measure(run: _Run) -> None:
    """Finds out what this machine carries, and asks for no more."""
    options = run.options
    with run.stage("Measuring this machine"):
        command = [*_agent_command(), "capacity", "--json", "--lanes", str(options.lanes)]
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


def _agent_command() -> list[str]:
    return [sys.executable, "-m", "edge_agent"]


def _start_servers(run: _Run) -> Client:
    """The site's authority, then the broker and the control plane under its certificates."""
    root, options = run.root, run.options
    plane = root / "control-plane"
    if not (plane / "identity").exists():
        _command(run, "demo.no_authority", "control_plane", "ca", "init", "--data-dir", str(plane), "--site", "Demo")
    ready = root / "broker-ready.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "control_plane.broker", "--port", "0", "--site", str(plane / "identity" / "site")]
    run.start("broker", [*command, "--ready-file", str(ready)])
    _wait(run, ready.exists, _READY_S, "the broker")
    broker = json.loads(ready.read_text(encoding="utf-8"))
    run.facts["broker_port"] = broker["port"]
    port, enrolment_port = options.port or _free_port(), _free_port()
    run.facts["enrolment_url"] = f"https://127.0.0.1:{enrolment_port}"
    environment = {
        "SORTLINE__DATA_DIR": str(plane),
        "SORTLINE__SERVER__PORT": str(port),
        "SORTLINE__IDENTITY__PORT": str(enrolment_port),
        "SORTLINE__BROKER__PORT": str(broker["port"]),
        "SORTLINE__BROKER__TLS": "true",
    }
    run.start("control-plane", [sys.executable, "-m", "control_plane", "serve"], environment)
    client = Client(f"http://127.0.0.1:{port}")
    _wait(run, lambda: _ready(client), _READY_S, "the control plane")
    return client


def _command(run: _Run, code: str, module: str, *arguments: str, text: str = "") -> str:
    """Runs one of our own commands to its end; returns what it printed.

    Raises:
        UnavailableError: `code`, with what it complained of.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], input=text, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        run.problems.append(f"{module} {arguments[0]} failed")
        raise UnavailableError(code, done.stderr[-500:])
    return done.stdout


def _free_port() -> int:
    import socket  # noqa: PLC0415

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ready(client: Client) -> bool:
    try:
        return bool(client.get("/readyz")["ready"])
    except SortlineError:
        return False


def _start_agents(run: _Run, client: Client) -> None:
    """Each agent enrols with a one-time token, then runs: it knows its name and broker from its identity."""
    options = run.options
    for number in range(options.agents):
        name = f"line-{number + 1}"
        state = str(run.root / name)
        if not (run.root / name / "identity" / "identity.json").exists():
            token = client.post(f"/api/v1/agents/{name}/enrolment", {"actor": "demo"})["token"]
            where = ("--control-plane", run.facts["enrolment_url"], "--state-dir", state)
            _command(run, "demo.not_enrolled", "edge_agent", "enrol", "--token", "-", *where, text=token)
        environment = {
            "SORTLINE_AGENT__STATE_DIR": state,
            # With --data-dir an identity is older than this broker's port.
            "SORTLINE_AGENT__BROKER__PORT": str(run.facts["broker_port"]),
            "SORTLINE_AGENT__LABELS__SITE": "demo",
            "SORTLINE_AGENT__LABELS__LINE": str(number + 1),
        }
        flags = ["--seed", str(100 + number), "--lanes", str(options.lanes), "--items-per-s", str(run.items_per_s)]
        run.start(name, [*_agent_command(), "run", *flags], environment)


def _collect(run: _Run) -> None:
    command = [*_agent_command(), "collect", "--output", str(run.root / f"views-{secrets.token_hex(3)}"), "--json"]
    command += ["--items", str(run.options.items), "--seed", "7", "--defect-share", "0.5"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise UnavailableError("demo.no_views", done.stderr.decode(errors="replace")[-500:])
    run.facts["collected"] = json.loads(done.stdout)
    run.console.print(f"  {run.facts['collected']['views']} views: {run.facts['collected']['labels']}", highlight=False)


def _train(run: _Run, client: Client) -> None:
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
        f"  item AUC {_figure(item['auc'])}, balanced accuracy {_figure(item['balanced_accuracy'])}, "
        f"view AUC {_figure(view['auc'])}; parity on {parity['views']} views: largest difference "
        f"{parity['max_difference']:.1e}, {parity['flips']} flips; bundle {result['bundle'][:12]}, "
        f"{result['size_bytes'] / 1024:.0f} KB",
        highlight=False,
    )


def _figure(figure: dict[str, Any]) -> str:
    interval = f" ({figure['low']:.3f} to {figure['high']:.3f})" if figure.get("low") is not None else ""
    return f"{figure['value']:.3f}{interval}"


def _trust(run: _Run) -> Path:
    return run.root / "control-plane" / "trust"


def _make_keys(run: _Run) -> None:
    """The development profile: every key on this machine, and it says so."""
    if not (_trust(run) / "1.root.json").exists():
        _command(run, "demo.no_keys", "control_plane", "keys", "init", "--development", "--trust", str(_trust(run)))
    run.console.print(f"  [bold white on red] {BANNER} [/]", highlight=False)


def _release(run: _Run, client: Client) -> None:
    key = _trust(run) / "development" / "release.pem"
    what = ("models", "release", "apples", "--key", str(key), "--server", client.url)
    _command(run, "demo.not_released", "control_plane", *what)
    trust = client.get("/api/v1/trust")
    run.facts["trust"] = {"kind": trust["kind"], "versions": {r["role"]: r["version"] for r in trust["roles"]}}


def _roll_out(run: _Run, client: Client) -> None:
    body = {"model": "apples", "waves": [1, "100%"], "trial_items": 40, "actor": "demo"}
    rollout: dict[str, Any] = client.post("/api/v1/rollouts", body)

    def done() -> bool:
        nonlocal rollout
        rollout = client.get(f"/api/v1/rollouts/{rollout['id']}")
        return bool(rollout["state"] != "running")

    _wait(run, done, _ROLLOUT_S, "the rollout")
    run.facts["rollout"] = {"state": rollout["state"], "reason": rollout["reason"], "counts": rollout["counts"]}
    if rollout["state"] != "completed":
        run.problems.append(f"the rollout is {rollout['state']}: {rollout['reason']}")
    run.console.print(f"  {rollout['state']}: {rollout['reason']}", highlight=False)


def _agents(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/api/v1/agents")
    return [agent for agent in found if agent["reported_age_s"] is not None]


def _wait(run: _Run, done: Any, timeout_s: float, what: str) -> None:
    until = time.monotonic() + timeout_s
    while not done():
        run.check_processes()
        if time.monotonic() > until:
            raise UnavailableError("demo.timeout", f"Waited {timeout_s:g} s for {what} in vain.")
        time.sleep(0.2)


def _watch(run: _Run, client: Client) -> None:
    """The live table, until the time is over or Ctrl-C."""
    hint = f"for {run.options.seconds:g} s" if run.options.seconds else "until Ctrl-C"
    run.console.print(f"[bold]Sorting[/] {hint}; pages at {client.url}/", highlight=False)
    until = time.monotonic() + run.options.seconds if run.options.seconds else float("inf")
    wide = run.console.width >= _WIDE_COLUMNS
    with Live(_table(_agents(client), wide=wide), console=run.console, refresh_per_second=2) as live:
        try:
            while time.monotonic() < until:
                time.sleep(min(1.0, max(0.0, until - time.monotonic())))
                run.check_processes()
                live.update(_table(_agents(client), wide=wide))
        except KeyboardInterrupt:
            live.update(_table(_agents(client), wide=wide))
    if not run.console.is_terminal:  # where nothing moves, the last table ends without a line feed
        run.console.print()


_WIDE_COLUMNS: Final = 120
_COLUMNS: Final = (
    # wide, narrow: eighty columns must hold a row
    ("line", "line"),
    ("items/s", "it/s"),
    ("verdicts %", "good%"),
    ("p50/p99 ms", "p50/p99"),
    ("ejected", "eject"),
    ("late", "late"),
    ("wrong", "wrong"),
    ("escaped %", "esc%"),
    ("wasted %", "waste%"),
    ("dropped", "drop"),
    ("bundle", "bundle"),
    ("window", "age"),
)


def _table(agents: list[dict[str, Any]], *, wide: bool) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for names in _COLUMNS:
        name = names[0 if wide else 1]
        table.add_column(name, no_wrap=True, justify="left" if name in {"line", "verdicts %", "bundle"} else "right")
    for agent in sorted(agents, key=lambda a: str(a["id"])):
        live = agent["live"] or {}
        shots = live.get("ejections", {})
        table.add_row(
            agent["id"],
            f"{live.get('items_per_s', 0.0):.1f}",
            _mix(live.get("classes", {}), wide=wide),
            f"{live.get('p50_ms', 0.0):.0f}/{live.get('p99_ms', 0.0):.0f}",
            str(shots.get("on_time", 0)),
            str(shots.get("late", 0) + live.get("verdicts_late", 0)),
            str(shots.get("wrong", 0) + shots.get("gap", 0)),
            _percent(agent["escape_rate"]),
            _percent(agent["false_reject_rate"]),
            str(live.get("frames_dropped", 0)),
            agent["active"][:6] or "none",
            "none" if agent["window_age_s"] is None else f"{agent['window_age_s']:.0f} s",
        )
    return table


def _mix(classes: dict[str, int], *, wide: bool) -> str:
    """Verdict mix in percent; only the good share where there is no room."""
    total = sum(classes.values())
    if not total:
        return "-"
    if not wide:
        return f"{100 * classes.get('sound', 0) / total:.0f}"
    return " ".join(f"{k} {100 * v / total:.0f}" for k, v in sorted(classes.items(), key=lambda pair: -pair[1]))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _collect_figures(run: _Run, client: Client) -> None:
    agents = _agents(client)
    run.facts["agents"] = agents
    bundle = run.facts["training"]["bundle"]
    for agent in agents:
        if agent["active"] != bundle or agent["phase"] != "committed":
            run.problems.append(f"{agent['id']} did not commit the bundle: {agent['phase']} {agent['fault']}")
        if not (agent["live"] or {}).get("items"):
            run.problems.append(f"{agent['id']} judged no item")


def _conclude(run: _Run) -> int:
    report = {
        "ok": not run.problems,
        "problems": run.problems,
        "seconds": run.seconds,
        "items_per_s_per_lane": run.items_per_s,
        "versions": {"python": platform.python_version(), "sortline": version("sortline")},
        **run.facts,
    }
    if run.options.report is not None:
        write_atomically(run.options.report.resolve(), json.dumps(report, indent=2, default=str).encode())
    for problem in run.problems:
        run.console.print(f"[bold red]problem[/] {problem}", highlight=False)
    if not run.problems:
        run.console.print("[green]everything stopped, nothing is left running[/]")
    return 1 if run.problems else 0
