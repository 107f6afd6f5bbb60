"""Records a line so that it can be replayed bit by bit: frames, belt, decisions, and the state they began from.

What a recording holds is defined so that it may begin at any moment of a run: each segment starts with a checkpoint
of the core (learnt belt, item ids, items in sight with what was judged of them), taken between two frames. So the
oldest segments can go, frames can be lost, the program can start again, and what is left still replays exactly:
after each loss the replay goes on from the next checkpoint. `recording.replay` reads it, `recording.segments` is the
format.

The line only appends to a bounded queue, without waiting (a line that is not paced may choose to wait); a separate
thread encodes and writes, in the pauses between two frames: beside a frame at work, encoding lengthens the latency from
8 to 12 ms (two cores), in the pauses by 0.2 ms. When the queue is full, frames are not recorded until half of it is
free again, and counted. Disk full or failing: counted, the recording pauses and tries again later. The quota is never
exceeded: the oldest segments go first, those marked by `keep` last. Each record is one write; the file is synchronised
whenever the writer has caught up, so a power cut costs the last record on a disk that keeps up, and what waited on one
that does not.

Frames are PNG, filter *average*, Huffman only: measured on the simulated line (640x340, sensor noise of 2 levels)
317 kB and 4.6 ms per frame against 367 kB and 10.8 ms of plain level 1. The difference to a background is no cheaper
(333 kB, 8.7 ms), because the noise remains to be stored.
"""

import contextlib
import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

import cv2
import msgspec
import numpy as np

from edge_agent.interfaces import Frame, Image
from edge_agent.line.sorting import CoreState, LineCore
from edge_agent.recording.segment_writer import RecordingCounters, SegmentWriter, open_new
from edge_agent.recording.segments import (
    Checkpoint,
    Decision,
    End,
    FrameHead,
    Head,
    Kept,
    TrackState,
    framed,
    opening,
)
from edge_agent.vision.judge import Judge, Judged
from edge_agent.vision.tracking import Track
from models.errors import ConfigError

log = logging.getLogger("sortline.recording")
_MAX_WAITING: Final = 4096
_QUOTA_SHARE: Final = 8
"""A segment takes at most about this part of the quota, so that eviction frees little at a time."""
_PATIENCE_S: Final = 30.0
_GIVE_WAY_S: Final = 0.02
"""Longest time the writer waits for a pause of the line; then it works beside it, or the queue would fill."""
_LEAD_UP_S: Final = 10.0
"""A segment younger than this is kept together with the one before it."""


@dataclass(frozen=True, slots=True)
class _Start:
    """A checkpoint that waits to be written."""

    index: int
    continuous: bool
    core: LineCore
    state: CoreState
    captured_s: float


_Item: TypeAlias = _Start | tuple[FrameHead, Image] | Decision | Kept | End


def versions() -> dict[str, str]:
    """Returns the versions that decide whether two machines compute the same bits."""
    return {
        "machine": platform.machine(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "onnxruntime": metadata.version("onnxruntime"),
    }


def decision_of(judged: Judged, outlet: str, index: int) -> Decision:
    """Returns a verdict in the form in which it is recorded and compared."""
    track, verdict = judged.track, judged.verdict
    return Decision(
        index=index,
        item_id=track.item_id,
        lane=track.lane,
        item_mm=float(track.item_mm),
        klass=verdict.klass,
        grade=verdict.grade,
        wanted=verdict.outlet,
        outlet=outlet,
        defect=float(verdict.defect),
        probabilities=np.asarray(verdict.probabilities, np.float32).tobytes(),
        view_probabilities=np.stack(track.probabilities).astype(np.float32, copy=False).tobytes(),
        views=verdict.views,
        digest=track.judge.digest if isinstance(track.judge, Judge) else "",
        weight_g=track.weight_g,
        weighed_frame=track.weighed_frame,
    )


class Recorder:
    """Records the frames and decisions of the line. One thread offers them; any thread may call `keep`.

    Call `offer` before `LineCore.process` of a frame and `processed` after it, `decided` as the core's `on_verdict`,
    `ended` after `LineCore.flush`, and `close` at last. Images are not copied and must not be changed afterwards.

    Args:
        folder: Folder of the recording, made when it is missing; an existing recording is continued by new segments.
        quota_bytes: Largest size of all segments in the folder together.
        segment_s: Length of a segment, seconds of the frames' time; shorter when the quota is small.
        queue_frames: Number of frames that may wait for the disk.
        patient: `offer` waits for room instead of losing the frame: for lines that are not paced.
        retry_s: Pause after a disk error.
        about: Facts that are stored with each segment (`bundle`, `threads`).
        clock: Monotonic clock in seconds, used for the pause only.
        opener: Makes a new segment file, unbuffered.

    Raises:
        ConfigError: `recording.bad_quota`.
        InputError: `recording.unwritable` when the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        quota_bytes: int,
        segment_s: float = 60.0,
        queue_frames: int = 32,
        patient: bool = False,
        retry_s: float = 10.0,
        about: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        opener: Callable[[Path], BinaryIO] = open_new,
    ) -> None:
        if quota_bytes <= 0:
            raise ConfigError("recording.bad_quota", "A recording needs room.", expected="> 0 bytes", got=quota_bytes)
        self.counters = RecordingCounters()
        self._folder, self._quota, self._segment_s = folder, quota_bytes, segment_s
        self._patient = patient
        self._queue_frames, self._retry_s, self._clock = queue_frames, retry_s, clock
        self._run = f"{time.time_ns():x}-{os.getpid()}"
        self._about = {**versions(), **(about or {})}
        # The offering side.
        self._index = -1
        self._began_s: float | None = None
        self._whole = False
        self._refusing = False
        self._wake = threading.Condition()
        self._queue: deque[_Item] = deque()
        self._frames_waiting = 0
        self._closing = False
        self._pausing = threading.Event()
        self._pausing.set()
        # Set by the writer, read by the offering side.
        self._retry_at_s = float("-inf")
        self._interrupted = False
        self._segment_full = False
        # The writer.
        self._disk = SegmentWriter(folder, quota_bytes, opener, self.counters)
        self._live = False
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    # -- the line's side: never waits ---------------------------------------------------------------------------

    def offer(self, core: LineCore, frame: Frame) -> None:
        """Takes a frame before `core` processes it."""
        self._index += 1
        if self._patient:
            with self._wake:
                self._wake.wait_for(lambda: self._frames_waiting < self._queue_frames, _PATIENCE_S)
        geometry = core.geometry
        fits = frame.image.shape == (geometry.height_px, geometry.width_px, 3)
        if not fits or self._full() or self._clock() < self._retry_at_s:
            self._count("frames_lost")
            self._whole = False
            return
        if self._interrupted:
            self._interrupted = self._whole = False
        due = self._began_s is None or not 0.0 <= frame.captured_s - self._began_s < self._segment_s
        items: list[_Item] = []
        if due or self._segment_full or not self._whole:
            items.append(_Start(self._index, self._whole, core, core.snapshot(), frame.captured_s))
            self._began_s, self._whole, self._segment_full = frame.captured_s, True, False
        head = FrameHead(
            index=self._index,
            number=frame.number,
            captured_s=float(frame.captured_s),
            belt_mm=float(frame.belt_mm),
            digest=core.judge.digest if core.judge is not None else "",
            variety=core.counter.variety,
            lot=core.counter.lot,
        )
        items.append((head, frame.image))
        self._pausing.clear()
        with self._wake:
            self._queue.extend(items)
            self._frames_waiting += 1
            self._wake.notify()

    def _full(self) -> bool:
        """Returns whether the queue is full; once it was, half of it must be free: short stretches are useless."""
        most = self._queue_frames // 2 if self._refusing else self._queue_frames - 1
        self._refusing = self._frames_waiting > most
        return self._refusing

    def processed(self) -> None:
        """Signals that the line has finished the frame, so that the writer may work."""
        self._pausing.set()

    def decided(self, judged: Judged, outlet: str) -> None:
        """Takes a verdict of the frame offered last."""
        # What was decided on a frame that is not in the recording could not be decided again.
        if not self._whole or not self._put(decision_of(judged, outlet, max(self._index, 0))):
            self._count("decisions_lost")
            self._whole = False

    def keep(self, reason: str) -> None:
        """Marks the present segment (and the one before, when this one is young), so that it is evicted last."""
        self._put(Kept(reason=reason[:1000]))

    def ended(self) -> None:
        """Records that the line has ended and its core was flushed, so that the last items can be compared."""
        if self._whole:
            self._put(End())

    def _put(self, item: _Item) -> bool:
        with self._wake:
            if len(self._queue) >= _MAX_WAITING:
                return False
            self._queue.append(item)
            self._wake.notify()
        return True

    def _count(self, name: str) -> None:
        """Adds one to a counter; both threads count losses."""
        with self._wake:
            setattr(self.counters, name, getattr(self.counters, name) + 1)

    def close(self, timeout_s: float = 10.0) -> None:
        """Writes everything that waits and closes the file. May be called twice."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def facts(self) -> dict[str, object]:
        """Returns the counters, the folder and the bytes in use."""
        return {"folder": str(self._folder), "used_bytes": self._disk.used, **asdict(self.counters)}

    # -- the writing thread -------------------------------------------------------------------------------------

    def _write(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closing:
                    self._wake.wait()
                if not self._queue:
                    break
                item = self._queue.popleft()
                last = not self._queue
            if isinstance(item, tuple) and not self._patient:
                self._pausing.wait(_GIVE_WAY_S)
            try:
                self._take(item)
                if last:
                    self._disk.sync()
            except OSError as error:
                self._pause(error)
            except Exception as error:  # a thread's boundary: the line must never notice
                log.exception("recording failed on one item")
                self._pause(error)
            finally:
                if isinstance(item, tuple):
                    with self._wake:
                        self._frames_waiting -= 1
                        self._wake.notify_all()
            self.counters.cpu_s = time.thread_time()
        with contextlib.suppress(OSError):
            self._disk.close()

    def _pause(self, error: Exception) -> None:
        self.counters.disk_errors += 1
        log.warning("recording pauses for %g s: %s", self._retry_s, error)
        self._disk.abandon()
        self._live = False
        self._retry_at_s = self._clock() + self._retry_s
        self._interrupted = True

    def _take(self, item: _Item) -> None:
        match item:
            case _Start():
                self._start(item)
            case (head, image):
                self._frame(head, image)
            case Decision():
                written = self._live and self._store(item)
                self._count("decisions" if written else "decisions_lost")
            case Kept():
                if self._live:
                    self._store(item)
                    self._disk.keep(_LEAD_UP_S)
            case End():
                if self._live:
                    self._store(item)

    def _frame(self, head: FrameHead, image: Image) -> None:
        written = False
        try:
            written = self._live and self._store(head, encode_image(image), captured_s=head.captured_s)
        finally:
            self._count("frames" if written else "frames_lost")
        if self._disk.open_bytes > self._quota // _QUOTA_SHARE:
            self._segment_full = True

    def _start(self, start: _Start) -> None:
        if self._clock() < self._retry_at_s:
            self._interrupted = True
            return
        self._live = False
        head = _checkpoint(start, self._run, self._about, continuous=start.continuous and not self._disk.broken)
        background = start.state.background
        record = framed(head, b"" if background is None else background.tobytes())
        self._live = self._disk.begin(opening() + record, start.captured_s)
        self._interrupted = not self._live

    def _store(self, head: Head, payload: bytes = b"", *, captured_s: float | None = None) -> bool:
        """Writes a record; False when the quota has no room, and then nothing follows before a new checkpoint."""
        if self._disk.append(framed(head, payload), captured_s):
            return True
        self._live, self._interrupted = False, True
        return False


def encode_image(image: Image) -> bytes:
    """Returns a frame as PNG with the fast settings that the module describes."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    chosen = getattr(cv2, "IMWRITE_PNG_FILTER", None)
    if chosen is not None:  # OpenCV before 4.12 chooses the filter itself
        options += [chosen, getattr(cv2, "IMWRITE_PNG_FILTER_AVG", 0)]
    ok, data = cv2.imencode(".png", image, options)
    if not ok:
        raise OSError("OpenCV did not encode a frame")
    return data.tobytes()


def _checkpoint(start: _Start, run: str, about: dict[str, str], *, continuous: bool) -> Checkpoint:
    geometry, state = start.core.geometry, start.state
    return Checkpoint(
        run=run,
        index=start.index,
        continuous=continuous,
        width_px=geometry.width_px,
        height_px=geometry.height_px,
        mm_per_px=geometry.mm_per_px,
        lanes=tuple((lane.top_px, lane.bottom_px) for lane in geometry.lanes),
        outlets_mm=dict(geometry.outlets_mm),
        ids=state.ids,
        last_number=state.last_number,
        tracks=tuple(_track_state(track) for track in state.tracks),
        about=about,
    )


def _track_state(track: Track) -> TrackState:
    plain = ("item_mm", "length_mm", "last_x_px", "last_captured_s", "last_belt_mm", "next_view_px")
    numbers = {name: float(getattr(track, name)) for name in plain}
    arrays = {
        name: np.asarray(getattr(track, name), np.float32).tobytes()
        for name in ("probabilities", "embeddings", "features")
    }
    return msgspec.convert(
        {
            "item_id": track.item_id,
            "lane": track.lane,
            "last_frame": track.last_frame,
            "observations": track.observations,
            "views": len(track.probabilities),
            "digest": track.judge.digest if isinstance(track.judge, Judge) else "",
            "weight_g": track.weight_g,
            "weighed_frame": track.weighed_frame,
            **numbers,
            **arrays,
        },
        TrackState,
    )
