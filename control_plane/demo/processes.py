"""The demo's processes: started with a log each, watched, stopped in order; and what a run has measured."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from control_plane.demo.options import DemoOptions
from models.errors import UnavailableError


@dataclass(slots=True)
class DemoRun:
    """The running processes of a demo, and its measurements."""

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
            # Ctrl-C reaches this process alone, which stops the others in order.
            start_new_session=True,
        )
        log.close()

    def check_processes(self) -> None:
        """Fails the demo when one of its processes has died.

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
            if not vanishes(process.pid, 3.0):
                self.problems.append(f"{name} left a process behind")
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)


def vanishes(group: int, timeout_s: float) -> bool:
    """Returns whether a process group is empty within the time."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def agent_command() -> list[str]:
    """Returns how the agent's program is started."""
    return [sys.executable, "-m", "edge_agent"]


def run_command(run: DemoRun, code: str, module: str, *arguments: str, text: str = "") -> str:
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


def free_port() -> int:
    """Returns a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(run: DemoRun, done: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Waits until `done()`, as long as every process lives.

    Raises:
        UnavailableError: `demo.timeout`, `demo.process_died`.
    """
    until = time.monotonic() + timeout_s
    while not done():
        run.check_processes()
        if time.monotonic() > until:
            raise UnavailableError("demo.timeout", f"The demo waited {timeout_s:g} s for {what}.")
        time.sleep(0.2)
