"""Parameters of a view and the names of what is measured on it, without OpenCV.

Apart from `preprocess` so that a process that only moves bundles (the agent's supervisor) need not load OpenCV.
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
"""Names of what `view_features` measures, in its order."""


class PreprocessSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides how pixels become a view (`preprocess.json`)."""

    schema_version: Literal[1] = 1
    view_px: Annotated[int, msgspec.Meta(ge=16, le=512)] = 64
    """Side of a view, pixels."""
    margin: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.04
    """Added on each side of the item's bounding square, as a share of that square's side."""
    max_views: Annotated[int, msgspec.Meta(ge=1, le=64)] = 6
    """Views judged of one item at most, spaced by roll."""
    channels: Literal["bgr"] = "bgr"
    backdrop_delta: Annotated[int, msgspec.Meta(ge=1, le=255)] = 28
    """Photographs only: a pixel this close (largest channel difference) to the border's colour, and connected
    with the border, is backdrop."""
