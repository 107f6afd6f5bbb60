"""Judges items with one bundle: crops views, runs the model on a batch, fuses the views and decides.

A `Judge` is one loaded bundle, and a new bundle is a new judge. An item belongs to the judge that took its first view
until its verdict, so no item is judged twice or by a mixture of two bundles.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.interfaces import Image
from edge_agent.vision.segmentation import Detection, Locator
from edge_agent.vision.tracking import Track
from models.bundle import read_bundle
from models.classifier import OnnxClassifier
from models.errors import InputError
from models.preprocess import features_of_views, make_view
from models.profile import item_features
from models.recipe import Verdict


@dataclass(frozen=True, slots=True)
class Judged:
    """One item with its verdict and the features that monitoring counts."""

    track: Track
    verdict: Verdict
    features: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"


class Judge:
    """One verified bundle, loaded and warm.

    Args:
        directory: The bundle; verified again while it is read.
        digest: Digest the bundle must have; None accepts any.
        threads: Number of threads ONNX Runtime uses.
        clock: Clock in seconds with which the model is timed.

    Raises:
        BundleError: The bundle is not usable on this machine.
    """

    def __init__(
        self,
        directory: Path,
        *,
        digest: str | None = None,
        threads: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        bundle = read_bundle(directory, digest=digest)
        self.digest = bundle.digest
        self.preprocess, self.recipe, self.profile = bundle.preprocess, bundle.recipe, bundle.profile
        self.classifier = OnnxClassifier(bundle.model, threads=threads)
        self.golden_difference = bundle.golden.check(self.classifier)
        self._clock = clock
        self.classifier.warm_up()

    def take_view(self, locator: Locator, image: Image, track: Track, place: Detection) -> bool:
        """Cuts a view of the item and returns whether the crop shows anything."""
        crop, mask = locator.mask(image, place)
        try:
            track.views.append(make_view(crop, mask, self.preprocess))
        except InputError:
            return False
        return True

    @property
    def views_per_run(self) -> int:
        """How many views one run of the model judges; a larger batch takes several runs."""
        return self.classifier.views_per_run

    def serve_lanes(self, lanes: int) -> None:
        """Prepares for a line of so many lanes; see `OnnxClassifier.serve_lanes`. Costs nothing the second time."""
        self.classifier.serve_lanes(lanes)

    def infer(self, tracks: list[Track]) -> float:
        """Judges the newest view of each track in one batch, with the scalars that the bundle declares.

        Returns:
            The time the model took, milliseconds.

        Raises:
            BundleError: `model.failed`, `model.not_finite`.
        """
        started = self._clock()
        scalars = None
        if self.preprocess.scalars:
            scalars = np.stack([self.preprocess.scalar_row(track.scalars) for track in tracks])
        answer = self.classifier.classify([track.views[-1] for track in tracks], scalars)
        elapsed_ms = (self._clock() - started) * 1000.0
        for row, track in enumerate(tracks):
            track.probabilities.append(answer.probabilities[row])
            track.embeddings.append(answer.embedding[row])
        return elapsed_ms

    def decide(self, track: Track, variety: str, lot: str) -> Verdict:
        """Fuses the item's views into its verdict; needs at least one judged view."""
        return self.recipe.decide(np.stack(track.probabilities), variety, lot)

    def measure(self, track: Track) -> None:
        """Measures the judged views that were not measured yet, all in one batch; monitoring needs it, no verdict does.

        `Track.features` holds float32 (9,) of each judged view afterwards.
        """
        views = track.views[len(track.features) : len(track.probabilities)]
        if views:
            track.features.extend(features_of_views(views))

    def describe(self, track: Track, verdict: Verdict) -> Judged:
        """Adds to a verdict the features that monitoring counts."""
        self.measure(track)
        features = item_features(
            np.stack(track.features), np.stack(track.embeddings), verdict.probabilities, verdict.defect
        )
        return Judged(track, verdict, features)
