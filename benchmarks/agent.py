"""A whole agent as its operator starts it: resident memory of both processes, and how soon it judges.

Real processes: the embedded broker, `sortline-agent run` (the supervisor) and the line process that it starts. The
bundle lies committed in its slot, as after any reboot. Cold start counts from starting the program to the line's log
record of its first verdict, so it holds the interpreter, the libraries, verifying and loading the bundle, and the
travel of the first item through the picture.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from benchmarks.figures import Figures, Row
from benchmarks.soak import ROOT, resident_mb
from edge_agent.slots import SlotState, StateFile
from models.bundle import read_bundle
from models.messages import Phase

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \S+ INFO first verdict", re.MULTILINE)
_BUDGET_MB = 200.0


def stage(figures: Figures, bundle: Path, seconds: float, starts: int) -> None:
    """Starts the agent some times; the last one runs for a while and is measured."""
    first_s: list[float] = []
    memory: dict[str, float] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = _broker(scratch, stack)
        state = scratch / "state"
        _install(bundle, state)
        for number in range(starts):
            last = number == starts - 1
            log = scratch / f"agent-{number}.log"
            first_s.append(_run(state, port, log, seconds if last else 0.0, memory))
    rows: list[Row] = [
        ("start to first verdict, median", sorted(first_s)[len(first_s) // 2], "s"),
        ("start to first verdict, slowest", max(first_s), f"s, of {starts} starts"),
        ("supervisor, resident", memory["supervisor"], "MB"),
        ("line, resident", memory["line"], f"MB, after {seconds:.0f} s of 4 lanes x 10 items/s"),
        ("both, resident", memory["supervisor"] + memory["line"], "MB"),
    ]
    bounds = {"start to first verdict, median": ("<=", 3.0), "both, resident": ("<=", _BUDGET_MB)}
    figures.table("the agent as real processes", rows, bounds)


def _broker(scratch: Path, stack: ExitStack) -> int:
    ready = scratch / "broker.json"
    command = [sys.executable, "-m", "control_plane.broker", "--port", "0", "--anonymous", "--ready-file", str(ready)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(_end, process)
    until = time.monotonic() + 30.0
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError("the broker does not start")
        time.sleep(0.05)
    return int(json.loads(ready.read_text(encoding="utf-8"))["port"])


def _install(bundle: Path, state: Path) -> None:
    """The bundle as it lies after its trial was passed."""
    digest = read_bundle(bundle).digest
    shutil.copytree(bundle, state / "slots" / digest)
    StateFile(state).save(SlotState(generation=1, phase=Phase.COMMITTED, active=digest))


def _run(state: Path, port: int, log: Path, seconds: float, memory: dict[str, float]) -> float:
    """Starts the agent, waits for its first verdict, measures memory at the end; returns seconds to the verdict."""
    command = [sys.executable, "-m", "edge_agent", "run", "--id", "line-1", "--broker", f"127.0.0.1:{port}"]
    command += ["--state-dir", str(state), "--camera", "simulated", "--lanes", "4", "--items-per-s", "10"]
    with log.open("wb") as stream:
        started = time.time()
        process = subprocess.Popen(command, cwd=ROOT, stderr=stream, env=os.environ | {"TZ": "UTC"})
        try:
            until = time.monotonic() + 60.0
            while (found := _STAMP.search(log.read_text(errors="replace"))) is None:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"no verdict:\n{log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.05)
            first = datetime.fromisoformat(found.group(1).replace(",", ".") + "+00:00").timestamp() - started
            time.sleep(seconds)
            if seconds:
                child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
                memory["supervisor"] = resident_mb(process.pid)
                memory["line"] = max(resident_mb(int(pid)) for pid in child)
        finally:
            _end(process)
    return first


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(12)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
