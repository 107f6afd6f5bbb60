"""The default model in float32 and in int8: time per view, and what the smaller numbers cost in accuracy."""

import importlib.util
from pathlib import Path

from benchmarks.figures import Figures

MODULE = "control_plane.training.quantise"


def stage(figures: Figures, _bundle: Path, *, quick: bool) -> None:  # noqa: ARG001
    """Skips clearly where there is no quantiser."""
    if importlib.util.find_spec(MODULE) is None:
        figures.skip("float32 against int8", f"there is no {MODULE} here")
