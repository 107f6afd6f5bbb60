"""Detects faults of the camera: names a fault within two seconds, refuses bad frames at once, reports the recovery.

It uses a sparse sample of each frame (some ten microseconds) and the time between frames. Faults:

* `camera.absent`, `camera.failed`, `camera.wrong_size`: the source said so, or the size is another;
* `camera.stalled`: no frame for `stall_s`;
* `camera.frozen`: the same bytes again (a sensor's noise never repeats), or, while the belt moves, a picture that
  changes far less than this camera's pictures do (a repeated picture that was compressed again);
* `camera.black`, `camera.overexposed`: next to nothing lies above, or too much lies at the ends of the scale;
* `camera.corrupt`: rows that are flat to the last bit (a decoder's filling), noise from end to end, or a torn picture,
  where part of the rows is still the frame before;
* `camera.slow`: frames come, but much fewer than the camera should give. These frames are judged.

A single bad frame is refused and counted, and is not yet a fault. What a fault does to the belt is no part of this
(`fail_safe`). Times are arguments: the clock belongs to the caller. One thread feeds it; any may read `fault`.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_agent.interfaces import Frame
from models.errors import CameraError

_NAMED_S: Final = 0.4
"""Bad frames of one kind for so long are a fault."""
_FROZEN_S: Final = 0.7
_GOOD_S: Final = 0.5
"""Good frames for so long end a fault."""
_RATE_S: Final = 1.5
_CORRUPT_SHARE: Final = 0.3
"""Share of the frames of a second."""
_DARK: Final = 16
_BRIGHT: Final = 250
_ROWS, _COLUMNS = 32, 80
"""Fewest rows and columns of the sample."""
_STILL_MM: Final = 2.0
_TORN_ROWS: Final = 0.15
"""Larger share of rows that repeat the frame before to the last bit: part of the picture is old."""
_USUALLY_STILL: Final = 0.02
"""Where more rows than this share usually repeat (a compressed stream), repeated rows show no torn picture."""

BLIND: Final = frozenset(
    f"camera.{name}"
    for name in ("absent", "failed", "wrong_size", "stalled", "frozen", "black", "overexposed", "corrupt", "stuck")
)
"""Faults in which no item can be judged; `camera.slow` is not among them."""

_SAYS: Final = {
    "frozen": "The camera repeats one image; restart it.",
    "black": "The picture is black; check lamp, lens cap and exposure.",
    "overexposed": "The picture is over-exposed; check exposure and foreign light.",
    "corrupt": "Frames arrive damaged; check cable, power and network.",
    "slow": "The camera gives far fewer frames than it should; check cable, network, exposure time and this machine.",
    "stalled": "The camera gives no frames.",
    "wrong_size": "Frames have another size than the line; set the camera back or restart the line.",
}


@dataclass(slots=True)
class FrameStatistics:
    """Statistics of this camera's good frames, learnt slowly."""

    level: float = 0.0
    """Mean grey level."""
    changed: float = 0.0
    """Share of sampled values that change from frame to frame while the belt moves."""
    edges: float = 0.0
    """Mean step between neighbouring samples of a row."""
    still: float = 0.0
    """Share of rows that repeat the frame before to the last bit."""
    frames: int = 0

    def learn(self, level: float, changed: float | None, edges: float, still: float) -> None:
        """Learns from a good frame; the first thirty weigh most."""
        self.frames += 1
        rate = max(1.0 / self.frames, 0.005)
        self.level += rate * (level - self.level)
        self.edges += rate * (edges - self.edges)
        self.still += rate * (still - self.still)
        if changed is not None:
            self.changed += rate * (changed - self.changed) if self.changed else changed


class CameraHealth:
    """The health of one camera.

    Args:
        frames_per_s: Nominal rate.
        stall_s: Without a frame for so long the camera is stalled.
        slow_share: Below this share of the nominal rate it is slow; 0 = never.
        live: False for recordings: only their size and their errors are looked at.
        on_change: Called with code and message when a fault is named (again), and with `camera.recovered`.
    """

    def __init__(
        self,
        *,
        frames_per_s: float,
        stall_s: float = 1.0,
        slow_share: float = 0.6,
        live: bool = True,
        on_change: Callable[[str, str], None] = lambda _code, _message: None,
    ) -> None:
        self._rate, self._stall_s, self._slow_share, self._live = frames_per_s, stall_s, slow_share, live
        self._on_change = on_change
        self.fault = ""
        """Code of the present fault; empty = good."""
        self.repeated = 0
        """Frames that repeated the one before."""
        self.looks = FrameStatistics()
        self._shape: tuple[int, ...] | None = None
        self._last: NDArray[np.uint8] | None = None
        self._last_mm = 0.0
        self._last_s: float | None = None
        self._bad: tuple[str, float] | None = None
        """Kind of the bad frames that come now, and since when."""
        self._good_s: float | None = None
        self._arrivals: deque[float] = deque(maxlen=2048)
        self._recent: deque[tuple[float, bool]] = deque(maxlen=2048)
        """When frames came, and whether each was corrupt."""
        self._rate_from_s: float | None = None

    @property
    def blind(self) -> bool:
        """Whether nothing can be judged now."""
        return self.fault in BLIND

    # -- what the source reports ---------------------------------------------------------------------------------

    def failed(self, error: CameraError, now_s: float) -> None:
        """Notes that the source raised an error."""
        self._start_again()
        self._last_s = now_s
        self._name(error.code, str(error))

    def silent(self, now_s: float) -> None:
        """Notes that no frame came in time."""
        if self._last_s is None:
            self._last_s = now_s
        elif self._live and now_s - self._last_s > self._stall_s:
            self._start_again()
            self._name("camera.stalled", _SAYS["stalled"])

    def take(self, frame: Frame, now_s: float) -> bool:
        """Examines a frame; returns whether it may be judged."""
        self._last_s = now_s
        kind = self._kind(frame)
        if self._live:
            self._recent.append((now_s, kind == "corrupt"))
        if kind:
            self.repeated += kind == "frozen"
            self._good_s = self._rate_from_s = None
            self._bad = self._bad if self._bad and self._bad[0] == kind else (kind, now_s)
            if self._lasts(kind, now_s):
                self._name(f"camera.{kind}", _SAYS[kind])
            return False
        self._bad = None
        if self._good_s is None:
            self._good_s = now_s
        self._watch_rate(now_s)
        if self.blind and now_s - self._good_s >= _GOOD_S:
            self._recovered()
        return True

    def _start_again(self) -> None:
        self._last, self._bad, self._good_s, self._rate_from_s = None, None, None, None

    def _name(self, code: str, message: str) -> None:
        if code != self.fault:
            self.fault = code
            self._on_change(code, message)

    def _recovered(self) -> None:
        over, self.fault = self.fault, ""
        self._on_change("camera.recovered", f"Frames again after {over}.")

    # -- one frame --------------------------------------------------------------------------------------------

    def _kind(self, frame: Frame) -> str:
        if self._shape is None:
            self._shape = frame.image.shape
        if frame.image.shape != self._shape:
            return "wrong_size"
        if not self._live:
            return ""
        height, width = frame.image.shape[:2]
        sample = np.ascontiguousarray(frame.image[:: max(height // _ROWS, 1), :: max(width // _COLUMNS, 1)])
        last, moved_mm = self._last, abs(frame.belt_mm - self._last_mm)
        self._last_mm = frame.belt_mm
        level = cv2.mean(sample.reshape(-1))[0]
        rows = sample.reshape(len(sample), -1)
        steps = cv2.reduce(cv2.absdiff(rows[:, 3:], rows[:, :-3]), 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F).ravel()
        changed, still = None, 0.0
        if last is not None:
            difference = cv2.absdiff(rows, last)
            changed = cv2.countNonZero(difference) / rows.size
            still = 1.0 - cv2.countNonZero(cv2.reduce(difference, 1, cv2.REDUCE_MAX)) / len(rows)
        self._last = rows
        kind = (
            self._light(rows, level)
            or self._damage(steps)
            or self._torn(still, moved_mm)
            or self._repeats(changed, moved_mm)
        )
        if not kind:
            self.looks.learn(level, changed if moved_mm > _STILL_MM else None, float(np.median(steps)), still)
        return kind

    def _light(self, rows: NDArray[np.uint8], level: float) -> str:
        known = self.looks.level if self.looks.frames > self._rate else 0.0
        lit = cv2.countNonZero(cv2.inRange(rows, _DARK + 1, 255)) / rows.size
        if lit < 0.02 or level < 0.15 * known:
            return "black"
        blown = cv2.countNonZero(cv2.inRange(rows, _BRIGHT, 255)) / rows.size
        return "overexposed" if blown > 0.4 else ""

    def _damage(self, steps: NDArray[Any]) -> str:
        flat = (steps == 0.0).mean()
        torn = (steps > max(60.0, 3.0 * self.looks.edges)).mean()
        return "corrupt" if max(flat, torn) > 0.1 else ""

    def _torn(self, still: float, moved_mm: float) -> str:
        """Part of the rows repeats the frame before although the belt moves and this camera's rows never do."""
        unusual = self.looks.frames > self._rate and self.looks.still < _USUALLY_STILL
        return "corrupt" if unusual and moved_mm > _STILL_MM and _TORN_ROWS < still < 1.0 else ""

    def _repeats(self, changed: float | None, moved_mm: float) -> str:
        if changed is None:
            return ""
        known = self.looks.changed if self.looks.frames > self._rate else 0.0
        return "frozen" if changed == 0.0 or (moved_mm > _STILL_MM and changed < 0.1 * known) else ""

    def _lasts(self, kind: str, now_s: float) -> bool:
        """Returns whether bad frames of this kind have lasted long enough to be a fault."""
        if kind == "wrong_size":
            return True
        if kind == "corrupt":
            while self._recent and now_s - self._recent[0][0] > 1.0:
                self._recent.popleft()
            torn = sum(corrupt for _, corrupt in self._recent)
            return torn >= _CORRUPT_SHARE * max(len(self._recent), self._rate / 2.0)
        since_s = self._bad[1] if self._bad else now_s
        return now_s - since_s >= (_FROZEN_S if kind == "frozen" else _NAMED_S)

    def _watch_rate(self, now_s: float) -> None:
        self._arrivals.append(now_s)
        while now_s - self._arrivals[0] > _RATE_S:
            self._arrivals.popleft()
        if self._rate_from_s is None:
            self._rate_from_s = now_s
        if not self._live or self._slow_share <= 0.0 or now_s - self._rate_from_s < _RATE_S or self.blind:
            return
        share = len(self._arrivals) / (_RATE_S * self._rate)
        if not self.fault and share < self._slow_share:
            self._name("camera.slow", _SAYS["slow"])
        elif self.fault == "camera.slow" and share > min(self._slow_share + 0.15, 0.95):
            self._recovered()
