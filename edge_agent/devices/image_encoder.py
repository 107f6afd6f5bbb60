"""A belt position measured from the picture, for lines without an encoder."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from edge_agent.interfaces import Frame, FrameSource, Image
from edge_agent.vision.belt_motion import (
    BELT_LOOKS,
    LEAST_SEEN,
    MISFIT,
    OVERLAP,
    BeltView,
    Floats,
    learn_belt,
    mismatch,
    moved,
    shrink_of,
    shrunk,
    vertex,
)
from models.errors import CameraError, InputError

LEARNING_FRAMES: Final = 240
"""First frames of a recording from which the empty belt is learnt ahead."""
_FIRST_LOOKS: Final = 8
"""Pictures from which the belt is learnt at first; it is learnt again from twice as many until there are enough."""
_BACK: Final = 6
"""Columns by which a picture may move back: a camera in the hand trembles, a belt does not run back."""
_SURPRISE: Final = 0.12
"""Mismatch that an unexpected shift may cost more than an expected one before it is preferred."""
_STEP_S: Final = 0.5
"""A mean speed is taken over at least so long; pictures that come in jerks change six times a second or more."""
_STANDS_S: Final = 0.5
"""A belt in jerky pictures that shows no movement for so long stands."""
_JERKS: Final = 3
"""So many starts within two seconds, each after a standstill shorter than `_STANDS_S`, are jerky pictures."""
_JERKY_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class _Motion:
    """The state of the belt at one moment; replaced as a whole, so that any thread may read it."""

    at_s: float
    position_mm: float
    speed_mm_s: float


class ImageEncoder:
    """Measures the belt position from the pictures of a line without encoder; takes every frame, in order.

    The silhouettes of the items are slid over those of the last picture, over every shift at once; expected shifts
    (none, the last speed, the mean speed since the last movement) are preferred where several fit. The shift is then
    refined on a reference picture, so that errors add up per reference, not per frame. The position is that of the
    picture: a camera that trembles moves it too, which keeps the coordinate of each item the same. While there is
    nothing to see it continues at its last speed, for `hold_s` at most, and counts that.

    Figures of its accuracy and cost: `python -m benchmarks.encoderless`.

    Args:
        mm_per_px: Scale of the camera.
        nominal_mm_s: Speed until the belt is known and the first step is measured.
        hold_s: Time for which the last speed is assumed without an item in sight; then the belt counts as standing.
        belt: The empty belt (`belt_of`); without it the first moving pictures are used to learn it.
    """

    def __init__(
        self, mm_per_px: float, *, nominal_mm_s: float = 0.0, hold_s: float = 3.0, belt: Floats | None = None
    ) -> None:
        if not (mm_per_px > 0.0 and hold_s >= 0.0 and nominal_mm_s >= 0.0):
            raise InputError(
                "encoder.bad_setting",
                "The image encoder cannot work like this.",
                expected="mm_per_px > 0, hold_s >= 0, nominal_mm_s >= 0",
                got=(mm_per_px, hold_s, nominal_mm_s),
            )
        self._mm_per_px, self._hold_s = mm_per_px, hold_s
        self._view = None if belt is None else BeltView(belt)
        self._looks: list[Floats] = []
        self._learning = belt is None
        self._nominal_mm_s = nominal_mm_s
        self._motion: _Motion | None = None
        self._shape: tuple[int, ...] = ()
        self._reference: tuple[Floats, float] | None = None
        self._last: Floats | None = None
        self._path: deque[tuple[float, float]] = deque(maxlen=512)
        """Time and position of the last frames, over which the mean speed is taken."""
        self._moved_s = 0.0
        """Time of the last picture that had moved."""
        self._starts: deque[float] = deque(maxlen=_JERKS)
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
            self._moved_s = frame.captured_s
            self._motion = _Motion(frame.captured_s, 0.0, self._nominal_mm_s)
            self._refer(seen, 0.0)
            return 0.0
        elapsed_s = max(frame.captured_s - before.at_s, 0.0)
        position = None if seen is None else self._measure(seen, before, frame.captured_s, column_mm)
        if position is None:
            self._motion = self._held(before, frame.captured_s, elapsed_s)
        else:
            self._blind_s = 0.0
            speed = self._speed(before, position, frame.captured_s, column_mm)
            self._motion = _Motion(max(frame.captured_s, before.at_s), position, speed)
        self._path.append((self._motion.at_s, self._motion.position_mm))
        self._renew(seen, self._motion.position_mm, column_mm, measured=position is not None)
        return self._motion.position_mm

    def _silhouettes(self, small: Floats) -> Floats | None:
        """Returns the items' silhouettes, or None until the belt is known."""
        if self._learning and (not self._looks or moved(self._looks[-1], small)):
            self._looks.append(small)
            count = len(self._looks)
            if count >= _FIRST_LOOKS and (count & (count - 1)) == 0:
                self._view = BeltView(learn_belt(self._looks))
                # Silhouettes of two different belts do not fit each other.
                self._last = self._reference = None
            if count >= BELT_LOOKS:
                self._learning = False
                self._looks.clear()
        return None if self._view is None else self._view.silhouettes(small)

    # -- one step -----------------------------------------------------------------------------------------------

    def _measure(self, seen: Floats, before: _Motion, at_s: float, column_mm: float) -> float | None:
        """Returns the belt position of these silhouettes, or None when they fit nothing."""
        if self._last is not None:
            shift = self._shift(seen, before, at_s, column_mm)
            if shift is None:
                return None
            position = before.position_mm + shift * column_mm
        elif self._reference is not None:
            position = before.position_mm + before.speed_mm_s * max(at_s - before.at_s, 0.0)
        else:
            return None
        return self._refined(seen, position, column_mm, found=self._last is not None)

    def _shift(self, seen: Floats, before: _Motion, at_s: float, column_mm: float) -> float | None:
        """Returns the shift since the last picture, columns, over the whole range of possible ones."""
        last = self._last
        assert last is not None  # noqa: S101  checked by the only caller
        shifts = range(-_BACK, int((1.0 - OVERLAP) * seen.shape[1]) + 1)
        fits = mismatch(last, seen, shifts)
        expected = (
            0.0,
            before.speed_mm_s * (at_s - before.at_s) / column_mm,
            self._mean_mm_s(at_s) * (at_s - self._moved_s) / column_mm,
        )
        columns = np.asarray(shifts, np.float64)
        surprise = np.min([np.minimum(((columns - e) / max(2.5, 0.35 * e)) ** 2, 1.0) for e in expected], axis=0)
        best = int(np.argmin(np.where(fits < MISFIT, fits + _SURPRISE * surprise, np.inf)))
        return float(columns[best]) + vertex(fits, best) if fits[best] < MISFIT else None

    def _refined(self, seen: Floats, position_mm: float, column_mm: float, *, found: bool) -> float | None:
        """Returns the position by the reference picture near `position_mm`, else that position if it was `found`."""
        if self._reference is not None:
            reference, at_mm = self._reference
            expected = (position_mm - at_mm) / column_mm
            low, high = int(np.floor(expected - 3.0)), int(np.ceil(expected + 3.0))
            fits = mismatch(reference, seen, range(low, high + 1))
            best = int(fits.argmin())
            if fits[best] < MISFIT and 0 < best < high - low:
                return at_mm + (low + best + vertex(fits, best)) * column_mm
        return position_mm if found else None

    # -- speed --------------------------------------------------------------------------------------------------

    def _speed(self, before: _Motion, position_mm: float, at_s: float, column_mm: float) -> float:
        """Returns the speed after a step to this position, and notes standstills and starts."""
        elapsed_s, step_mm = at_s - before.at_s, position_mm - before.position_mm
        if elapsed_s <= 0.0:
            return before.speed_mm_s
        stood_s = at_s - self._moved_s
        if abs(step_mm) > 0.5 * column_mm:
            if 1.5 * elapsed_s < stood_s < _STANDS_S:
                self._starts.append(at_s)
            self._moved_s = at_s
        jerky = len(self._starts) == _JERKS and at_s - self._starts[0] <= _JERKY_S
        if jerky:
            return max(self._mean_mm_s(at_s), 0.0) if stood_s < _STANDS_S else 0.0
        return _smoothed(before.speed_mm_s, step_mm / elapsed_s, elapsed_s, column_mm)

    def _mean_mm_s(self, at_s: float) -> float:
        """Returns the mean speed over the last movements, the nominal one before there are any."""
        while len(self._path) > 2 and at_s - self._path[1][0] >= _STEP_S:
            self._path.popleft()
        if not self._path or self._path[-1][0] - self._path[0][0] < 0.5 * _STEP_S:
            return self._motion.speed_mm_s if self._motion is not None else self._nominal_mm_s
        (first_s, first_mm), (last_s, last_mm) = self._path[0], self._path[-1]
        return (last_mm - first_mm) / (last_s - first_s)

    def _held(self, before: _Motion, at_s: float, elapsed_s: float) -> _Motion:
        """Returns the motion at the last speed, until the bound is reached."""
        self.blind_frames += 1
        left_s = min(max(self._hold_s - self._blind_s, 0.0), elapsed_s)
        self._blind_s += elapsed_s
        ran_mm = before.speed_mm_s * left_s
        self.held_mm += ran_mm
        return _Motion(max(at_s, before.at_s), before.position_mm + ran_mm, before.speed_mm_s if left_s > 0.0 else 0.0)

    # -- reference ----------------------------------------------------------------------------------------------

    def _renew(self, seen: Floats | None, position_mm: float, column_mm: float, *, measured: bool) -> None:
        """Takes a new reference once the old one has left half of the picture, or nothing fits it any more."""
        if self._reference is not None:
            gone = (position_mm - self._reference[1]) / column_mm
            if gone > 0.5 * self._reference[0].shape[1] or (not measured and self._blind_s > 0.2):
                self._reference = None
        if self._reference is None:
            self._refer(seen, position_mm)
        self._last = seen

    def _refer(self, seen: Floats | None, position_mm: float) -> None:
        if seen is not None and float(seen.mean()) > LEAST_SEEN:
            self._reference = (seen, position_mm)
        self._last = seen


class ImageEncodedCamera:
    """A camera whose frames carry the belt position that its own pictures show.

    Args:
        source: The camera; its own belt positions are replaced.
        encoder: Takes every frame that is read, and gives the belt position in between.
    """

    def __init__(self, source: FrameSource, encoder: ImageEncoder) -> None:
        self.source, self.encoder = source, encoder

    def read(self, timeout_s: float) -> Frame | None:
        """See `FrameSource.read`."""
        frame = self.source.read(timeout_s)
        return None if frame is None else replace(frame, belt_mm=self.encoder.feed(frame))

    def close(self) -> None:
        """Closes the camera."""
        self.source.close()


def belt_of(images: Iterable[Image]) -> Floats | None:
    """Returns the empty belt learnt from pictures of a recording, or None when too few of them differ.

    Args:
        images: Pictures in order, uint8 (H, W, 3) BGR of one size.
    """
    lively: list[Floats] = []
    for image in images:
        small = shrunk(image, shrink_of(image.shape[1]))
        if not lively or (small.shape == lively[0].shape and moved(lively[-1], small)):
            lively.append(small)
    return learn_belt(lively) if len(lively) >= _FIRST_LOOKS else None


def _smoothed(before_mm_s: float, now_mm_s: float, elapsed_s: float, column_mm: float) -> float:
    """Returns the new speed: slow for what may be reading noise, quick for a ramp, at once for a stop."""
    if now_mm_s * elapsed_s < 0.02 * column_mm:
        return 0.0
    change = now_mm_s - before_mm_s
    noise = max(0.1 * column_mm / elapsed_s, 0.02 * before_mm_s)
    return before_mm_s + (0.15 if abs(change) < noise else 0.6) * change
