"""One frame through the line: locate, track, take views, infer, decide, schedule. No thread, no pipe, no own clock.

`LineCore.process` is the whole path from frame to ejector and the only place where its order stands; the line
process, the unpaced replay, `collect` and the benchmarks all call it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.camera import open_camera
from edge_agent.counting import LineCounter
from edge_agent.ejection import EjectionQueue
from edge_agent.judging import Judge, Judged
from edge_agent.line_config import LineConfig
from edge_agent.locate import Located, Locator
from edge_agent.seams import Ejector, Encoder, Frame, FrameSource, Lane, LineGeometry, Shot
from edge_agent.simulation import SimulatedLine, SimulationConfig
from edge_agent.tracking import Track, Tracker, ViewPicker
from models.errors import BundleError, CameraError

_BLIND: Final = 0.85
_MIN_OBSERVATIONS: Final = 2


@dataclass(slots=True)
class NoEjector:
    """For cameras without valves: counts what would have been fired."""

    fired: int = 0

    def fire(self, _shot: Shot, _at_s: float) -> None:
        """Counts."""
        self.fired += 1


@dataclass(slots=True)
class World:
    """What the line is connected to."""

    source: FrameSource
    encoder: Encoder
    ejector: Ejector
    simulation: SimulatedLine | None = None
    description: str = ""


def open_world(config: LineConfig, *, virtual: bool = False) -> World:
    """Opens camera, encoder and ejector of a configuration.

    Raises:
        CameraError: There is no such camera.
        ConfigError: The simulation's settings are impossible.
    """
    if config.camera == "simulated":
        line = SimulatedLine(simulation_config(config), schedule=config.trouble, virtual=virtual)
        rolling = "photographs" if config.photos else "apples"
        return World(line, line, line, line, f"simulated, {config.lanes} lanes of {rolling}")
    camera = open_camera(
        config.camera,
        belt_mm_s=config.belt_mm_s,
        frames_per_s=config.frames_per_s,
        paced=config.paced,
        loop=config.loop,
    )
    return World(camera, camera.encoder, NoEjector(), None, config.camera)  # type: ignore[attr-defined]


def simulation_config(config: LineConfig) -> SimulationConfig:
    """The simulated line of a line configuration."""
    return SimulationConfig(
        seed=config.seed,
        lanes=config.lanes,
        mm_per_px=config.mm_per_px,
        frames_per_s=config.frames_per_s,
        belt_mm_s=config.belt_mm_s,
        items_per_s=config.items_per_s,
        defect_share=config.defect_share,
        photos=config.photos,
        reject_mm=config.outlets_mm.get("reject", 700.0),
    )


def geometry_of(config: LineConfig, world: World, frame: Frame) -> LineGeometry:
    """Lanes of the configuration in this camera's image."""
    if world.simulation is not None:
        return world.simulation.geometry
    height, width = frame.image.shape[:2]
    if config.lane_rows:
        lanes = tuple(Lane(max(0, top), min(height, bottom)) for top, bottom in config.lane_rows)
    else:
        lanes = tuple(Lane(k * height // config.lanes, (k + 1) * height // config.lanes) for k in range(config.lanes))
    return LineGeometry(width, height, config.mm_per_px, lanes, config.outlets_mm)


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
    """

    geometry: LineGeometry
    counter: LineCounter
    queue: EjectionQueue
    clock: Callable[[], float]
    on_model_failure: Callable[[Judge, BundleError], None] = lambda _judge, _error: None
    on_verdict: Callable[[Judged, str], None] | None = None
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
        if self._locator.coverage > _BLIND:
            self.counter.count("frames_bad")
            places = []
        seen, closed = self._tracker.update(places, frame.number, frame.captured_s, frame.belt_mm)
        self._take_views(frame, seen)
        for track in closed:
            self._finish(track, frame.captured_s)

    def _check_size(self, frame: Frame) -> None:
        expected = (self.geometry.height_px, self.geometry.width_px, 3)
        if frame.image.shape != expected:
            self.counter.count("frames_bad")
            raise CameraError(
                "camera.wrong_size", "A frame has another size than the line.", expected=expected, got=frame.image.shape
            )

    def _take_views(self, frame: Frame, seen: list[tuple[Track, Located]]) -> None:
        """Takes the views this frame offers and judges them in one batch per bundle."""
        batches: dict[int, tuple[Judge, list[Track]]] = {}
        for track, place in seen:
            if track.judge is None:
                track.judge = self.judge
            judge = track.judge
            if not isinstance(judge, Judge) or not self._picker.wants(track, place):
                continue
            if judge.take_view(self._locator, frame.image, track, place):
                batches.setdefault(id(judge), (judge, []))[1].append(track)
        for judge, tracks in batches.values():
            try:
                elapsed_ms = judge.infer(tracks)
            except BundleError as error:
                self._fail(judge, tracks, error)
            else:
                self.counter.inference(elapsed_ms, len(tracks))

    def _fail(self, judge: Judge, tracks: list[Track], error: BundleError) -> None:
        for track in tracks:
            track.views.pop()
        if self.judge is judge:
            self.use(None)
            self.on_model_failure(judge, error)

    def _finish(self, track: Track, captured_s: float) -> None:
        """The item's last frame is behind it: verdict, then outlet."""
        judge = track.judge
        if not isinstance(judge, Judge) or not track.probabilities:
            if track.observations >= _MIN_OBSERVATIONS:
                self.counter.count("items_unjudged")
            return
        judged = judge.decide(track, self.counter.variety)
        outlet = judged.verdict.outlet
        distance_mm = self.geometry.outlets_mm.get(outlet)
        if distance_mm is not None:
            shot = Shot(track.lane, outlet, track.item_id, track.item_mm + distance_mm)
            if not self.queue.schedule(shot):
                self.counter.count("verdicts_late")
                outlet = judge.recipe.late_outlet
        own = judge is self.judge
        self.items_on_bundle += own
        self.counter.verdict(judged, outlet, (self.clock() - captured_s) * 1000.0, own_bundle=own)
        if self.on_verdict is not None:
            self.on_verdict(judged, outlet)

    def flush(self) -> None:
        """Finishes the items in sight (the camera ended)."""
        for track in self._tracker.close_all():
            self._finish(track, track.last_captured_s)

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


def load_judge(config: LineConfig) -> Judge | None:
    """The bundle a configuration starts with, or None.

    Raises:
        BundleError: It is not usable.
    """
    if not config.bundle:
        return None
    return Judge(Path(config.bundle), digest=config.digest or None, threads=config.threads)
