"""A whole agent as its operator starts it: resident memory, time to the first verdict, and the gap after a crash.

Real processes: the embedded broker, `sortline-agent run` (the supervisor) and the line process that it starts. The
bundle is committed in its slot, as after any reboot. Cold start counts from starting the program to the line's log
record of its first verdict, so it holds the interpreter, the libraries, verifying and loading the bundle, and the
travel of the first item through the picture.

The gap counts from SIGKILL of the line to the first verdict after it, with a standby and without one. Either begins on
an empty simulated belt, which takes half a second to bring an item; a line that ran for less than a minute also has
a pause before its successor starts.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from benchmarks.figures import Figures, Row
from benchmarks.soak import ROOT, resident_mb
from edge_agent.delivery.lifecycle import SlotState
from edge_agent.delivery.state_file import champion_file
from models.bundle import read_bundle
from models.messages import Phase

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \S+ INFO first verdict", re.MULTILINE)
_WAITS = re.compile(r"standby (\d+) waits to take over")
_BUDGET_MB = 200.0


def stage(figures: Figures, bundle: Path, seconds: float, starts: int) -> None:
    """Starts the agent several times, and measures the memory of the last one after a while."""
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
    """Installs the bundle as it is stored after a passed trial."""
    digest = read_bundle(bundle).digest
    shutil.copytree(bundle, state / "slots" / digest)
    champion_file(state).save(SlotState(generation=1, phase=Phase.COMMITTED, active=digest))


def _run(state: Path, port: int, log: Path, seconds: float, memory: dict[str, float]) -> float:
    """Starts the agent, waits for its first verdict, measures memory at the end; returns seconds to the verdict."""
    started = time.time()
    with _agent(state, port, log) as process:
        first = _verdicts(process, log, 1)[0] - started
        time.sleep(seconds)
        if seconds:
            memory["supervisor"] = resident_mb(process.pid)
            memory["line"] = max(resident_mb(pid) for pid in _children(process))
    return first


def gaps(figures: Figures, bundle: Path, deaths: int) -> None:
    """Kills the line several times, with a standby and without one."""
    memory: dict[str, float] = {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = _broker(scratch, stack)
        _install(bundle, scratch / "state")
        log = scratch / "with.log"
        with _agent(scratch / "state", port, log, standby="always") as process:
            with_one = sorted(_gap(process, log, death, memory) for death in range(deaths))
        without: list[float] = []
        for death in range(deaths):
            # A new agent each time: the pause before the next line grows with every death.
            log = scratch / f"without-{death}.log"
            with _agent(scratch / "state", port, log, standby="never") as process:
                without.append(_gap(process, log, 0, None))
    ratio = with_one[deaths // 2] / sorted(without)[deaths // 2]
    rows: list[Row] = [
        ("line killed to the standby's first verdict, median", with_one[deaths // 2], "s"),
        ("line killed to the standby's first verdict, slowest", with_one[-1], f"s, of {deaths}"),
        ("line killed to the next line's first verdict, median", sorted(without)[deaths // 2], "s"),
        ("with a standby / without", ratio, ""),
        ("standby, resident", memory["resident"], "MB"),
        ("standby, proportional share of memory (PSS)", memory["share"], "MB"),
    ]
    bounds = {
        "line killed to the standby's first verdict, slowest": ("<=", 1.0),
        "with a standby / without": ("<=", 0.5),
    }
    figures.table("a line that dies", rows, bounds)


def _gap(process: subprocess.Popen[bytes], log: Path, death: int, memory: dict[str, float] | None) -> float:
    """Kills the line and waits for the first verdict of the next; seconds between them. No memory = no standby."""
    _verdicts(process, log, death + 1)
    spares = [] if memory is None else _await(process, log, _WAITS, death + 1)
    if memory == {}:
        memory["resident"] = resident_mb(int(spares[-1]))
        share = re.search(r"^Pss: +(\d+)", Path(f"/proc/{spares[-1]}/smaps_rollup").read_text("ascii"), re.MULTILINE)
        memory["share"] = int(share.group(1)) / 1000.0 if share else math.nan
    (line,) = [pid for pid in _children(process) if str(pid) not in spares[-1:]]
    killed = time.time()
    os.kill(line, signal.SIGKILL)
    return _verdicts(process, log, death + 2)[-1] - killed


@contextmanager
def _agent(state: Path, port: int, log: Path, standby: str = "trial") -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "edge_agent", "run", "--id", "line-1", "--broker", f"127.0.0.1:{port}"]
    command += ["--state-dir", str(state), "--camera", "simulated", "--lanes", "4", "--items-per-s", "10"]
    environment = os.environ | {"TZ": "UTC", "SORTLINE_AGENT__STANDBY": standby}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stderr=stream, env=environment)
        try:
            yield process
        finally:
            _end(process)


def _await(process: subprocess.Popen[bytes], log: Path, what: re.Pattern[str], count: int) -> list[str]:
    """Waits until the log holds `count` matches of the pattern, and returns them."""
    until = time.monotonic() + 60.0
    while len(found := what.findall(log.read_text(errors="replace"))) < count:
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"not in the log: {what.pattern}\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)
    return found


def _verdicts(process: subprocess.Popen[bytes], log: Path, count: int) -> list[float]:
    """Waits for `count` first verdicts; returns when each line gave its own, in seconds since 1970."""
    stamps = _await(process, log, _STAMP, count)
    return [datetime.fromisoformat(stamp.replace(",", ".") + "+00:00").timestamp() for stamp in stamps]


def _children(process: subprocess.Popen[bytes]) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8")
    return [int(pid) for pid in listed.split()]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(12)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
