"""The whole loop on one machine, with real processes: broker, control plane, agents; train, push, sort, watch.

Everything goes through the same commands and the same REST API a plant uses: `sortline ca init`, `sortline broker`,
`sortline serve`, `sortline-agent enrol`, `sortline-agent run`, data set, training run, rollout. There is no shortcut:
every agent enrols with a one-time token and speaks by mutual TLS, and the agents are started as their own program,
because this side does not import theirs.
"""

import json
import platform
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from control_plane.demo.options import DemoOptions
from control_plane.demo.processes import DemoRun
from control_plane.demo.story import play
from models.errors import SortlineError
from models.files import write_atomically


def run_demo(options: DemoOptions) -> int:
    """Runs the demo; returns the exit status: non-zero when an agent did not commit, a process died or a line idled."""
    console = Console(stderr=False)
    with tempfile.TemporaryDirectory(prefix="sortline-demo-") as scratch:
        root = (options.data_dir or Path(scratch)).resolve()
        (root / "logs").mkdir(parents=True, exist_ok=True)
        run = DemoRun(options, root, console, items_per_s=options.items_per_s)
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            play(run)
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


def _conclude(run: DemoRun) -> int:
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
