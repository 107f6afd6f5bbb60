"""The path from frame to ejector against what it cannot do without: `python -m benchmarks.line [--quick]`.

Every ratio has its baseline in the same run, in turns with what it is compared with. Prints tables, writes figures as
JSON (`--json`) and plots as SVG (`--plots`); exit status 1 when a bound is missed. `--bundle` takes a trained bundle;
without it one is trained on simulated items once and kept in the cache.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import cv2
from rich.console import Console

from benchmarks import agent, quantised, routing, soak, speed, tracking
from benchmarks.figures import Figures
from control_plane.training.pipeline import TrainSettings, train
from edge_agent.line_config import LineConfig
from edge_agent.offline.collect import collect

ITEMS = 800


def cached_bundle(console: Console) -> Path:
    """A model of the usual size, trained on what the simulated line's own pipeline collects, as the demo does.

    Kept under a name that changes with the sources that make it, so that no run measures a model of yesterday.
    """
    root = Path(__file__).resolve().parents[1]
    rooms = ("vision/segmentation", "simulation/rendering", "simulation/line", "offline/collect")
    edge = [root / "edge_agent" / f"{name}.py" for name in rooms]
    sources = [*root.glob("models/*.py"), *root.glob("control_plane/training/*.py"), *edge]
    name = sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sortline" / f"benchmark-{name}"
    bundle = cache / "bundle"
    if not bundle.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch, console.status("training a model, once") as status:
            data, fresh = Path(scratch) / "data", Path(scratch) / "bundle"
            collect(LineConfig(lanes=2, seed=7), data, items=ITEMS)

            def say(stage: str, share: float) -> None:
                status.update(f"training a model, once (some minutes): {stage}, {share:.0%}")

            train(data, TrainSettings(name="benchmark", folds=2), fresh, progress=say)
            fresh.rename(bundle)
        for old in set(cache.parent.glob("benchmark-*")) - {cache}:
            shutil.rmtree(old)
    console.print(f"bundle: {bundle}", highlight=False)
    return bundle


def stages(figures: Figures, bundle: Path, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Returns the measurements by name, in the order of the run."""
    quick = options.quick
    soak_s = options.soak or (12.0 if quick else 600.0)
    return {
        "overhead": lambda: speed.overhead(figures, bundle, 150 if quick else 600),
        "plain": lambda: speed.plain_loop(figures, bundle, 90 if quick else 450),
        "tracking": lambda: tracking.stage(figures, 150 if quick else 900, options.peers),
        "saturation": lambda: speed.saturation(figures, bundle, 20 if quick else 150),
        "model": lambda: quantised.stage(figures, bundle, quick=quick),
        "routing": lambda: routing.stage(figures, bundle, 4.0 if quick else 60.0),
        "agent": lambda: agent.stage(figures, bundle, 6.0 if quick else 30.0, 1 if quick else 5),
        "gap": lambda: agent.gaps(figures, bundle, 2 if quick else 5),
        "soak": lambda: soak.stage(figures, bundle, soak_s),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="trained bundle; one is trained and kept when missing")
    parser.add_argument("--quick", action="store_true", help="under a minute with a bundle")
    parser.add_argument("--soak", type=float, default=0.0, metavar="S", help="seconds of the soak (600; quick 12)")
    parser.add_argument("--only", metavar="STAGE,...", default="", help="some of the stages")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="has the extra `bench` installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the plots as SVG")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    console = Console()
    figures = Figures(console)
    bundle = options.bundle or cached_bundle(console)
    chosen = stages(figures, bundle, options)
    names = options.only.split(",") if options.only else list(chosen)
    if unknown := set(names) - chosen.keys():
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
    started = time.monotonic()
    for name in names:
        begun = time.monotonic()
        chosen[name]()
        figures.data.setdefault("seconds", {})[name] = round(time.monotonic() - begun, 1)
    console.print(f"took {time.monotonic() - started:.0f} s: {figures.data['seconds']}", highlight=False)
    if options.json:
        figures.write(options.json, {"quick": options.quick, "bundle": str(bundle), "stages": names})
    if options.plots:
        figures.write_plots(options.plots)
    for line in figures.missed:
        console.print(f"[red]missed[/] {line}")
    return 1 if figures.missed else 0


if __name__ == "__main__":
    sys.exit(main())
