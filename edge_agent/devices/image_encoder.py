"""A belt position measured from the picture, for lines without an encoder."""

from dataclasses import dataclass, replace

import numpy as np

from edge_agent.interfaces import Frame, FrameSource
from edge_agent.vision.belt_motion import (
    BELT_LOOKS,
    LEAST_SEEN,
    MISFIT,
    OVERLAP,
    BeltView,
    Floats,
    best_shift,
    learn_belt,
    moved,
    shrink_of,
    shrunk,
)
from models.errors import CameraError, InputError


@dataclass(frozen=True, slots=True)
class _Motion:
    """What is known of the belt at one moment; replaced as a whole, so that any thread may read it."""

    at_s: float
    position_mm: float
    speed_mm_s: float


class ImageEncoder:
    """Belt position from the pictures of a line without encoder; feed it every frame, in order.

    Each picture is slid over a reference picture (not over the last one: errors then add up per reference, not per
    frame) near where the speed predicts it, and over the last one when it is not found there. While there is
    nothing to see it runs on at its last speed, for `hold_s` at most, and counts that.

    Measured on the simulated line (two lanes, 1000 mm/s, 0.625 mm/px, 30 frames/s) against the true belt, over
    57 m with a ramp to 60 %, a stop of 4 s, 120 % and back, five worlds: with 9 items per second and lane the error
    at the end is 7 to 12 mm (0.01 to 0.02 %), and over 0.7 s, the way from camera to outlet, below 0.9 mm for 99 %
    of the frames. It lives from items in sight: with 3 items per second and lane 8 to 11 mm over 0.7 s, with 1 (40 %
    of the frames show none) 11 to 20 mm, and 0.1 to 0.2 % at the end. The speed is read to 0.1 %, within a ramp to
    6 %. Frames dropped (20 %) and torn (5 %) cost 27 mm once in 30 s. Ejections by it alone, through a slower belt
    and a stop, hit all of 101 (0.9 mm/px). A frame of 640 x 340 px takes about 1.5 ms.

    Args:
        mm_per_px: Of the camera.
        nominal_mm_s: Speed until the belt is known and the first step is measured.
        right_to_left: Items travel towards column 0; the position still grows.
        hold_s: How long it believes its last speed without seeing an item; then it says that the belt stands.
        belt: The empty belt (`learn_belt`); without it the first moving pictures are used to learn it.
    """

    def __init__(
        self,
        mm_per_px: float,
        *,
        nominal_mm_s: float = 0.0,
        right_to_left: bool = False,
        hold_s: float = 3.0,
        belt: Floats | None = None,
    ) -> None:
        if not (mm_per_px > 0.0 and hold_s >= 0.0 and nominal_mm_s >= 0.0):
            raise InputError(
                "encoder.bad_setting",
                "The image encoder cannot work like this.",
                expected="mm_per_px > 0, hold_s >= 0, nominal_mm_s >= 0",
                got=(mm_per_px, hold_s, nominal_mm_s),
            )
        self._mm_per_px, self._mirror, self._hold_s = mm_per_px, right_to_left, hold_s
        self._view = None if belt is None else BeltView(belt)
        self._looks: list[Floats] = []
        self._motion: _Motion | None = None
        self._nominal_mm_s = nominal_mm_s
        self._shape: tuple[int, ...] = ()
        self._reference: tuple[Floats, float] | None = None
        self._last: Floats | None = None
        self._blind_s = 0.0
        self.frames = 0
        self.blind_frames = 0
        """Frames whose motion could not be read; the last speed was kept, or the bound was reached."""
        self.held_mm = 0.0
        """Distance that was assumed, not seen."""

    def position_mm(self, at_s: float) -> float:
        """See `Encoder`; 0 at the first frame. Extrapolates by the last speed, for `hold_s` at most."""
        motion = self._motion
        if motion is None:
            return 0.0
        return motion.position_mm + motion.speed_mm_s * min(max(at_s - motion.at_s, -self._hold_s), self._hold_s)

    def speed_mm_s(self) -> float:
        """See `Encoder`."""
        return 0.0 if self._motion is None else self._motion.speed_mm_s

    def feed(self, frame: Frame) -> float:
        """Takes the next frame and returns the belt position at its exposure, millimetres.

        Raises:
            CameraError: `camera.wrong_size` when the frame has another size than the first.
        """
        if self._shape and frame.image.shape != self._shape:
            raise CameraError(
                "camera.wrong_size", "A frame changed its size.", expected=self._shape, got=frame.image.shape
            )
        self._shape = frame.image.shape
        self.frames += 1
        shrink = shrink_of(frame.image.shape[1])
        column_mm = self._mm_per_px * shrink
        seen = self._silhouettes(shrunk(frame.image, shrink))
        before = self._motion
        if before is None:
            self._motion = _Motion(frame.captured_s, 0.0, self._nominal_mm_s)
            self._refer(seen, 0.0)
            return 0.0
        elapsed_s = max(frame.captured_s - before.at_s, 0.0)
        position = None
        if seen is not None and elapsed_s > 0.0:
            position = self._measure(seen, before, before.speed_mm_s * elapsed_s, column_mm)
        if position is None:
            self._motion = self._held(before, frame.captured_s, elapsed_s)
        else:
            self._blind_s = 0.0
            speed = (position - before.position_mm) / elapsed_s
            speed = _smoothed(before.speed_mm_s, speed, elapsed_s, column_mm)
            self._motion = _Motion(frame.captured_s, position, speed)
        self._renew(seen, self._motion.position_mm, column_mm, measured=position is not None)
        return self._motion.position_mm

    def _silhouettes(self, small: Floats) -> Floats | None:
        """None until the belt is known."""
        if self._mirror:
            small = np.ascontiguousarray(small[:, ::-1])
        if self._view is None:
            if not self._looks or moved(self._looks[-1], small):
                self._looks.append(small)
            if len(self._looks) < BELT_LOOKS:
                return None
            self._view = BeltView(learn_belt(self._looks))
            self._looks.clear()
        return self._view.silhouettes(small)

    def _measure(self, seen: Floats, before: _Motion, step_mm: float, column_mm: float) -> float | None:
        """Belt position of these silhouettes, or None."""
        if self._reference is not None:
            reference, at_mm = self._reference
            expected = (before.position_mm + step_mm - at_mm) / column_mm
            reach = 3.0 + 0.3 * step_mm / column_mm
            match = best_shift(reference, seen, int(expected - reach), int(np.ceil(expected + reach)))
            if match is not None and match[1] < MISFIT and abs(match[0] - expected) < reach:
                return max(at_mm + match[0] * column_mm, before.position_mm)
        if self._last is not None:
            match = best_shift(self._last, seen, -1, int((1.0 - OVERLAP) * seen.shape[1]))
            if match is not None and match[1] < MISFIT:
                return before.position_mm + max(match[0], 0.0) * column_mm
        return None

    def _held(self, before: _Motion, at_s: float, elapsed_s: float) -> _Motion:
        self.blind_frames += 1
        left_s = min(max(self._hold_s - self._blind_s, 0.0), elapsed_s)
        self._blind_s += elapsed_s
        ran_mm = before.speed_mm_s * left_s
        self.held_mm += ran_mm
        return _Motion(at_s, before.position_mm + ran_mm, before.speed_mm_s if left_s > 0.0 else 0.0)

    def _renew(self, seen: Floats | None, position_mm: float, column_mm: float, *, measured: bool) -> None:
        """A new reference once the old one has left half of the picture, or nothing fits it any more."""
        if self._reference is not None:
            gone = (position_mm - self._reference[1]) / column_mm
            if gone > 0.5 * self._reference[0].shape[1] or (not measured and self._blind_s > 0.2):
                self._reference = None
        self._last = seen
        if self._reference is None:
            self._refer(seen, position_mm)

    def _refer(self, seen: Floats | None, position_mm: float) -> None:
        if seen is not None and float(seen.mean()) > LEAST_SEEN:
            self._reference = (seen, position_mm)
        self._last = seen


class ImageEncodedCamera:
    """A camera whose frames carry the belt position that its own pictures tell.

    Args:
        source: The camera; its own belt positions are replaced.
        encoder: Gets every frame that is read, and answers for the belt in between.
    """

    def __init__(self, source: FrameSource, encoder: ImageEncoder) -> None:
        self.source, self.encoder = source, encoder

    def read(self, timeout_s: float) -> Frame | None:
        """See `FrameSource.read`."""
        frame = self.source.read(timeout_s)
        return None if frame is None else replace(frame, belt_mm=self.encoder.feed(frame))

    @property
    def frames_dropped(self) -> int:
        """Of the camera."""
        return int(getattr(self.source, "frames_dropped", 0))

    def close(self) -> None:
        """Closes the camera."""
        self.source.close()


def _smoothed(before_mm_s: float, now_mm_s: float, elapsed_s: float, column_mm: float) -> float:
    """Slow for what may be reading noise, quick for a ramp, at once for a stop."""
    if now_mm_s * elapsed_s < 0.02 * column_mm:
        return 0.0
    change = now_mm_s - before_mm_s
    noise = max(0.1 * column_mm / elapsed_s, 0.02 * before_mm_s)
    return before_mm_s + (0.15 if abs(change) < noise else 0.6) * change
