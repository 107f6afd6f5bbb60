"""One frame through the line: locate, track, take views, infer, decide, schedule; without thread, pipe or own clock.

`LineCore.process` is the whole path from frame to ejector and the only place where its order stands; the line
process, the unpaced run, the replay and the benchmarks all call it. `collect`, which judges nothing, uses
`vision.follower`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.ejection.queue import EjectionQueue
from edge_agent.interfaces import (
    Confirmation,
    Frame,
    ItemScalars,
    LineGeometry,
    Shot,
)
from edge_agent.line.counters import LineCounter
from edge_agent.line.shadow import Shadow
from edge_agent.vision.judge import Judge, Judged
from edge_agent.vision.segmentation import FLOODED, SHRINK, Detection, Locator
from edge_agent.vision.tracking import Track, Tracker, ViewPicker
from models.errors import BundleError, CameraError

_MIN_OBSERVATIONS: Final = 2


@dataclass(frozen=True, slots=True)
class CoreState:
    """The state of a core between two frames: with it and the frames that follow, a core does the same again."""

    ids: int
    """Number of item ids given so far."""
    last_number: int
    background: NDArray[np.float32] | None
    tracks: tuple[Track, ...]


@dataclass(slots=True)
class LineCore:
    """The path from frame to ejector.

    Attributes:
        geometry: Lanes and outlets in the camera's picture.
        counter: Counts items, frames and verdicts.
        queue: Takes the ejections.
        clock: Monotonic seconds, the encoder's clock.
        on_model_failure: Called with the judge and its error when a bundle breaks while it works.
        on_verdict: Called with each verdict and its outlet.
        confirmation: Photo-eyes behind the ejectors, where there are any.
        weights: Per lane, the sensor that weighs its items; empty = nothing does.
        shadow: A challenger that gets each judged item; replaced between two frames.
        on_ejector: Called with lane, outlet and `weak`, `slow` or `` (recovered) when the state of an ejector changes.
    """

    geometry: LineGeometry
    counter: LineCounter
    queue: EjectionQueue
    clock: Callable[[], float]
    on_model_failure: Callable[[Judge, BundleError], None] = lambda _judge, _error: None
    on_verdict: Callable[[Judged, str], None] | None = None
    confirmation: Confirmation | None = None
    weights: tuple[ItemScalars, ...] = ()
    on_ejector: Callable[[int, str, str], None] = lambda _lane, _outlet, _trouble: None
    shadow: Shadow | None = None
    unjudged_outlet: str = ""
    """Where items that leave without a verdict are ejected; empty = they stay on the belt (fail-safe `eject-all`)."""
    blind_to_mm: float = -math.inf
    """Items up to this belt coordinate may be hit by shots of the fail-safe; their own are no proof of a valve."""
    judge: Judge | None = None
    items_on_bundle: int = 0
    _places: list[Detection] = field(default_factory=list)
    _ids: int = 0
    _last_number: int = -1
    _locator: Locator = field(init=False)
    _tracker: Tracker = field(init=False)
    _picker: ViewPicker = field(init=False)

    def __post_init__(self) -> None:
        self._locator = Locator(self.geometry)
        self._tracker = Tracker(self.geometry, self._next_id)
        self._picker = ViewPicker(self.geometry, 6)
        self.counter.follow(self.queue)

    def _next_id(self) -> int:
        self._ids += 1
        return self._ids

    def use(self, judge: Judge | None) -> None:
        """Switches bundles between two frames; items already seen by the old bundle are finished by it."""
        self.judge = judge
        self.items_on_bundle = 0
        if judge is not None:
            self._picker = ViewPicker(self.geometry, judge.preprocess.max_views)
            judge.serve_lanes(len(self.geometry.lanes))
        self.counter.use(judge)

    def process(self, frame: Frame) -> None:
        """Does everything that happens because of one frame.

        Raises:
            CameraError: `camera.wrong_size`: the frame has another size than the line; it is counted and left out.
        """
        if self._last_number >= 0 and frame.number > self._last_number + 1:
            self.counter.count("frames_dropped", frame.number - self._last_number - 1)
        self._last_number = frame.number
        self._check_size(frame)
        self.counter.frame()
        places = self._locator.find(frame.image)
        if self._locator.coverage > FLOODED:
            self.counter.count("frames_bad")
            places = []
        self._places = places
        advance_px = self._advance_px(frame)
        seen, closed = self._tracker.update(places, frame.number, frame.captured_s, frame.belt_mm)
        self._judge_seen(frame, seen, places, advance_px)
        for track in closed:
            # Lost before its last view (cut by the edge, merged with a neighbour): judged on the views it has.
            if not track.complete:
                self._finish(track)
        self._finish_lost(frame, advance_px)
        if self.confirmation is not None:
            sightings = self.confirmation.sightings(frame.captured_s)
            for (lane, outlet), trouble in self.queue.learn(sightings, frame.belt_mm, until_s=frame.captured_s):
                self.on_ejector(lane, outlet, trouble)

    def _advance_px(self, frame: Frame) -> float:
        """Returns how far the belt runs from frame to frame, pixels, by the item that was seen last; 0 = not known.

        It depends on the tracks and this frame alone, so a replay that starts anywhere finds the same.
        """
        newest = max(self._tracker.tracks, key=lambda track: track.last_frame, default=None)
        if newest is None or frame.number <= newest.last_frame:
            return 0.0
        ran_mm = (frame.belt_mm - newest.last_belt_mm) / (frame.number - newest.last_frame)
        return max(ran_mm / self.geometry.mm_per_px, 0.0)

    def _check_size(self, frame: Frame) -> None:
        expected = (self.geometry.height_px, self.geometry.width_px, 3)
        if frame.image.shape != expected:
            self.counter.count("frames_bad")
            raise CameraError(
                "camera.wrong_size", "A frame has another size than the line.", expected=expected, got=frame.image.shape
            )

    def _judge_seen(
        self, frame: Frame, seen: list[tuple[Track, Detection]], places: list[Detection], advance_px: float
    ) -> None:
        """Takes the views this frame offers and judges them; items whose last view is among them get their verdict.

        These items are judged first, and each run of the model is followed by the verdicts it completes, so that no
        verdict waits for other items' inference.
        """
        wanted: list[tuple[Track, Detection]] = []
        for track, place in seen:
            if track.judge is None:
                track.judge = self.judge
            last = self._is_last(place, places, advance_px)
            if isinstance(track.judge, Judge) and self._picker.wants(track, place, last=last):
                wanted.append((track, place))
        wanted.sort(key=lambda pair: not pair[0].complete)
        size = self.judge.views_per_run if self.judge else len(wanted) or 1
        for start in range(0, len(wanted), size):
            together = wanted[start : start + size]
            self._take_views(frame, together)
            for track, _ in together:
                if track.complete:
                    self._finish(track)

    def _is_last(self, place: Detection, places: list[Detection], advance_px: float) -> bool:
        """Whether no later frame will show this item whole: its front leaves the picture before the next exposure.

        An item that touches one ahead of it is taken for part of that one as soon as the edge cuts the pair, so the
        front of the pair counts.
        """
        if advance_px <= 0.0:
            return False
        edge_px = self.geometry.width_px - SHRINK - advance_px
        if place.right_px > edge_px or not place.touching:
            return place.right_px > edge_px
        front_px = place.right_px
        for ahead in sorted((p for p in places if p.lane == place.lane), key=lambda p: p.left_px):
            if abs(ahead.left_px - front_px) <= SHRINK and ahead.right_px > front_px:
                front_px = ahead.right_px
        return front_px > edge_px

    def _finish_lost(self, frame: Frame, advance_px: float) -> None:
        """Judges items that this frame does not show and no later one can show whole, by where the belt is."""
        if advance_px <= 0.0:
            return
        edge_px = self.geometry.width_px - SHRINK - advance_px
        for track in self._tracker.tracks:
            if track.complete or track.last_frame == frame.number or not track.probabilities:
                continue
            front_px = (frame.belt_mm - track.item_mm + track.length_mm / 2.0) / self.geometry.mm_per_px
            if front_px > edge_px:
                track.end_views()
                self._finish(track)

    def _take_views(self, frame: Frame, wanted: list[tuple[Track, Detection]]) -> None:
        """Cuts these views and judges them in one batch per bundle."""
        batches: dict[int, tuple[Judge, list[Track]]] = {}
        for track, place in wanted:
            judge = track.judge
            if isinstance(judge, Judge) and judge.take_view(self._locator, frame.image, track, place):
                track.viewed_s = frame.captured_s
                batches.setdefault(id(judge), (judge, []))[1].append(track)
        for judge, tracks in batches.values():
            try:
                if self._needs_weight(judge):
                    self._weigh(tracks)
                elapsed_ms = judge.infer(tracks)
            except BundleError as error:
                self._fail(judge, tracks, error)
            else:
                self.counter.inference(elapsed_ms, len(tracks))

    def _needs_weight(self, judge: Judge) -> bool:
        """Whether champion or challenger judges by weight, or the windows count weights."""
        if not self.weights:
            return False
        judges = (judge, *((self.shadow.judge,) if self.shadow else ()))
        return "weight_g" in judge.profile.scalars or any("weight_g" in each.preprocess.scalars for each in judges)

    @property
    def frame_number(self) -> int:
        """Number of the newest frame; -1 before the first."""
        return self._last_number

    def _weigh(self, tracks: list[Track]) -> None:
        for track in tracks:
            if track.weight_g is None and track.lane < len(self.weights):
                track.weight_g = self.weights[track.lane].value_for(track.item_mm)
                track.weighed_frame = -1 if track.weight_g is None else self._last_number

    def _fail(self, judge: Judge, tracks: list[Track], error: BundleError) -> None:
        for track in tracks:
            track.views.pop()
        if self.judge is judge:
            self.use(None)
            self.on_model_failure(judge, error)

    def _finish(self, track: Track) -> None:
        """Gives an item that has its last view its verdict and its outlet; what only monitoring needs comes last."""
        judge = track.judge
        if not isinstance(judge, Judge) or not track.probabilities:
            if track.observations >= _MIN_OBSERVATIONS:
                self.counter.count("items_unjudged")
            self._eject_unjudged(track)
            return
        verdict = judge.decide(track, self.counter.variety, self.counter.lot)
        outlet = verdict.outlet
        distance_mm = self.geometry.outlets_mm.get(outlet)
        if distance_mm is not None:
            blind = track.item_mm < self.blind_to_mm
            shot = Shot(track.lane, outlet, track.item_id, track.item_mm + distance_mm, blind=blind)
            late = self.queue.late
            if not self.queue.schedule(shot):
                # Refused as late, or by rule (too close to the shot before): the queue says which.
                self.counter.count("verdicts_late", self.queue.late - late)
                outlet = judge.recipe.late_outlet
        latency_ms = (self.clock() - track.viewed_s) * 1000.0
        judged = judge.describe(track, verdict)
        own = judge is self.judge
        self.items_on_bundle += own
        self.counter.verdict(judged, outlet, latency_ms, own_bundle=own)
        for name in judge.preprocess.scalars:
            if track.scalars.get(name) is None:
                self.counter.scalar_missing(name)
        if self.on_verdict is not None:
            self.on_verdict(judged, outlet)
        if self.shadow is not None:
            self.shadow.offer(judged, verdict.outlet, self.counter.variety, self.counter.lot)

    def _eject_unjudged(self, track: Track) -> None:
        distance_mm = self.geometry.outlets_mm.get(self.unjudged_outlet)
        if distance_mm is not None:
            shot = Shot(track.lane, self.unjudged_outlet, track.item_id, track.item_mm + distance_mm, blind=True)
            self.counter.camera("blind_shots" if self.queue.schedule(shot) else "blind_shots_late")

    def refused(self, frames: int) -> None:
        """Notes that so many frames before the next one were refused by `CameraHealth`: they are bad, not dropped."""
        if self._last_number >= 0:
            self._last_number += frames

    def unseen(self, belt_mm: float) -> None:
        """Judges the items that left the picture while no frame could be used, by the views they have."""
        for track in self._tracker.close_passed(belt_mm):
            if not track.complete:
                self._finish(track)

    def flush(self) -> None:
        """Judges the items in sight by the views they have (the camera ended)."""
        for track in self._tracker.close_all():
            if not track.complete:
                self._finish(track)

    def snapshot(self) -> CoreState:
        """Returns a copy of the state between two frames; the arrays of the tracks are shared.

        It takes some 50 microseconds, and 0.1 ms per item in sight, whose views are measured now.
        """
        background = self._locator.background
        for track in self._tracker.tracks:
            if isinstance(track.judge, Judge):
                track.judge.measure(track)
        tracks = tuple(
            replace(
                track,
                views=list(track.views),
                probabilities=list(track.probabilities),
                embeddings=list(track.embeddings),
                features=list(track.features),
            )
            for track in self._tracker.tracks
        )
        return CoreState(self._ids, self._last_number, None if background is None else background.copy(), tracks)

    def restore(self, state: CoreState) -> None:
        """Continues from a snapshot; its tracks are taken over, not copied."""
        self._ids, self._last_number = state.ids, state.last_number
        self._locator.restore(state.background)
        self._tracker.restore(state.tracks)

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Returns left, top, right and bottom of the items in the last frame, pixels."""
        return [(place.left_px, place.top_px, place.right_px, place.bottom_px) for place in self._places]

    @property
    def locator(self) -> Locator:
        """Finds the items in a frame; shared with callers that take views of their own."""
        return self._locator

    @property
    def tracker(self) -> Tracker:
        """Follows the items from frame to frame."""
        return self._tracker
