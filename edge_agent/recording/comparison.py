"""Replays a recording and compares every decision: with the same bundle the verdicts are equal, bit by bit.

A recording is a row of *stretches*: frames without a loss between them, each beginning with a checkpoint. A fresh core
takes over the checkpoint and goes through the stretch in virtual time. Time is the one thing that is not computed
again: which verdicts came too late belongs to the recorded machine, so the replay takes it from the recording.

With the bundle that judged, every decision must be equal in every bit: item, `item_mm`, class, outlets, and
probabilities of the item and of each view. Where the recording also holds decisions of other bundles, their items are
judged by a second judge, so that the model sees the same batches as it did then (which holds as long as the bundles
of one recording take the same number of views per item). With another bundle the answer is a
table of agreements; items that were half judged at the start of a stretch are not compared.

Decisions of frames that were not recorded, and those of the last frame before a loss or a torn tail (they may have been
lost with it), cannot be compared; they are counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.devices.hardware import NullEjector
from edge_agent.ejection.queue import EjectionQueue
from edge_agent.interfaces import Shot
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import CoreState, LineCore
from edge_agent.recording.recorder import decision_of, versions
from edge_agent.recording.replay import Replay, Stretch
from edge_agent.recording.segments import Checkpoint, Decision, Entry, TrackState, floats, malformed
from edge_agent.vision.judge import Judge, Judged
from edge_agent.vision.segmentation import SHRINK
from edge_agent.vision.tracking import Track
from models.text import counted
from models.view_spec import VIEW_FEATURES

_SHOWN: Final = 20
_SAME_ITEM_MM: Final = 20.0


class _RecordedTiming(EjectionQueue):
    """Repeats which verdicts came too late on the recorded line. Fires nothing."""

    def __init__(self, replay: Replay, late: set[int]) -> None:
        super().__init__(replay, NullEjector(), lead_ms=0.0, clock=replay.now)
        self._late = late

    def schedule(self, shot: Shot) -> bool:
        """See `EjectionQueue.schedule`."""
        return shot.item_id not in self._late


@dataclass(frozen=True, slots=True)
class _RecordedLoadCell:
    """Repeats the weights of the recorded line's load cell, each from the frame on from which it was known."""

    decisions: list[Decision]
    core: LineCore

    def value_for(self, item_mm: float) -> float | None:
        """See `ItemScalars`."""
        near = min(self.decisions, key=lambda d: abs(d.item_mm - item_mm), default=None)
        if near is None or abs(near.item_mm - item_mm) > _SAME_ITEM_MM or self.core.frame_number < near.weighed_frame:
            return None
        return near.weight_g


@dataclass(slots=True)
class Report:
    """The result of a replay."""

    bundle: str
    recorded_bundles: dict[str, int]
    same_bundle: bool
    exact: bool | None = None
    """Whether every bit was the same; None when another bundle judged."""
    frames: int = 0
    stretches: int = 0
    decisions: int = 0
    compared: int = 0
    equal: int = 0
    """Number of decisions that were equal in every bit."""
    differing: int = 0
    missing: int = 0
    """Number of decisions that were recorded but not made by the replay."""
    extra: int = 0
    """Number of decisions that the replay made but that were not recorded."""
    not_comparable: int = 0
    late: int = 0
    """Number of recorded verdicts that came too late for their outlet."""
    belts_compared: int = 0
    """Number of checkpoints at which the learnt belt was compared."""
    belts_differing: int = 0
    agreed: int = 0
    """Number of items with the same class and outlet."""
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of items by recorded class and present class."""
    outlets: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of items by recorded outlet and present outlet."""
    differences: list[str] = field(default_factory=list)
    """Descriptions of the first differences."""
    torn: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns the report as text for a person."""
        head = f"{counted(self.frames, 'frame')}, {counted(self.stretches, 'stretch', 'stretches')}, "
        head += f"{counted(self.decisions, 'decision')} recorded"
        lines = [head, *(f"torn tail: {torn}" for torn in self.torn), *(f"note: {note}" for note in self.notes)]
        if self.same_bundle:
            lines.append(f"bit-exact: {'yes' if self.exact else 'NO'}: {self.equal} of {self.compared} items equal")
            lines.append(f"missing {self.missing}, extra {self.extra}, not comparable {self.not_comparable}")
            lines.append(f"learnt belt: {self.belts_differing} of {self.belts_compared} checkpoints differ")
        else:
            recorded = ", ".join(digest[:12] for digest in self.recorded_bundles) or "no bundle"
            share = f" ({self.agreed / self.compared:.1%})" if self.compared else ""
            lines.append(f"recorded with {recorded}, judged now with {self.bundle[:12]}")
            lines.append(f"agreed on {self.agreed} of {self.compared} items{share}")
            for name, table in (("class", self.classes), ("outlet", self.outlets)):
                lines += ["", *_table(name, table)]
        return lines + [f"  {difference}" for difference in self.differences]


def _table(name: str, counts: dict[str, dict[str, int]]) -> list[str]:
    """Returns a table with recorded names as rows and present names as columns."""
    columns = sorted({after for row in counts.values() for after in row})
    first = max(len(text) for text in (f"{name} then", *counts))
    widths = [max(len(column), 7) for column in columns]
    cells = [f"{column:>{width}}" for column, width in zip(columns, widths, strict=True)]
    lines = ["  ".join([f"{name} then".ljust(first), *cells]) + "   (now)"]
    for before, row in sorted(counts.items()):
        cells = [f"{row.get(column, 0):>{width}}" for column, width in zip(columns, widths, strict=True)]
        lines.append("  ".join([before.ljust(first), *cells]))
    return lines


def replay(
    folder: Path,
    bundle: Path,
    *,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Report:
    """Runs the line over a recording and compares every decision.

    Args:
        folder: Folder of the recording.
        bundle: Bundle that judges: the one of the recording, or one to be tried on the same fruit.
        progress: Called with (frames so far, frames in all).

    Raises:
        InputError: The recording is not usable: see `Replay`.
        BundleError: The bundle is not usable.
        CameraError: A frame cannot be decoded.
    """
    cv2.setNumThreads(1)
    source = Replay(folder)
    return _Comparison(source, bundle).run(progress)


class _Comparison:
    """The replay of one recording by one bundle."""

    def __init__(self, source: Replay, bundle: Path) -> None:
        self._source = source
        threads = source.about.get("threads", "1")
        self._threads = int(threads) if threads.isdecimal() and 1 <= int(threads) <= 64 else 1
        self._judge = self._standin = Judge(bundle, threads=self._threads)
        bundles = source.bundles
        same = self._judge.digest in bundles
        if same and len(bundles) > 1:
            self._standin = Judge(bundle, threads=self._threads)
        self._report = Report(self._judge.digest, bundles, same, torn=source.torn, kept=source.kept)
        self._replayed: dict[int, tuple[Decision, bool]] = {}
        self._index = 0
        self._skipped: set[int] = set()

    def run(self, progress: Callable[[int, int], None]) -> Report:
        report, source = self._report, self._source
        report.frames, report.decisions, report.stretches = source.frames, source.decisions, len(source.stretches)
        done = 0
        for stretch in source.stretches:
            core = self._core(stretch)
            in_force: str | None = None
            for head, _ in stretch.frames:
                frame = source.read(0.0)
                assert frame is not None  # noqa: S101  a recording gives a frame or raises
                if head.digest != in_force:
                    in_force = head.digest
                    core.use(self._judge_for(head.digest))
                core.counter.variety, core.counter.lot = head.variety, head.lot
                self._index = head.index
                self._compare_belt(core, stretch.checkpoints.get(head.index))
                core.process(frame)
                done += 1
                progress(done, source.frames)
            if stretch.ended:
                core.flush()
            self._compare(stretch)
        if report.same_bundle:
            wrong = report.differing + report.missing + report.extra + report.belts_differing
            report.exact = wrong == 0
        here = versions()
        report.notes = [
            f"recorded with {name} {then}, replayed with {here[name]}: bits may differ"
            for name, then in source.about.items()
            if here.get(name, then) != then
        ]
        return report

    def _judge_for(self, digest: str) -> Judge | None:
        if digest == self._judge.digest:
            return self._judge
        # Without a bundle items passed; a replay with the same bundle does so too, a trial of another one judges.
        return self._standin if digest or not self._report.same_bundle else None

    def _core(self, stretch: Stretch) -> LineCore:
        late = {decision.item_id for decision in stretch.decisions if decision.outlet != decision.wanted}
        self._report.late += len(late)
        self._replayed.clear()
        self._skipped.clear()
        geometry = stretch.geometry
        core = LineCore(
            geometry=geometry,
            counter=LineCounter(len(geometry.lanes), clock=self._source.now),
            queue=_RecordedTiming(self._source, late),
            clock=self._source.now,
            on_verdict=self._decided,
        )
        core.weights = tuple(
            _RecordedLoadCell([d for d in stretch.decisions if d.lane == lane], core)
            for lane in range(len(geometry.lanes))
        )
        point = stretch.checkpoint
        tracks = tuple(self._track(state) for state in point.tracks)
        core.restore(CoreState(point.ids, point.last_number, _background(stretch.start, point), tracks))
        return core

    def _track(self, state: TrackState) -> Track:
        """Returns an item in sight; answers of another bundle about it are dropped."""
        track = Track(
            state.item_id,
            state.lane,
            state.item_mm,
            state.length_mm,
            state.last_x_px,
            state.last_frame,
            state.last_captured_s,
            state.last_belt_mm,
            state.observations,
            state.next_view_px,
            weight_g=state.weight_g,
            weighed_frame=state.weighed_frame,
        )
        if state.digest == self._judge.digest:
            classifier = self._judge.classifier
            track.judge = self._judge
            track.probabilities = floats(state.probabilities, classifier.classes, state.views)
            track.embeddings = floats(state.embeddings, classifier.embedding_size, state.views)
            track.features = floats(state.features, len(VIEW_FEATURES), state.views)
            # Of views already judged only their number matters.
            track.views = [np.zeros((0, 0, 3), np.uint8)] * state.views
        elif state.digest or not self._report.same_bundle:
            track.judge = self._standin
            self._skipped.add(state.item_id)
        return track

    def _decided(self, judged: Judged, outlet: str) -> None:
        own = judged.track.judge is self._judge
        self._replayed[judged.track.item_id] = (decision_of(judged, outlet, self._index), own)

    def _compare_belt(self, core: LineCore, entry: Entry | None) -> None:
        if entry is None:
            return
        background = core.locator.background
        self._report.belts_compared += 1
        if (b"" if background is None else background.tobytes()) != entry.payload():
            self._report.belts_differing += 1
            self._say(f"the learnt belt differs before frame {self._index}")

    def _compare(self, stretch: Stretch) -> None:
        report = self._report
        first = stretch.checkpoint.index
        last = stretch.frames[-1][0].index if stretch.frames else first - 1
        recorded = {decision.item_id: decision for decision in stretch.decisions}
        for item_id, then in recorded.items():
            now, _ = self._replayed.get(item_id, (None, False))
            certain = first <= then.index <= last and (then.index < last or stretch.ended)
            if item_id in self._skipped or (now is None and not certain):
                report.not_comparable += 1
            elif then.digest == report.bundle:
                self._compare_bits(then, now)
            elif now is None:
                # Half an item of another bundle is no fault where this bundle is checked bit by bit.
                report.not_comparable += report.same_bundle
                report.missing += not report.same_bundle
            if now is not None and item_id not in self._skipped:
                self._tabulate(then, now)
        for item_id, (now, own) in self._replayed.items():
            certain = now.index < last or stretch.ended
            if item_id not in recorded and item_id not in self._skipped and own and certain:
                report.extra += 1
                self._say(f"item {item_id}: decided now ({now.klass} to {now.outlet}), not in the recording")

    def _compare_bits(self, then: Decision, now: Decision | None) -> None:
        report = self._report
        if now is None:
            report.missing += 1
            self._say(f"item {then.item_id}: recorded as {then.klass} to {then.outlet}, not decided now")
            return
        report.compared += 1
        if now == then:
            report.equal += 1
            return
        report.differing += 1
        before, after = msgspec.structs.asdict(then), msgspec.structs.asdict(now)
        names = [name for name, value in before.items() if after[name] != value]
        changes = [f"{name} {_shown(before[name])} -> {_shown(after[name])}" for name in names]
        self._say(f"item {then.item_id}: " + "; ".join(changes))

    def _tabulate(self, then: Decision, now: Decision) -> None:
        report = self._report
        if not report.same_bundle:
            report.compared += 1
        report.agreed += (then.klass, then.outlet) == (now.klass, now.outlet)
        for table, before, after in (
            (report.classes, then.klass, now.klass),
            (report.outlets, then.outlet, now.outlet),
        ):
            row = table.setdefault(before, {})
            row[after] = row.get(after, 0) + 1

    def _say(self, difference: str) -> None:
        if len(self._report.differences) < _SHOWN:
            self._report.differences.append(difference)


def _background(entry: Entry, point: Checkpoint) -> NDArray[np.float32] | None:
    data = entry.payload()
    if not data:
        return None
    height, width = point.height_px // SHRINK, point.width_px // SHRINK
    rows = floats(data, width * 3, height)
    background = np.stack(rows).reshape(height, width, 3)
    if not np.isfinite(background).all():
        raise malformed(entry.path, "a finite belt", "nan or infinity")
    return background


def _shown(value: object) -> object:
    whole = isinstance(value, bytes) and len(value) % 4 == 0
    return [float(number) for number in np.frombuffer(value, np.float32)] if whole else value  # type: ignore[call-overload]
