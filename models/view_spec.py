"""Parameters of a view and the names of its measurements, without OpenCV.

The module is separate from `preprocess` so that a process that only moves bundles (the supervisor of an agent) does
not load OpenCV.
"""

from typing import Annotated, Final, Literal

import msgspec

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
