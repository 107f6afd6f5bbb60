"""One frame through the line: locate, track, take views, infer, decide, schedule. No thread, no pipe, no own clock.

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
from edge_agent.vision.segmentation import FLOODED, Detection, Locator
from edge_agent.vision.tracking import Track, Tracker, ViewPicker
from models.errors import BundleError, CameraError

_MIN_OBSERVATIONS: Final = 2
_MANY_VIEWS: Final = 5
"""Of one frame. A run of the model of its own costs about as much as half a view."""


@dataclass(frozen=True, slots=True)
class CoreState:
    """What a core knows between two frames: with it and the frames that follow, it does the same again."""

    ids: int
    """Item ids given so far."""
    last_number: int
    background: NDArray[np.float32] | None
    tracks: tuple[Track, ...]


@dataclass(slots=True)
class LineCore:
    """The path from frame to ejector.

    Attributes:
        geometry: Of the camera.
        counter: Gets everything that is counted.
        queue: Gets the ejections.
        clock: The encoder's clock, monotonic seconds.
        on_model_failure: Called with the judge and its error when a bundle breaks while it works.
        on_verdict: Called with each verdict and its outlet.
        confirmation: Photo-eyes behind the ejectors, where there are any.
        weights: Per lane, what weighs its items.
        shadow: A challenger that gets each judged item; replaced between two frames.
        on_ejector: Called with lane, outlet and `weak`, `slow` or `` (well again) when an ejector's trouble changes.
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
        """Switches bundles between two frames. Items already seen by the old one are finished by it."""
        self.judge = judge
        self.items_on_bundle = 0
        if judge is not None:
            self._picker = ViewPicker(self.geometry, judge.preprocess.max_views)
        self.counter.use(judge)

    def process(self, frame: Frame) -> None:
        """Everything that happens because of one frame."""
        if self._last_number >= 0 and frame.number > self._last_number + 1:
            self.counter.count("frames_dropped", frame.number - self._last_number - 1)
        self._last_number = frame.number
        self._check_size(frame)
        self.counter.frame()
        places = self._locator.find(frame.image)
        if self._locator.coverage > FLOODED:
            self.counter.count("frames_bad")
            places = []
        seen, closed = self._tracker.update(places, frame.number, frame.captured_s, frame.belt_mm)
        self._judge_seen(frame, seen)
        for track in closed:
            # Lost before its last view (cut by the edge, merged with a neighbour): judged on the views it has.
            if not track.complete:
                self._finish(track)
        if self.confirmation is not None:
            sightings = self.confirmation.sightings(frame.captured_s)
            for (lane, outlet), trouble in self.queue.learn(sightings, frame.belt_mm, until_s=frame.captured_s):
                self.on_ejector(lane, outlet, trouble)

    def _check_size(self, frame: Frame) -> None:
        expected = (self.geometry.height_px, self.geometry.width_px, 3)
        if frame.image.shape != expected:
            self.counter.count("frames_bad")
            raise CameraError(
                "camera.wrong_size", "A frame has another size than the line.", expected=expected, got=frame.image.shape
            )

    def _judge_seen(self, frame: Frame, seen: list[tuple[Track, Detection]]) -> None:
        """Takes the views this frame offers and judges them; items whose last view is among them get their verdict.

        Where there are many views, these items are judged first, so that their verdict does not wait for the others'
        inference. Where there are few, a second run of the model would cost more than it saves.
        """
        wanted: list[tuple[Track, Detection]] = []
        for track, place in seen:
            if track.judge is None:
                track.judge = self.judge
            if isinstance(track.judge, Judge) and self._picker.wants(track, place):
                wanted.append((track, place))
        last = [track for track, _ in wanted if track.complete]
        if last and len(wanted) >= _MANY_VIEWS:
            self._take_views(frame, [pair for pair in wanted if pair[0].complete])
            wanted = [pair for pair in wanted if not pair[0].complete]
        else:
            self._take_views(frame, wanted)
            wanted = []
        for track in last:
            self._finish(track)
        self._take_views(frame, wanted)

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
                if judge.wants_weight:
                    self._weigh(tracks)
                elapsed_ms = judge.infer(tracks)
            except BundleError as error:
                self._fail(judge, tracks, error)
            else:
                self.counter.inference(elapsed_ms, len(tracks))

    @property
    def frame_number(self) -> int:
        """Of the newest frame; -1 before the first."""
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
        """The item has its last view: verdict, then outlet."""
        judge = track.judge
        if not isinstance(judge, Judge) or not track.probabilities:
            if track.observations >= _MIN_OBSERVATIONS:
                self.counter.count("items_unjudged")
            self._eject_unjudged(track)
            return
        judged = judge.decide(track, self.counter.variety, self.counter.lot)
        outlet = judged.verdict.outlet
        distance_mm = self.geometry.outlets_mm.get(outlet)
        if distance_mm is not None:
            blind = track.item_mm < self.blind_to_mm
            shot = Shot(track.lane, outlet, track.item_id, track.item_mm + distance_mm, blind=blind)
            late = self.queue.late
            if not self.queue.schedule(shot):
                # Refused as late, or by rule (too close to the shot before): the queue says which.
                self.counter.count("verdicts_late", self.queue.late - late)
                outlet = judge.recipe.late_outlet
        own = judge is self.judge
        self.items_on_bundle += own
        self.counter.verdict(judged, outlet, (self.clock() - track.viewed_s) * 1000.0, own_bundle=own)
        if self.on_verdict is not None:
            self.on_verdict(judged, outlet)
        if self.shadow is not None:
            self.shadow.offer(judged, judged.verdict.outlet, self.counter.variety, self.counter.lot)

    def _eject_unjudged(self, track: Track) -> None:
        distance_mm = self.geometry.outlets_mm.get(self.unjudged_outlet)
        if distance_mm is not None:
            shot = Shot(track.lane, self.unjudged_outlet, track.item_id, track.item_mm + distance_mm, blind=True)
            self.counter.camera("blind_shots" if self.queue.schedule(shot) else "blind_shots_late")

    def refused(self, frames: int) -> None:
        """So many frames before the next one were refused by the camera's watch: they are bad, not dropped."""
        if self._last_number >= 0:
            self._last_number += frames

    def unseen(self, belt_mm: float) -> None:
        """Nothing can be seen now: items that left the picture meanwhile are judged by the views they have."""
        for track in self._tracker.close_passed(belt_mm):
            if not track.complete:
                self._finish(track)

    def flush(self) -> None:
        """Finishes the items in sight (the camera ended)."""
        for track in self._tracker.close_all():
            if not track.complete:
                self._finish(track)

    def snapshot(self) -> CoreState:
        """A copy of the state between two frames (some 50 microseconds); the arrays of the tracks are shared."""
        background = self._locator.background
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
        """Goes on from a snapshot; its tracks are taken over."""
        self._ids, self._last_number = state.ids, state.last_number
        self._locator.restore(state.background)
        self._tracker.restore(state.tracks)

    @property
    def locator(self) -> Locator:
        """For whoever takes views of its own (`collect`)."""
        return self._locator

    @property
    def tracker(self) -> Tracker:
        """As above."""
        return self._tracker
