"""A line process that waits: `python -m edge_agent.line.standby --config FILE --pipe-fd N`.

It loads every library, its bundle and (for a simulated line) its pictures, and touches neither camera nor encoder nor
ejector (`warm_up`). On `Go` it becomes the line; it ends when its supervisor is gone or sends `Stop`.

Before `Go` it must not disturb the line beside it. It warms up in a thread of low priority: on Linux each thread has
its own, and a thread whose priority was lowered may not raise it again without privileges. That thread therefore ends
with its work, and the threads that sort have the usual priority. Where memory runs out, the system kills a standby
before a line of its size. Nothing but the standard library is imported at the top, so that even the imports happen at
low priority.
"""

import argparse
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from edge_agent.line.warm_up import WarmLine

_NICE: Final = 10
_OOM_SCORE: Final = 100
"""Counts like a tenth of the machine's memory: a line that uses far more memory than usual is still killed first."""
T = TypeVar("T")


def run_at_low_priority(work: Callable[[], T]) -> T:
    """Does the work in a thread of low priority and returns its result."""
    with ThreadPoolExecutor(1, "warm-up", initializer=_lower_priority) as pool:
        return pool.submit(work).result()


def watch_quietly(body: Callable[[threading.Event], None], stop: threading.Event) -> None:
    """Runs the body of a thread at low priority: what it does must never take time from sorting."""
    _lower_priority()
    body(stop)


def _lower_priority() -> None:
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        # A privileged process that was started with an even lower priority would otherwise raise its own.
        os.setpriority(os.PRIO_PROCESS, thread, max(os.getpriority(os.PRIO_PROCESS, thread), _NICE))


@contextlib.contextmanager
def prefer_as_oom_victim() -> Iterator[None]:
    """Makes the system kill this process before others of its size when memory runs out, while the context lasts."""
    path = Path("/proc/self/oom_score_adj")
    before: int | None = None
    with contextlib.suppress(OSError, ValueError):
        before = int(path.read_text(encoding="ascii"))
        path.write_text(str(min(before + _OOM_SCORE, 1000)), encoding="ascii")
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError):
                path.write_text(str(before), encoding="ascii")


def parse_command_line(module: str, description: str, argv: list[str] | None) -> argparse.Namespace:
    """Reads the arguments that a line and its standby share, and sets up logging to standard error.

    Args:
        module: Name of the module in `edge_agent.line` that is the process.
        description: Shown by `--help`.
        argv: Arguments; None = those of the process.

    Returns:
        `config` (path of a `LineConfig` as JSON) and `pipe_fd` (descriptor of the socket to the supervisor).
    """
    parser = argparse.ArgumentParser(prog=f"python -m edge_agent.line.{module}", description=description)
    parser.add_argument("--config", type=Path, required=True, help="LineConfig as JSON")
    parser.add_argument("--pipe-fd", type=int, required=True, help="inherited socket to the supervisor")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the process."""
    options = parse_command_line("standby", __doc__ or "", argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def load_and_warm_up() -> "WarmLine":
        from edge_agent.line.warm_up import warm_up  # noqa: PLC0415  the libraries, too, are loaded at low priority

        return warm_up(options.config, options.pipe_fd)

    with prefer_as_oom_victim():
        line = run_at_low_priority(load_and_warm_up)
        line.load_for_many()
        wanted = line.wait()
    return line.serve() if wanted else 0


if __name__ == "__main__":
    raise SystemExit(main())
