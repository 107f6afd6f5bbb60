"""Parameters of a view and the names of its measurements, without OpenCV.

The module is separate from `preprocess` so that a process that only moves bundles (the supervisor of an agent) does
not load OpenCV.
"""

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError

WEIGHT: Final = "weight_g"
LENGTH: Final = "length_mm"
ScalarName = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[a-z][a-z0-9_]*\Z")]
VIEW_FEATURES: Final = (
    "lightness",
    "contrast",
    "sharpness",
    "highlight",
    "dark_share",
    "area_share",
    "aspect",
    "centre_x",
    "centre_y",
)
"""Names of the measurements of `view_features`, in its order."""


class PreprocessSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All parameters of the step from pixels to a view (`preprocess.json`)."""

    schema_version: Literal[1] = 1
    view_px: Annotated[int, msgspec.Meta(ge=16, le=512)] = 64
    """Side of a view, in pixels."""
    margin: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.04
    """Margin on each side of the bounding square of the item, as a share of the side of that square."""
    max_views: Annotated[int, msgspec.Meta(ge=1, le=64)] = 6
    """Largest number of views of an item that are judged, spaced by roll."""
    channels: Literal["bgr"] = "bgr"
    backdrop_delta: Annotated[int, msgspec.Meta(ge=1, le=255)] = 28
    """Photographs only: a pixel this close (largest channel difference) to the border's colour, and connected
    with the border, is backdrop."""
    scalars: Annotated[tuple[ScalarName, ...], msgspec.Meta(max_length=16)] = ()
    """Names of the columns of the graph's input `scalars`, in their order; empty = the graph has no such input.

    The unit is the end of the name. A line gives `weight_g` (load cell) and `length_mm` (largest extent along the belt
    in the picture); a name it does not know, and a value it does not have, is NaN."""

    def check(self) -> None:
        """Refuses names that occur twice.

        Raises:
            BundleError: `preprocess.inconsistent`.
        """
        if len(set(self.scalars)) != len(self.scalars):
            raise BundleError(
                "preprocess.inconsistent",
                "preprocess.json names a scalar twice.",
                expected="different names",
                got=list(self.scalars),
            )

    def encoded(self) -> bytes:
        """Returns `preprocess.json`; without scalars it has the bytes that writers before 0.2 wrote."""
        fields = msgspec.to_builtins(self)
        if not self.scalars:
            del fields["scalars"]
        return msgspec.json.encode(fields)

    def scalar_row(self, known: Mapping[str, float | None]) -> NDArray[np.float32]:
        """Returns float32 (K,): the values of one item in the order of `scalars`, NaN where unknown."""
        values = (known.get(name) for name in self.scalars)
        return np.array([np.nan if value is None else value for value in values], np.float32)
