"""A line process that waits: `python -m edge_agent.line.standby --config FILE --pipe-fd N`.

It loads every library, its bundle and (for a simulated line) its pictures, and touches neither camera nor encoder nor
ejector (`warming`). On `Go` it is the line; when its supervisor is gone or says `Stop`, it ends.

Before `Go` it must not disturb the line beside it. It warms up in a thread of low priority: on Linux each thread has
its own, and one that was lowered may not be raised again without privileges, so that thread ends with its work and the
threads that sort have the usual one. Where memory runs out, the system takes a standby before a line of its size.
Therefore nothing but the standard library is imported at the top.
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
"""As if it had a tenth of the machine's memory more: a line that takes far more than usual is still taken first."""
T = TypeVar("T")


def run_at_low_priority(work: Callable[[], T]) -> T:
    """Does work in a thread of low priority and waits for it."""
    with ThreadPoolExecutor(1, "warm-up", initializer=_lower_priority) as pool:
        return pool.submit(work).result()


def _lower_priority() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


@contextlib.contextmanager
def prefer_as_oom_victim() -> Iterator[None]:
    """While this lasts, a system without memory takes this process before others of its size."""
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


def main(argv: list[str] | None = None) -> int:
    """Entry of the process."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent.line.standby", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="LineConfig as JSON")
    parser.add_argument("--pipe-fd", type=int, required=True, help="inherited socket to the supervisor")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def load_and_warm_up() -> "WarmLine":
        from edge_agent.line import warm_up as warming  # noqa: PLC0415  the libraries, too, are loaded at low priority

        return warming.warm_up(options.config, options.pipe_fd)

    with prefer_as_oom_victim():
        line = run_at_low_priority(load_and_warm_up)
        line.load_for_many()
        wanted = line.wait()
    return line.serve() if wanted else 0


if __name__ == "__main__":
    raise SystemExit(main())
