"""Golden views: inputs with the outputs that every device must reproduce within a tolerance."""

import io
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError

if TYPE_CHECKING:  # the supervisor does not load ONNX Runtime
    from models.classifier import OnnxClassifier


MAX_GOLDEN_VIEWS: Final = 256
GOLDEN: Final = "golden.npz"


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    """Views with the outputs of the training machine, by which a device shows that it computes the same.

    Attributes:
        views: uint8 (G, S, S, 3) BGR.
        scalars: float32 (G, K).
        probabilities: float32 (G, C).
        embedding: float32 (G, E).
        tolerance: Largest difference of a probability that is accepted.
    """

    views: NDArray[np.uint8]
    scalars: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]
    tolerance: float

    def encoded(self) -> bytes:
        """Returns `golden.npz`, byte for byte the same for the same content."""
        stream = io.BytesIO()
        np.savez_compressed(
            stream,
            views=self.views,
            scalars=self.scalars,
            probabilities=self.probabilities,
            embedding=self.embedding,
            tolerance=np.float64(self.tolerance),
        )
        return stream.getvalue()

    def check(self, classifier: "OnnxClassifier") -> float:
        """Judges the golden views on this machine.

        Returns:
            The largest difference of a probability.

        Raises:
            BundleError: `golden.mismatch`; the bundle must be refused.
        """
        answer = classifier.classify(self.views, self.scalars if self.scalars.shape[1] else None)
        if answer.probabilities.shape != self.probabilities.shape:
            raise BundleError(
                "golden.mismatch",
                "The golden views belong to another model.",
                expected=self.probabilities.shape,
                got=answer.probabilities.shape,
            )
        difference = float(np.abs(answer.probabilities - self.probabilities).max())
        if difference > self.tolerance:
            raise BundleError(
                "golden.mismatch",
                "The golden views do not reproduce on this machine.",
                expected=f"probabilities within {self.tolerance:g}",
                got=f"{difference:g}",
            )
        return difference
