"""Tries a bundle in a process of its own: `python -m edge_agent.line.selftest DIRECTORY --digest D --budget-ms B`.

A model that crashes, eats the memory, answers NaN, is too slow or computes something else than on the training
machine does so here, not on the line. Prints one JSON object; exit status 0 = fit for the line.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from edge_agent.vision.judge import Judge
from models.bundle import read_bundle
from models.errors import BundleError, SortlineError
from models.messages import Fault


class SelfTestReport(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of a self-test."""

    ok: bool
    digest: str
    fault: Fault | None = None
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    """99th percentile of runs with one view per lane, as on the line; the model's own time, see `_own_ms`."""
    rss_mb: float = 0.0
    max_difference: float = 0.0
    """Largest difference of a golden view's probability."""


def run_selftest(
    directory: Path,
    *,
    digest: str | None,
    budget_ms: float,
    batch: int,
    runs: int,
    outlets: Collection[str] | None = None,
) -> SelfTestReport:
    """Loads the bundle as the line would and runs its model.

    Args:
        directory: The bundle.
        digest: Digest the bundle must have; None accepts any.
        budget_ms: Longest time of the slowest in a hundred runs.
        batch: Views per run.
        runs: Number of runs.
        outlets: Outlets that the recipe may name (`LineConfig.outlets`); None = any will do.
    """
    name = digest or ""
    try:
        judge = Judge(directory, digest=digest)
        if outlets is not None:
            judge.recipe.check_outlets(outlets)
        views = read_bundle(directory, digest=digest).golden.views
        times = []
        for run in range(runs):
            chosen = np.take(views, range(run, run + batch), axis=0, mode="wrap")
            times.append(_own_ms(partial(judge.classifier.classify, chosen)))
            if sum(taken > budget_ms for taken in times) > 1 + runs // 100:
                break  # the slowest in a hundred are too slow whatever follows
        p50, p99 = (float(np.quantile(times, q)) for q in (0.5, 0.99))
        if p99 > budget_ms:
            raise BundleError(
                "selftest.too_slow",
                "The model is too slow for this line.",
                expected=f"p99 <= {budget_ms:g} ms",
                got=p99,
            )
    except SortlineError as error:
        return SelfTestReport(ok=False, digest=name, fault=Fault(code=error.code, message=str(error)[:600]))
    return SelfTestReport(
        ok=True,
        digest=judge.digest,
        p50_ms=round(p50, 3),
        p99_ms=round(p99, 3),
        rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0, 1),
        max_difference=judge.golden_difference,
    )


def _own_ms(run: Callable[[], object]) -> float:
    """Returns the milliseconds that a run takes by itself: wall or processor time, whichever is less.

    Beside a working line other processes take the processor away, which is not the model's fault and must not block
    its digest for ever; what the machine carries in the end, the trial shows. Several threads use more processor time
    than wall time, then the wall counts.
    """
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return min(time.perf_counter() - wall, time.process_time() - processor) * 1000.0


def main(argv: list[str] | None = None) -> int:
    """Runs the process."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent.line.selftest", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--digest", help="which bundle it must be")
    parser.add_argument("--budget-ms", type=float, default=50.0, help="p99 of one run (default: 50)")
    parser.add_argument("--batch", type=int, default=4, help="views per run (default: 4)")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--memory-mb", type=int, default=2048, help="address space of this process (default: 2048)")
    parser.add_argument("--outlet", action="append", help="an outlet of the line (default: any will do)")
    arguments = parser.parse_args(argv)
    limit = arguments.memory_mb * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    report = run_selftest(
        arguments.directory,
        digest=arguments.digest,
        budget_ms=arguments.budget_ms,
        batch=arguments.batch,
        runs=arguments.runs,
        outlets=arguments.outlet,
    )
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
