"""Loops over the frames of a camera until it ends: here commands wait, notice the end and survive pauses."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

from edge_agent.interfaces import Frame, FrameSource
from models.errors import CameraError

log = logging.getLogger("sortline.camera")
_READ_S: Final = 0.25
"""Longest wait of one read; a command can be interrupted so often."""
_REOPEN_S: Final = 1.0
"""Pause before a camera that could not be opened is tried again."""
PATIENCE_S: Final = 30.0
"""Commands wait so long for a live camera that has stopped: a camera restarts, or a network is switched, in less."""
_RECOVERS: Final = {"camera.stalled", "camera.absent", "camera.failed"}
"""Errors after which the next read of a live camera opens it again."""


def frames(
    source: FrameSource,
    *,
    seconds: float = 0.0,
    limit: int | None = None,
    patience_s: float = 0.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Frame]:
    """Yields frames until the camera ends, the time is over or the number is reached. The caller closes the camera.

    Frames of another size than the line's are left out; the camera counts them.

    Args:
        source: The camera.
        seconds: Duration in the camera's time; the frame that reaches it is the last one. 0 = no limit.
        limit: Largest number of frames; None = no limit.
        patience_s: Time for which a camera that fails or is silent is waited for, once it has given a frame;
            0 = an error is raised at once, and silence has no limit.
        sleep: Function that waits before a camera is opened again.

    Raises:
        CameraError: The camera fails, is silent for too long (`camera.stalled`), or gives no frame of the right size
            (`camera.wrong_size`).
    """
    first_s: float | None = None
    given, waited_s = 0, 0.0
    refused: CameraError | None = None
    while limit is None or given < limit:
        problem = CameraError("camera.stalled", "The camera gives no frames.", expected="a frame", got="none")
        try:
            frame = source.read(_READ_S)
        except CameraError as error:
            if error.code == "camera.ended" and (given or refused is None):
                return
            frame, problem = None, refused if error.code == "camera.ended" and refused is not None else error
            refused = problem if problem.code == "camera.wrong_size" else refused
            if error.code == "camera.ended" or not _may_go_on(problem, given, patience_s):
                raise problem from None
            if problem.code in {"camera.absent", "camera.failed"}:
                sleep(_REOPEN_S)
                waited_s += _REOPEN_S
        if frame is None:
            waited_s += _READ_S
            if patience_s and waited_s >= patience_s:
                raise problem
            continue
        waited_s = 0.0
        first_s = frame.captured_s if first_s is None else first_s
        given += 1
        yield frame
        if seconds and frame.captured_s - first_s >= seconds:
            return


def _may_go_on(problem: CameraError, given: int, patience_s: float) -> bool:
    """Returns whether the next read may give a frame again, and logs a pause."""
    if problem.code == "camera.wrong_size":
        return True
    if not patience_s or problem.code not in _RECOVERS or (not given and problem.code != "camera.stalled"):
        return False
    log.warning("%s: %s", problem.code, problem)
    return True
