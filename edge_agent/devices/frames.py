"""Loops over the frames of a camera until it ends: the one place where commands wait for a frame and notice the end."""

from collections.abc import Iterator
from typing import Final

from edge_agent.interfaces import Frame, FrameSource
from models.errors import CameraError

_READ_S: Final = 0.25
"""Longest wait of one read; a command can be interrupted so often."""


def frames(
    source: FrameSource, *, seconds: float = 0.0, limit: int | None = None, silent_s: float | None = None
) -> Iterator[Frame]:
    """Yields frames until the camera ends, the time is over or the number is reached. The caller closes the camera.

    Args:
        source: The camera.
        seconds: Duration in the camera's time; the frame that reaches it is the last one. 0 = no limit.
        limit: Largest number of frames; None = no limit.
        silent_s: Time without a frame after which the camera counts as silent; None = it is waited for.

    Raises:
        CameraError: The camera fails, or is silent (`camera.stalled`).
    """
    first_s: float | None = None
    given, waited_s = 0, 0.0
    while limit is None or given < limit:
        try:
            frame = source.read(_READ_S)
        except CameraError as error:
            if error.code == "camera.ended":
                return
            raise
        if frame is None:
            waited_s += _READ_S
            if silent_s is not None and waited_s >= silent_s:
                raise CameraError(
                    "camera.stalled",
                    "The camera gives no frames.",
                    expected=f"a frame within {silent_s:g} s",
                    got="none",
                )
            continue
        waited_s = 0.0
        first_s = frame.captured_s if first_s is None else first_s
        given += 1
        yield frame
        if seconds and frame.captured_s - first_s >= seconds:
            return
