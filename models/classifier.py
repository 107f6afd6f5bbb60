"""Runs a bundle's graph: uint8 views in, probabilities out. The one door to ONNX Runtime, whose telemetry is off.

The same class judges in the training's parity check, in evaluation, in the agent's self-test and on the line.

The library's official Linux wheels from 1.29 on report to their vendor by default: at its first use it
writes a device id and a database of queued events under the user's cache folder, and a thread of its own resolves and
calls a collector. `ORT_DISABLE_TELEMETRY=1` is the full opt-out, read once when the library initialises; neither its
API nor a later change of the environment undoes what was sent before. The variable is therefore set here, before the
import, and the processes that this one starts inherit it; every other module takes `ort` from here.
"""

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# isort: split
import onnxruntime as ort

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.preprocess import View

__all__ = [
    "EMBEDDING",
    "PROBABILITIES",
    "SCALARS_INPUT",
    "VIEWS_INPUT",
    "VIEWS_PER_RUN",
    "Answer",
    "OnnxClassifier",
    "ort",
]
VIEWS_INPUT: Final = "views"
SCALARS_INPUT: Final = "scalars"
PROBABILITIES: Final = "probabilities"
EMBEDDING: Final = "embedding"
VIEWS_PER_RUN: Final = 2
"""Views per run and thread, unless the line has more lanes."""
MOST_VIEWS_PER_RUN: Final = 4
"""The same for lines of four lanes and more. A view costs 8 % less in a run of four than in a run of two, and each view
of the largest run costs 2 MB of memory for good (measured with the usual graph)."""
_KEYWORDS: Final = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a model on some views.

    Attributes:
        probabilities: float32 (N, C).
        embedding: float32 (N, E): coordinates for drift monitoring.
    """

    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]


class OnnxClassifier:
    """One loaded graph.

    Args:
        graph: Serialised ONNX model.
        threads: Intra-op threads; 1 keeps latency steady beside a camera.

    Raises:
        BundleError: `model.unloadable`, `model.wrong_signature`.
    """

    def __init__(self, graph: bytes, *, threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Without the arena every run maps its memory from the system again, which doubles the time of a run under
        # the fixed allocator thresholds of a line. The arena keeps what the largest run needed: runs stay small.
        options.enable_cpu_mem_arena = True
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types from its C++ side
            raise BundleError(
                "model.unloadable",
                "ONNX Runtime cannot load model.onnx.",
                expected=f"a graph for ONNX Runtime {ort.__version__}",
                got=str(error)[:300],
            ) from error
        self._threads = threads
        self.views_per_run = VIEWS_PER_RUN * threads
        """A larger batch is judged in several runs, one after the other."""
        self.view_px, self.scalars = self._check_inputs()
        self.classes, self.embedding_size = self._check_outputs()

    def _check_inputs(self) -> tuple[int, int]:
        """Returns the side of a view and the number of scalars; refuses any other signature."""
        inputs = {i.name: (_KEYWORDS.get(i.type, i.type), list(i.shape)) for i in self._session.get_inputs()}
        kind, shape = inputs.pop(VIEWS_INPUT, ("nothing", []))
        scalars_kind, scalars_shape = inputs.pop(SCALARS_INPUT, ("float32", [None, 0]))
        views_ok = kind == "uint8" and len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
        scalars_ok = scalars_kind == "float32" and len(scalars_shape) == 2 and isinstance(scalars_shape[1], int)
        if not views_ok or not isinstance(shape[1], int) or not scalars_ok or inputs:
            raise BundleError(
                "model.wrong_signature",
                "The inputs of the graph are not those of a bundle.",
                expected="views uint8 [N, S, S, 3] and optionally scalars float32 [N, K]",
                got={i.name: (i.type, i.shape) for i in self._session.get_inputs()},
            )
        return shape[1], scalars_shape[1]

    def _check_outputs(self) -> tuple[int, int]:
        outputs = {o.name: (o.type, list(o.shape)) for o in self._session.get_outputs()}
        kind, shape = outputs.get(PROBABILITIES, ("nothing", []))
        embedding_kind, embedding_shape = outputs.get(EMBEDDING, ("tensor(float)", [None, 0]))
        well_typed = kind == embedding_kind == "tensor(float)" and len(shape) == len(embedding_shape) == 2
        if not well_typed or not isinstance(shape[1], int) or not isinstance(embedding_shape[1], int):
            raise BundleError(
                "model.wrong_signature",
                "The outputs of the graph are not those of a bundle.",
                expected="probabilities float32 [N, C] and optionally embedding float32 [N, E], C and E fixed",
                got=outputs,
            )
        return shape[1], embedding_shape[1]

    def classify(
        self, views: "NDArray[np.uint8] | Sequence[View]", scalars: NDArray[np.float32] | None = None
    ) -> Answer:
        """Judges N views.

        Args:
            views: uint8 (N, S, S, 3) BGR, N >= 1, or a sequence of views.
            scalars: float32 (N, K), NaN where unknown; None = all unknown.

        Raises:
            BundleError: `model.failed` when the graph breaks on these views, `model.not_finite`.
        """
        batch = np.ascontiguousarray(views, np.uint8)
        feed: dict[str, NDArray[np.generic]] = {VIEWS_INPUT: batch}
        if self.scalars:
            unknown = np.full((len(batch), self.scalars), np.nan, np.float32)
            feed[SCALARS_INPUT] = unknown if scalars is None else scalars.astype(np.float32, copy=False)
        try:
            answers = self._run(feed, len(batch))
        except Exception as error:  # as above: unrelated types from the C++ side
            raise BundleError(
                "model.failed",
                "The graph failed on a batch.",
                expected=f"views uint8 (N, {self.view_px}, {self.view_px}, 3)",
                got=f"{batch.shape}: {str(error)[:200]}",
            ) from error
        probabilities = answers[0]
        if not np.isfinite(probabilities).all():
            raise BundleError("model.not_finite", "The graph answered NaN or infinity.", expected="finite", got="nan")
        embedding = answers[1] if self.embedding_size else np.zeros((len(batch), 0), np.float32)
        return Answer(probabilities, embedding)

    def _run(self, feed: dict[str, NDArray[np.generic]], count: int) -> list[NDArray[np.float32]]:
        """Runs all rows, a few at a time."""
        wanted = [PROBABILITIES, EMBEDDING] if self.embedding_size else [PROBABILITIES]
        if count <= self.views_per_run:
            return list(self._session.run(wanted, feed))
        parts = [
            self._session.run(wanted, {name: rows[at : at + self.views_per_run] for name, rows in feed.items()})
            for at in range(0, count, self.views_per_run)
        ]
        return [np.concatenate(rows) for rows in zip(*parts, strict=True)]

    def serve_lanes(self, lanes: int) -> None:
        """Judges as many views in one run as a line of so many lanes usually has in a frame, at most four a thread."""
        wanted = min(max(lanes, VIEWS_PER_RUN), MOST_VIEWS_PER_RUN) * self._threads
        if wanted != self.views_per_run:
            self.views_per_run = wanted
            self.warm_up(wanted)

    def warm_up(self, batch: int = 8) -> float:
        """Runs blank batches until the allocator has settled; returns milliseconds of the last one."""
        blank = np.zeros((batch, self.view_px, self.view_px, 3), np.uint8)
        elapsed_ms = 0.0
        for size in (1, batch, batch):
            started = time.perf_counter()
            self.classify(blank[:size])
            elapsed_ms = (time.perf_counter() - started) * 1000.0
        return elapsed_ms

    @property
    def metadata(self) -> dict[str, str]:
        """The graph's own `metadata_props`."""
        return dict(self._session.get_modelmeta().custom_metadata_map)
