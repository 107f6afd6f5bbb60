"""The throw-away process that tries a bundle before it may run."""

import logging
import subprocess
import sys
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_agent.config import DeliveryConfig
from edge_agent.events import Deliver, deliver_surely
from models.messages import Fault

log = logging.getLogger("sortline.selftest")


@dataclass(frozen=True, slots=True)
class SelfTestDone:
    """The result of a self-test; `fault` is None when the bundle passed."""

    digest: str
    fault: Fault | None
    p99_ms: float = 0.0
    rss_mb: float = 0.0


def start_selftest(
    directory: Path, digest: str, config: DeliveryConfig, outlets: Collection[str], deliver: Deliver
) -> None:
    """Runs the self-test of a bundle in a process of its own, within the configuration's limits.

    Args:
        directory: The bundle's slot.
        digest: Which bundle it must be.
        config: Limits of time and memory.
        outlets: Outlets of the line, which the recipe must know.
        deliver: Gets the `SelfTestDone`.
    """

    def run() -> None:
        limits = config.selftest_budget_ms, config.selftest_timeout_s, config.selftest_memory_mb
        deliver_surely(deliver, run_selftest_process(directory, digest, *limits, outlets))

    threading.Thread(target=run, name="selftest", daemon=True).start()


def run_selftest_process(
    directory: Path,
    digest: str,
    budget_ms: float,
    timeout_s: float,
    memory_mb: int,
    outlets: Collection[str] = (),
) -> SelfTestDone:
    """Runs the self-test of a bundle in a process of its own and waits for it; never raises."""
    command = [sys.executable, "-m", "edge_agent.line.selftest", str(directory), "--digest", digest]
    try:
        done = subprocess.run(
            [
                *command,
                *(f"--outlet={name}" for name in outlets),
                "--budget-ms",
                str(budget_ms),
                "--memory-mb",
                str(memory_mb),
            ],
            capture_output=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        fault = Fault(code="selftest.timeout", message=f"The self-test took longer than {timeout_s:g} s.")
        return SelfTestDone(digest, fault)
    try:
        report = msgspec.json.decode(done.stdout.strip().splitlines()[-1])
        found = msgspec.convert(report["fault"], Fault | None)
        if done.returncode == 0 or found is not None:
            return SelfTestDone(digest, found, float(report["p99_ms"]), float(report["rss_mb"]))
    except (IndexError, KeyError, TypeError, ValueError, msgspec.MsgspecError):
        log.warning("self-test said: %s", done.stderr[-500:].decode(errors="replace"))
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return SelfTestDone(digest, Fault(code="selftest.crashed", message=f"The self-test process died by {how}."))
