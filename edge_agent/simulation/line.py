"""Simulates a seeded sorting line: belt, rolling apples, camera, encoder, ejectors, and the truth about all of them.

It implements the seams of `edge_agent.interfaces` like hardware does, in real time or in virtual time (`virtual=True`:
each read is the next exposure and the clock follows the frames). The same seed and configuration give the same
frames, byte for byte. Trouble can be switched on at any moment or by a schedule.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.interfaces import Frame, Lane, LineGeometry, Shot, Sighting
from edge_agent.simulation.belt import BeltMotion
from edge_agent.simulation.faults import NO_FAULTS, Faults, FaultsFile, ScheduledFaults, parse_fault_schedule
from edge_agent.simulation.optics import Optics
from edge_agent.simulation.rendering import (
    BOLT,
    VARIETIES,
    Kind,
    RollingItem,
    Sprite,
    draw_belt,
    draw_fixtures,
    hollowed,
    load_photos,
    render_library,
)
from models.errors import CameraError, ConfigError

Positive = Annotated[float, msgspec.Meta(gt=0.0)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_SETTLE_MM: Final = 80.0
_GROUPS: Final = {"sound": "sound", "hollow": "hollow"}
"""Kind -> group of the library; every other kind is a defect."""


class SimulationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the simulated line."""

    seed: int = 1
    width_px: Annotated[int, msgspec.Meta(ge=160, le=4096)] = 640
    lane_px: Annotated[int, msgspec.Meta(ge=100, le=1024)] = 170
    """Height of one lane in the image."""
    lanes: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    mm_per_px: Positive = 0.625
    frames_per_s: Annotated[float, msgspec.Meta(gt=0.0, le=500.0)] = 30.0
    belt_mm_s: Positive = 1000.0
    items_per_s: Annotated[float, msgspec.Meta(gt=0.0, le=12.5)] = 9.0
    """Mean number of items per second and lane at nominal belt speed."""
    touching_share: Share = 0.05
    """Share of the items that touch the one before."""
    defect_share: Share = 0.25
    hollow_share: Share = 0.0
    """Share of the items without a visible defect that are hollow: they weigh four fifths of a sound one."""
    varieties: tuple[str, ...] = ("red", "golden", "bicolour")
    apples: Annotated[int, msgspec.Meta(ge=8, le=2000)] = 32
    """Number of different apples that are drawn; each item on the belt is one of them."""
    photos: str = ""
    """Folder of real photographs (labels.csv with item, axis, frame) to roll instead of drawn apples."""
    reject_mm: Positive = 700.0
    """Distance of the reject outlet from column 0."""
    nozzle_mm: Positive = 25.0
    """An item is hit when its centre is this close to the nozzle."""
    valve_delay_ms: Annotated[float, msgspec.Meta(ge=0.0, le=200.0)] = 0.0
    """Time from command to effect of the valves; it varies by a tenth from shot to shot."""
    bolts: Annotated[int, msgspec.Meta(ge=0, le=64)] = 6
    """Number of bolts on each lane divider, by which the picture has a fixed place along the belt, too."""
    noise: Annotated[float, msgspec.Meta(ge=0.0, le=30.0)] = 2.0
    """Camera noise, standard deviation in grey levels."""
    again: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    """Number of the pass; passes of one seed carry the same items in the same order but roll and look different."""
    shifted_lanes: Annotated[int, msgspec.Meta(ge=0, le=7)] = 0
    """Lane in which the items of lane 0 run; the other lanes follow cyclically."""

    def geometry(self) -> LineGeometry:
        """Returns the lanes and outlets in this camera's image."""
        lanes = tuple(Lane(k * self.lane_px, (k + 1) * self.lane_px) for k in range(self.lanes))
        return LineGeometry(self.width_px, self.lanes * self.lane_px, self.mm_per_px, lanes, {"reject": self.reject_mm})


@dataclass(slots=True)
class SimulatedItem:
    """One item on the belt, and the outlet it left by."""

    item_id: int
    lane: int
    item_mm: float
    apple: RollingItem
    phase: float
    """Phase of the roll when the item enters, in turns (0..1)."""
    weight_g: float
    ejected_to: str = ""


@dataclass(frozen=True, slots=True)
class ViewTruth:
    """The true label of one view of one item."""

    item_id: int
    kind: str
    """Kind of the item."""
    label: str
    """Label of the view: the kind where the defect shows, else `sound`."""
    visible_share: float
    variety: str
    weight_g: float
    apple: str
    """Name of the drawn apple; several items on a belt may be the same apple."""


@dataclass(frozen=True, slots=True)
class SimulatedTruth:
    """Counters since the start."""

    entered: int
    outcomes: dict[str, int]
    """Number of items that have passed the last outlet, by `kind>outlet`."""
    ejections: dict[str, int]
    """Number of ejections by result: `on_time`, `late`, `wrong`, `gap`, `dead` (a valve without effect)."""
    frames_dropped: int


@dataclass(slots=True)
class _LaneState:
    rng: np.random.Generator
    next_mm: float
    items: deque[SimulatedItem] = field(default_factory=deque)
    last_half_mm: float = 0.0


class SimulatedLine:
    """Camera, encoder and ejector of one simulated line.

    Args:
        config: Settings of the line.
        schedule: Faults by time since the start.
        faults_file: File that names the faults that hold now; read when it changes.
        virtual: Whether time advances with reads only.
        clock: Monotonic clock in seconds (real time only).
        sleep: Function that waits (real time only).
    """

    def __init__(
        self,
        config: SimulationConfig,
        *,
        schedule: str = "",
        faults_file: Path | None = None,
        virtual: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        unknown = sorted(set(config.varieties) - set(VARIETIES))
        if unknown or not config.varieties:
            raise ConfigError("simulation.bad_variety", "No such variety.", expected=sorted(VARIETIES), got=unknown)
        self.config = config
        self.geometry = config.geometry()
        self._virtual, self._clock, self._sleep = virtual, clock, sleep
        self._schedule: list[ScheduledFaults] = parse_fault_schedule(schedule)
        self._faults_file = FaultsFile(faults_file) if faults_file else None
        self._lock = threading.Lock()
        rng = np.random.default_rng(config.seed)
        self._library = self._make_library(rng)
        size = (self.geometry.height_px, config.width_px)
        self._belt = draw_belt(rng, size, config.lane_px)
        self._effects = np.random.default_rng((config.seed, 99))
        self._optics = Optics(rng, size, config.noise, self._effects)
        self._fixtures = draw_fixtures(np.random.default_rng((config.seed, 95)), size, config.lane_px, config.bolts)
        if config.again:
            self._optics.use_noise(np.random.default_rng((config.seed, 97, config.again)), config.noise)
        sources = [(lane - config.shifted_lanes) % config.lanes for lane in range(config.lanes)]
        self._lanes = [
            _LaneState(np.random.default_rng((config.seed, source)), 200.0 + 37.0 * lane)
            for lane, source in enumerate(sources)
        ]
        self._roll = [np.random.default_rng((config.seed, source, 96, config.again)) for source in sources]
        self._valves = np.random.default_rng((config.seed, 98))
        self._sightings: deque[tuple[float, Sighting]] = deque(maxlen=4096)
        self._trouble, self._trouble_s = NO_FAULTS, 0.0
        """The faults that hold, and since when."""
        self._number = -1
        self._frozen: NDArray[np.uint8] | None = None
        self._drawing_s = 0.0
        self._entered = 0
        self._outcomes: Counter[str] = Counter()
        self._ejections: Counter[str] = Counter()
        self._dropped = 0
        self.start()

    def start(self) -> None:
        """Starts the belt now. A line that was drawn ahead and not read yet may be started again."""
        self._start_s = self._now_s = 0.0 if self._virtual else self._clock()
        self._motion = BeltMotion(self._start_s, self.config.belt_mm_s)

    def _make_library(self, rng: np.random.Generator) -> dict[str, list[RollingItem]]:
        config = self.config
        if config.photos:
            items = load_photos(Path(config.photos), mm_per_px=config.mm_per_px)
            if config.hollow_share:
                items += [hollowed(item) for item in items if item.kind == Kind.SOUND]
        else:
            hollow = max(2, config.apples // 4) if config.hollow_share else 0
            items = render_library(
                rng, apples=config.apples, hollow=hollow, varieties=config.varieties, mm_per_px=config.mm_per_px
            )
        library: dict[str, list[RollingItem]] = {}
        for item in items:
            library.setdefault(_GROUPS.get(item.kind, "defect"), []).append(item)
        return library

    # -- camera -----------------------------------------------------------------------------------------------

    def read(self, timeout_s: float) -> Frame | None:
        """Returns the freshest due exposure; see `FrameSource.read`."""
        period = 1.0 / self.config.frames_per_s
        number = self._number + 1
        if not self._virtual:
            wait_s = self._start_s + number * period - self._clock() - self._drawing_s
            self._sleep(min(max(wait_s, 0.0), timeout_s))
            if wait_s > timeout_s:
                return None
            number = max(number, int((self._clock() - self._start_s) / period))
        at_s = self._start_s + number * period
        self._now_s = at_s
        with self._lock:
            self._dropped += number - self._number - 1
        self._number = number
        if self._virtual:
            return self._expose(number, at_s)
        # A camera needs no processor to expose: the frame is drawn just before it is due, not after.
        started = self._clock()
        frame = self._expose(number, at_s)
        ended = self._clock()
        self._drawing_s += 0.2 * (min(1.5 * (ended - started), period / 2.0) - self._drawing_s)
        self._sleep(max(at_s - ended, 0.0))
        return frame

    def _expose(self, number: int, at_s: float) -> Frame | None:
        self._follow_schedule(at_s - self._start_s)
        trouble = self._trouble
        belt_mm = self.position_mm(at_s)
        self._advance(belt_mm)
        if trouble.absent:
            raise CameraError("camera.absent", "The simulated camera is unplugged.", expected="a frame", got="nothing")
        if trouble.drop_share and self._effects.random() < trouble.drop_share:
            with self._lock:
                self._dropped += 1
            return None
        if trouble.freeze and self._frozen is not None:
            return Frame(self._frozen.copy(), number, at_s, belt_mm)
        scene = self._draw(belt_mm)
        image = self._optics.expose(scene, number, trouble, at_s=at_s, since_s=at_s - self._trouble_s)
        if trouble.wrong_size:
            image = np.ascontiguousarray(image[::2, ::2])
        self._frozen = image
        return Frame(image, number, at_s, belt_mm)

    def close(self) -> None:
        """Does nothing; the simulation holds no device."""

    @property
    def frames_dropped(self) -> int:
        """Number of exposures that were not fetched in time or were lost by a fault."""
        return self._dropped

    def _draw(self, belt_mm: float) -> NDArray[np.uint8]:
        config = self.config
        offset = int(belt_mm / config.mm_per_px) % config.width_px
        # The belt's own texture moves with it: a window into a strip that repeats.
        image = self._belt[:, config.width_px - offset : 2 * config.width_px - offset].copy()
        for place in self._fixtures:
            image[place] = BOLT
        with self._lock:  # a valve that fires advances the belt from its own thread
            standing = [list(state.items) for state in self._lanes]
        for lane, items in enumerate(standing):
            rows = self.geometry.lanes[lane]
            for item in items:
                x = (belt_mm - item.item_mm) / config.mm_per_px
                if not item.ejected_to or belt_mm < item.item_mm + self.geometry.outlets_mm[item.ejected_to]:
                    _paste(image, self._sprite(item, belt_mm), x, (rows.top_px + rows.bottom_px) / 2)
        return image

    def _sprite(self, item: SimulatedItem, belt_mm: float) -> Sprite:
        return item.apple.sprites[self._phase(item, belt_mm)]

    def _phase(self, item: SimulatedItem, belt_mm: float) -> int:
        turns = item.phase + (belt_mm - item.item_mm) / (np.pi * item.apple.length_mm)
        return int(turns * len(item.apple.sprites)) % len(item.apple.sprites)

    # -- belt -------------------------------------------------------------------------------------------------

    def position_mm(self, at_s: float) -> float:
        """Returns the belt position; see `Encoder`."""
        return self._motion.position_mm(at_s)

    def speed_mm_s(self) -> float:
        """Returns the present belt speed; see `Encoder`."""
        return self._motion.speed_mm_s(self.now())

    def now(self) -> float:
        """Returns the line's clock, virtual or real, seconds."""
        return self._now_s if self._virtual else self._clock()

    def _follow_schedule(self, elapsed_s: float) -> None:
        while self._schedule and self._schedule[0].after_s <= elapsed_s:
            self.set_trouble(self._schedule.pop(0).trouble)
        found = self._faults_file.changed(elapsed_s) if self._faults_file else None
        if found is not None:
            self.set_trouble(found)

    def stop(self, _reason: str) -> None:
        """Stops the belt for the fail-safe; see `BeltControl`."""
        self._motion.hold(self.now(), held=True)

    def run(self) -> None:
        """Lets the belt run again; see `BeltControl`."""
        self._motion.hold(self.now(), held=False)

    def set_trouble(self, trouble: Faults) -> None:
        """Switches to these faults; the belt ramps to its new speed."""
        if not trouble.freeze:
            self._frozen = None
        self._trouble, self._trouble_s = trouble, self.now()
        self._motion.drive(0.0 if trouble.stopped else self.config.belt_mm_s * trouble.speed_factor, self.now())

    def _advance(self, belt_mm: float) -> None:
        """Lets items enter and settles those that have passed the last outlet."""
        with self._lock:
            for lane, state in enumerate(self._lanes):
                while state.next_mm - 100.0 <= belt_mm:
                    state.items.append(self._next_item(lane, state))
                passed = belt_mm - max(self.geometry.outlets_mm.values()) - _SETTLE_MM
                while state.items and state.items[0].item_mm < passed:
                    item = state.items.popleft()
                    self._outcomes[f"{item.apple.kind}>{item.ejected_to or 'pass'}"] += 1

    def _next_item(self, lane: int, state: _LaneState) -> SimulatedItem:
        config, rng, trouble = self.config, state.rng, self._trouble
        draws = rng.random(5)
        share = config.defect_share if trouble.defect_share < 0.0 else trouble.defect_share
        group = "defect" if draws[0] < share else "sound"
        if group == "sound" and config.hollow_share and rng.random() < config.hollow_share and not trouble.variety:
            group = "hollow"
        candidates = self._library.get(group) or next(iter(self._library.values()))
        if trouble.variety:
            candidates = self._foreign(trouble.variety, group)
        apple = candidates[int(draws[1] * len(candidates))]
        half_mm = apple.length_mm / 2.0
        pitch_mm = config.belt_mm_s / config.items_per_s
        room_mm = max(2.0, (pitch_mm - 75.0) / (1.0 - config.touching_share))
        gap_mm = 0.0 if draws[2] < config.touching_share else 0.2 * room_mm + rng.exponential(0.8 * room_mm)
        item_mm = max(state.next_mm, state.next_mm + state.last_half_mm + gap_mm + half_mm)
        state.next_mm, state.last_half_mm = item_mm, half_mm
        self._entered += 1
        return SimulatedItem(
            item_id=self._entered,
            lane=lane,
            item_mm=item_mm,
            apple=apple,
            phase=float(self._roll[lane].random()) if config.again else float(draws[3]),
            weight_g=_density(apple) * apple.length_mm**3 * (0.95 + 0.1 * float(draws[4])),
        )

    def _foreign(self, variety: str, group: str) -> list[RollingItem]:
        """Returns apples of a variety that is not in the library; they are drawn when first needed."""
        key = f"{variety}:{group}"
        if key not in self._library:
            rng = np.random.default_rng((self.config.seed, len(variety)))
            for item in render_library(rng, apples=24, varieties=(variety,), mm_per_px=self.config.mm_per_px):
                name = "sound" if item.kind == Kind.SOUND else "defect"
                self._library.setdefault(f"{variety}:{name}", []).append(item)
        return self._library[key]

    # -- ejectors and truth -----------------------------------------------------------------------------------

    def fire(self, shot: Shot, at_s: float) -> None:
        """Opens one valve; see `Ejector`. The places of the items decide what it hits."""
        outlet_mm = self.geometry.outlets_mm[shot.outlet]
        self._advance(self.position_mm(at_s))
        with self._lock:
            trouble = self._trouble if self._trouble.valve_lane == shot.lane else NO_FAULTS
            delay_ms = self.config.valve_delay_ms * self._valves.normal(1.0, 0.1) + trouble.valve_slow_ms
            dead = trouble.valve_miss > 0.0 and self._valves.random() < trouble.valve_miss
            effect_s = at_s + max(delay_ms, 0.0) / 1000.0
            belt_mm = self.position_mm(effect_s)
            if dead:
                self._ejections["dead"] += 1
                return
            standing = [i for i in self._lanes[shot.lane].items if not i.ejected_to]
            aimed_mm = shot.target_mm - outlet_mm
            hit = min(standing, key=lambda i: abs(belt_mm - i.item_mm - outlet_mm), default=None)
            if hit is not None and abs(belt_mm - hit.item_mm - outlet_mm) > self.config.nozzle_mm:
                hit = None
            aimed = min(standing, key=lambda i: abs(i.item_mm - aimed_mm), default=None)
            if aimed is not None and abs(aimed.item_mm - aimed_mm) > self.config.nozzle_mm:
                aimed = None
            if hit is not None:
                hit.ejected_to = shot.outlet
                self._sightings.append((effect_s, Sighting(shot.lane, shot.outlet, belt_mm)))
            self._ejections[_judge_shot(hit, aimed)] += 1

    def load_cell(self, lane: int) -> "LoadCell":
        """Returns the load cell that weighs the items of a lane before they are seen."""
        return LoadCell(self, lane)

    def sightings(self, until_s: float) -> list[Sighting]:
        """Returns what the photo-eyes right behind the valves saw; see `Confirmation`."""
        found: list[Sighting] = []
        with self._lock:
            while self._sightings and self._sightings[0][0] <= until_s:
                found.append(self._sightings.popleft()[1])
        return found

    def view_truth(self, belt_mm: float, lane: int, item_mm: float, tolerance_mm: float = 25.0) -> ViewTruth | None:
        """Returns the truth of the view of the item at this place and belt position; None where there is no item."""
        with self._lock:
            items = list(self._lanes[lane].items)
        item = min(items, key=lambda i: abs(i.item_mm - item_mm), default=None)
        if item is None or abs(item.item_mm - item_mm) > tolerance_mm:
            return None
        phase = self._phase(item, belt_mm)
        return ViewTruth(
            item_id=item.item_id,
            kind=item.apple.kind,
            label=item.apple.labels[phase],
            visible_share=item.apple.shares[phase],
            variety=item.apple.variety,
            weight_g=item.weight_g,
            apple=item.apple.name,
        )

    def items(self) -> list[SimulatedItem]:
        """Returns the items on the belt that have not been ejected, by lane."""
        with self._lock:
            return [item for lane in self._lanes for item in lane.items if not item.ejected_to]

    def truth(self) -> SimulatedTruth:
        """Returns the counters since the start."""
        with self._lock:
            return SimulatedTruth(self._entered, dict(self._outcomes), dict(self._ejections), self._dropped)


@dataclass(frozen=True, slots=True)
class LoadCell:
    """The load cell of one lane; see `ItemScalars`."""

    line: SimulatedLine
    lane: int

    def value_for(self, item_mm: float) -> float | None:
        """Returns the weight of the item at this place, grams."""
        near = [i for i in self.line.items() if i.lane == self.lane and abs(i.item_mm - item_mm) <= 30.0]
        return min(near, key=lambda i: abs(i.item_mm - item_mm)).weight_g if near else None


def _density(apple: RollingItem) -> float:
    """Returns grams per cubic millimetre of length; a hollow apple has four fifths."""
    return 0.00036 if apple.kind == Kind.HOLLOW else 0.00045


def _judge_shot(hit: SimulatedItem | None, aimed: SimulatedItem | None) -> str:
    if hit is not None:
        return "on_time" if hit is aimed else "wrong"
    return "late" if aimed is not None else "gap"


def _paste(image: NDArray[np.uint8], sprite: Sprite, x: float, y: float) -> None:
    """Puts a sprite's centre at (x, y), cut at the image's edges."""
    height, width = sprite.colour.shape[:2]
    left, top = round(x - width / 2), round(y - height / 2)
    x0, x1 = max(left, 0), min(left + width, image.shape[1])
    y0, y1 = max(top, 0), min(top + height, image.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    place = image[y0:y1, x0:x1]
    kept = cv2.multiply(place, sprite.keeps[part], scale=1.0 / 255.0)
    cv2.add(kept, sprite.colour[part], dst=place)
