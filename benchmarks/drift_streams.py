"""Streams of windows of simulated lines: items as numbers, not pictures, so that weeks take seconds.

Sites of several lines get the same lots. A lot has a style (heavy-tailed, so some lots are odd), a class mix and a
variety; a line has a camera with its own offsets, light that wanders, day and night, a scale and ejectors. Items have
fourteen correlated measurements; a fixed linear classifier judges them, and its confidence is part of the features.
Truth is known for every item. The constants stand here and are judgement; nothing was taken from a real line.
"""

import math
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from control_plane.detection.accuracy import accuracy_reference
from control_plane.detection.facts import BundleFacts, facts_of
from control_plane.detection.finding import LineSum
from models.histogram import pack_counts
from models.profile import BINS, Profile, build_profile, feature_names
from models.statistics import Moments
from models.windows import CameraCounts, LaneCounts, Window

Floats = NDArray[np.float64]
BUNDLE: Final = "b" * 64
CLASSES: Final = ("sound", "rot", "worm", "scar")
OUTLETS: Final = {"sound": "pass", "rot": "reject", "worm": "reject", "scar": "juice"}
VARIETIES: Final = ("gala", "golden")
LANES: Final = 4
SHIFT_H: Final = 16
"""Hours of production a day."""
NAMES: Final = feature_names(5)
RAW: Final = 14
"""Nine measurements of the views and five numbers of the embedding."""
LIGHTNESS, CONTRAST, SHARPNESS, HIGHLIGHT, DARK, AREA, ASPECT, CENTRE_X, CENTRE_Y = range(9)
LOT_SPREAD: Final = 0.19
"""Standard deviation between lots, in standard deviations of an item."""
CAMERA_SPREAD: Final = 0.15
VARIETY_SHIFT: Final = 0.4
NEW_DEFECT: Final = 5.0
"""How far a defect that the classifier has never seen lies from sound items; known ones lie at 3.4."""
MIX: Final = np.array([0.86, 0.05, 0.05, 0.04])
LOT_MINUTES: Final = 40.0
WEIGHT_EDGES: Final = tuple(float(e) for e in np.exp(np.linspace(math.log(110.0), math.log(260.0), BINS - 1)))
LENGTH_EDGES: Final = tuple(float(e) for e in np.exp(np.linspace(math.log(62.0), math.log(79.0), BINS - 1)))
PX: Final = 6.0
DIRT_CELLS: Final = 14


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, from a moment on."""

    name: str = ""
    start_s: float = math.inf
    ramp_s: float = 0.0
    lines: tuple[int, ...] = (0,)
    """Rows of the site; a change of the fruit concerns all."""
    size: float = 1.0

    def share(self, now_s: float) -> float:
        """Returns how much of it is there, 0 to 1."""
        if now_s < self.start_s:
            return 0.0
        return min(1.0, (now_s - self.start_s) / self.ramp_s) if self.ramp_s else 1.0


NOTHING: Final = Fault()


class Population:
    """Apples, and a classifier for them."""

    def __init__(self, seed: int = 7) -> None:
        rng = np.random.default_rng(seed)
        self.centres = np.zeros((len(CLASSES) + 1, RAW))
        """Classes, then a defect that the classifier has never seen."""
        for k in range(1, len(CLASSES) + 1):
            self.centres[k, 9:] = rng.normal(0.0, 1.0, 5)
            self.centres[k, 9:] *= (3.4 if k < len(CLASSES) else NEW_DEFECT) / np.linalg.norm(self.centres[k, 9:])
            self.centres[k, [CONTRAST, DARK]] = rng.uniform(0.5, 1.2, 2)
        root = np.eye(RAW) + 0.25 * rng.normal(0.0, 1.0, (RAW, RAW)) / math.sqrt(RAW)
        self.root = root / np.linalg.norm(root, axis=1, keepdims=True)
        inverse = np.linalg.inv(self.root @ self.root.T)
        known = self.centres[: len(CLASSES)]
        self.weights = inverse @ known.T
        self.offsets = -0.5 * np.einsum("kd,de,ke->k", known, inverse, known) + np.log(MIX)
        self.profile, self.facts = self._learn(rng)

    def judge(self, raw: Floats) -> tuple[Floats, NDArray[np.intp]]:
        """Returns features (N, 16) and verdicts (N,)."""
        scores = raw @ self.weights + self.offsets
        scores -= scores.max(axis=1, keepdims=True)
        p = np.exp(scores)
        p /= p.sum(axis=1, keepdims=True)
        defect = np.clip(1.0 - p[:, 0], 1e-6, 1.0 - 1e-6)
        own = np.stack((np.log(defect / (1.0 - defect)), -(p * np.log(np.maximum(p, 1e-12))).sum(axis=1)), axis=1)
        return np.concatenate((raw[:, :9], own, raw[:, 9:]), axis=1), p.argmax(axis=1)

    def _learn(self, rng: np.random.Generator) -> tuple[Profile, BundleFacts]:
        """The profile and the facts of the bundle from 120 lots, as training would make them."""
        lots, each = 120, 150
        truth = np.concatenate([rng.choice(len(CLASSES), size=each, p=rng.dirichlet(60.0 * MIX)) for _ in range(lots)])
        # The training items came from lines as these: lots, cameras and both varieties differ.
        style = rng.standard_t(4.0, (lots, RAW)) * LOT_SPREAD / math.sqrt(2.0) + rng.normal(
            0.0, CAMERA_SPREAD, (lots, RAW)
        )
        style[:, 9:] += VARIETY_SHIFT * rng.integers(2, size=lots)[:, None]
        raw = self.centres[truth] + np.repeat(style, each, axis=0)
        features, found = self.judge(raw + rng.normal(0.0, 1.0, (lots * each, RAW)) @ self.root.T)
        counts = {name: int((found == k).sum()) for k, name in enumerate(CLASSES)}
        profile = build_profile(features.astype(np.float32), NAMES, counts)
        confusion = np.zeros((len(CLASSES), len(CLASSES)), int)
        np.add.at(confusion, (truth, found), 1)
        row = NAMES.index("entropy")
        names = [str(lot) for lot in np.repeat(np.arange(lots), each)]
        known = accuracy_reference(features[:, row], found == truth, profile.edges[row], lots=names)
        facts = facts_of(
            profile,
            confusion=tuple(tuple(int(c) for c in row) for row in confusion),
            varieties=VARIETIES,
            scalar_edges={"weight_g": WEIGHT_EDGES, "length_mm": LENGTH_EDGES},
            outlets=OUTLETS,
            accuracy=known,
        )
        return profile, facts


@dataclass(slots=True)
class Lot:
    """What the items of a lot have in common."""

    name: str
    variety: str
    until_s: float
    style: Floats
    mix: Floats
    size: float
    density: float


@dataclass(slots=True)
class Camera:
    """One line's own offsets."""

    offset: Floats
    lane_offsets: Floats
    sensor: Floats
    """Sharpness, exposure, red, blue, flicker of the empty belt."""
    daylight: float
    """How much day and night change its light."""
    wander: float = 0.0
    lifetime: int = 0


@dataclass(slots=True)
class Totals:
    """What is known of the truth of a span, for the figures of accuracy."""

    items: int = 0
    right: int = 0


@dataclass(slots=True)
class Site:
    """Lines that get the same lots."""

    population: Population
    name: str
    seed: int
    lines: int = 4
    items_per_s: float = 3.0
    lot_spread: float = LOT_SPREAD
    with_lanes: bool = True
    with_sensor: bool = True
    """Whether the agent looks at its camera; older ones do not."""
    now_s: float = 0.0
    fault: Fault = NOTHING
    lots: int = 0
    rng: np.random.Generator = field(init=False)
    cameras: list[Camera] = field(init=False)
    lot: Lot = field(init=False)
    truth: list[Totals] = field(default_factory=list)
    """Per line, of the last span."""
    edges: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.edges = self.population.profile.edge_array()
        self.cameras = [
            Camera(
                offset=self.rng.normal(0.0, CAMERA_SPREAD, RAW),
                lane_offsets=self.rng.normal(0.0, 0.05, (LANES, RAW)),
                sensor=np.array([5.0, 90.0, 0.9, 0.7, 0.01]) * self.rng.uniform(0.9, 1.1, 5),
                daylight=0.09 if k == self.lines - 1 else self.rng.uniform(0.01, 0.05),
            )
            for k in range(self.lines)
        ]
        self.lot = self._next_lot()

    def reseed(self, seed: int) -> None:
        """Another future with the same cameras."""
        self.rng = np.random.default_rng(seed)

    def _next_lot(self) -> Lot:
        self.lots += 1
        rng = self.rng
        variety = self._variety()
        # Student's t with four degrees of freedom, scaled to its standard deviation: some lots are odd.
        style = rng.standard_t(4.0, RAW) * self.lot_spread / math.sqrt(2.0)
        style[9:] += VARIETY_SHIFT * (VARIETIES.index(variety) if variety in VARIETIES else 0)
        style[[CENTRE_X, CENTRE_Y]] *= 0.2
        length_s = 60.0 * LOT_MINUTES * math.exp(0.5 * rng.standard_normal())
        return Lot(
            name=f"{self.name}-{self.lots}",
            variety=variety,
            until_s=self.now_s + min(max(length_s, 300.0), 3.0 * 3600.0),
            style=style,
            mix=rng.dirichlet(60.0 * MIX),
            size=0.08 * rng.standard_normal(),
            density=0.008 * rng.standard_normal(),
        )

    def _variety(self) -> str:
        if self.fault.name == "announced variety" and self.now_s >= self.fault.start_s:
            return "braeburn"
        return VARIETIES[self.rng.integers(len(VARIETIES))]

    def span(self, span_s: float) -> list[LineSum]:
        """Returns the sums of the next seconds of all lines; no production at night."""
        day = 24 * 3600.0
        if self.now_s % day >= SHIFT_H * 3600.0:
            self.now_s = (math.floor(self.now_s / day) + 1) * day
        if self.now_s >= self.lot.until_s or (
            self.fault.name == "announced variety"
            and self.fault.start_s <= self.now_s
            and self.lot.variety != "braeburn"
        ):
            self.lot = self._next_lot()
        found = self._sums(span_s)
        self.now_s += span_s
        return found

    def _sums(self, span_s: float) -> list[LineSum]:
        """All items of the lines at once: calls, not items, are what takes time."""
        fault, rng = self.fault, self.rng
        share = fault.share(self.now_s) * fault.size
        strengths = np.array([share if k in fault.lines else 0.0 for k in range(self.lines)])
        lights = np.array([self._light(camera, span_s) for camera in self.cameras])
        line = np.repeat(np.arange(self.lines), rng.poisson(self.items_per_s * span_s, self.lines))
        lanes = rng.integers(LANES, size=len(line))
        truth, raw = self._items(line, lanes, lights, strengths)
        features, found = self.population.judge(raw)
        if fault.name == "concept drift":
            # What people call a defect has changed: items look as before, and a tenth of the sound ones is none now.
            truth = np.where((found == 0) & (rng.random(len(line)) < 0.1 * strengths[line]), 3, truth)
        bins = np.array([np.searchsorted(self.edges[f], features[:, f]) for f in range(len(NAMES))])
        cells = ((line * LANES + lanes) * len(NAMES) + np.arange(len(NAMES))[:, None]) * BINS + bins
        shape = (self.lines, LANES, len(NAMES), BINS)
        counts = np.bincount(cells.ravel(), minlength=math.prod(shape)).reshape(shape)
        shape = (self.lines, LANES, len(CLASSES))
        classes = np.bincount((line * LANES + lanes) * len(CLASSES) + found, minlength=math.prod(shape)).reshape(shape)
        right = np.bincount(line, weights=truth == found, minlength=self.lines)
        scalars = self._scalars(line, lanes, features[:, AREA], strengths)
        known = self._known(line, truth, found)
        self.truth = [Totals(int(classes[k].sum()), int(right[k])) for k in range(self.lines)]
        return [
            LineSum(
                site=self.name,
                line=f"{self.name}/line-{k}",
                window=msgspec.structs.replace(
                    self._window(k, span_s, counts[k], classes[k], {n: t[k] for n, t in scalars.items()}),
                    ejectors=self._ejectors(classes[k], strengths[k]),
                    camera_health=self._camera_health(k, span_s, lights[k], strengths[k]),
                    truth=known[k],
                ),
            )
            for k in range(self.lines)
        ]

    def _light(self, camera: Camera, span_s: float) -> float:
        pull = 1.0 - math.exp(-span_s / 1800.0)
        camera.wander += -pull * camera.wander + 0.004 * math.sqrt(span_s / 60.0) * self.rng.standard_normal()
        return camera.wander + camera.daylight * math.sin(2.0 * math.pi * self.now_s / 86_400.0)

    def _items(
        self, line: NDArray[np.intp], lanes: NDArray[np.intp], lights: Floats, strengths: Floats
    ) -> tuple[NDArray[np.intp], Floats]:
        rng, name, n = self.rng, self.fault.name, len(line)
        strength = strengths[line]
        mix = np.tile(self.lot.mix, (self.lines, 1))
        if name == "prior shift":
            more = 0.22 * strengths[:, None]
            mix = (1.0 - more) * mix + more * np.eye(len(CLASSES))[1]
        truth = (rng.random(n)[:, None] > mix.cumsum(axis=1)[line, :-1]).sum(axis=1)
        if name == "new defect":
            truth = np.where(rng.random(n) < 0.1 * strength, len(CLASSES), truth)
        raw = self.population.centres[truth] + rng.standard_normal((n, RAW)) @ self.population.root.T
        raw += self.lot.style
        raw += np.array([camera.offset + camera.lane_offsets for camera in self.cameras])[line, lanes]
        raw[:, LIGHTNESS] += 3.0 * lights[line]
        raw[:, HIGHLIGHT] += 2.0 * lights[line]
        if strength.any():
            touched = strength * (lanes == 2) if name == "lane" else strength
            raw += touched[:, None] * _look(name)
            if name.startswith("dirt"):
                # The dirt lies in one part of the picture: a third of the items pass under it.
                raw += (strength * (rng.random(n) < 0.33))[:, None] * _DIRTY_LOOK
        return truth, raw

    def _window(
        self,
        k: int,
        span_s: float,
        counts: NDArray[np.intp],
        classes: NDArray[np.intp],
        scalars: dict[str, NDArray[np.intp]],
    ) -> Window:
        per_lane, whole = classes.sum(axis=1), classes.sum(axis=0)
        nulls = (0,) * len(NAMES)
        self.cameras[k].lifetime += int(whole.sum())
        lanes = [
            LaneCounts(
                items=int(m),
                classes=_table(row),
                outlets=_outlets(row),
                features=pack_counts(c),
                nulls=nulls,
                scalars={name: tuple(table[lane].tolist()) for name, table in scalars.items()},
            )
            for lane, (m, row, c) in enumerate(zip(per_lane, classes, counts, strict=True))
        ]
        return Window(
            started_ms=round(self.now_s * 1000.0),
            duration_ms=round(span_s * 1000.0),
            bundle=BUNDLE,
            lot=self.lot.name,
            variety=self.lot.variety,
            simulated=True,
            frames=round(30 * span_s),
            items=int(whole.sum()),
            lanes=tuple(int(m) for m in per_lane),
            by_lane=tuple(lanes) if self.with_lanes else (),
            classes=_table(whole),
            outlets=_outlets(whole),
            features=counts.sum(axis=0).astype("<u4").tobytes(),
            nulls=nulls,
            scalars={name: tuple(table.sum(axis=0).tolist()) for name, table in scalars.items()},
            lifetime_items=self.cameras[k].lifetime,
        )

    def _scalars(
        self, line: NDArray[np.intp], lanes: NDArray[np.intp], area: Floats, strengths: Floats
    ) -> dict[str, NDArray[np.intp]]:
        """Weights and lengths, counts (lines, lanes, 16): an apple weighs as the cube of its length, lots differ."""
        rng, n = self.rng, len(area)
        size = self.lot.size + 0.12 * area
        scale = 1.0 + 0.05 * strengths if self.fault.name == "scale drift" else np.ones(self.lines)
        grams = 170.0 * np.exp(size + self.lot.density + 0.05 * rng.standard_normal(n)) * scale[line]
        millimetres = 70.0 * np.exp(size / 3.0 + 0.01 * rng.standard_normal(n))
        found = {}
        for name, edges, values in (("weight_g", WEIGHT_EDGES, grams), ("length_mm", LENGTH_EDGES, millimetres)):
            cells = (line * LANES + lanes) * BINS + np.searchsorted(edges, values)
            found[name] = np.bincount(cells, minlength=self.lines * LANES * BINS).reshape(self.lines, LANES, BINS)
        return found

    def _ejectors(self, by_class: NDArray, strength: float) -> dict[str, int]:
        found: dict[str, int] = {}
        for lane in range(LANES):
            for outlet, shots in (("reject", by_class[lane, 1:3].sum()), ("juice", by_class[lane, 3])):
                miss = 0.005
                if self.fault.name == "weak valve" and strength and (lane, outlet) == (1, "reject"):
                    miss = 0.15 * strength
                missed = int(self.rng.binomial(int(shots), miss))
                found |= {
                    f"{lane}/{outlet}/fired": int(shots),
                    f"{lane}/{outlet}/confirmed": int(shots) - missed,
                    f"{lane}/{outlet}/missed": missed,
                }
        return found

    def _known(self, line: NDArray[np.intp], truth: NDArray[np.intp], found: NDArray[np.intp]) -> list[dict[str, int]]:
        """One item in fifty is seeded: its truth is known to the control plane."""
        outlets = ("pass", "reject", "reject", "juice")
        tables: list[dict[str, int]] = [{} for _ in range(self.lines)]
        seeded = np.flatnonzero((self.rng.random(len(line)) < 0.02) & (truth < len(CLASSES)))
        for k, kind, verdict in zip(line[seeded], truth[seeded], found[seeded], strict=True):
            pair = f"{CLASSES[kind]}>{outlets[verdict]}"
            tables[k][pair] = tables[k].get(pair, 0) + 1
        return tables

    def _camera_health(self, k: int, span_s: float, light: float, strength: float) -> CameraCounts:
        rng, name = self.rng, self.fault.name
        if not self.with_sensor:
            return CameraCounts()
        looks = max(round(span_s), 1)
        sharp, exposure, red, blue, flicker = self.cameras[k].sensor
        gain = (1.0 + light) * (1.0 - 0.25 * strength if name == "brightness" else 1.0)
        sharp = sharp + 2.0 * math.log(gain) - (1.0 * strength if name == "blur" else 0.0)
        colour = 0.10 * strength if name == "colour" else 0.0
        shift = (2.0 * PX * strength, -PX * strength) if name == "bump" else (0.0, 0.0)
        dirt = np.zeros((12, 16), np.int64) + (rng.random((12, 16)) < 0.002)
        if name.startswith("dirt") and strength:
            cells = round(DIRT_CELLS * strength)
            for c in range(cells):  # at the upper right
                dirt[1 + c // 4, 11 + c % 4] = rng.binomial(looks, 0.95)
            sharp -= 0.01 * cells
        return CameraCounts(
            looks=looks,
            sharpness=_moments(rng, looks, sharp, 0.05),
            exposure=_moments(rng, looks, exposure * gain, 0.01 * exposure),
            red_to_green=_moments(rng, looks, red * (1.0 + colour), 0.005),
            blue_to_green=_moments(rng, looks, blue * (1.0 - colour), 0.005),
            flicker=_moments(rng, looks, flicker, 0.004),
            shift_x_px=_moments(rng, looks, shift[0], 0.3),
            shift_y_px=_moments(rng, looks, shift[1], 0.3),
            dirt_looks=looks,
            dirt=pack_counts(np.minimum(dirt, looks)),
        )


_DIRTY_LOOK: Final = np.zeros(RAW)
_DIRTY_LOOK[[LIGHTNESS, SHARPNESS, DARK]] = (-0.6, -0.5, 0.6)


def _look(name: str) -> Floats:
    """What a fault does to the measurements of an item, in standard deviations of an item."""
    change = np.zeros(RAW)
    if name == "brightness":
        change[[LIGHTNESS, CONTRAST, HIGHLIGHT, DARK]] = (-0.8, -0.4, -0.7, 0.4)
        change[9] = 0.15
    elif name == "colour":
        change[9:12] = (0.3, -0.2, 0.2)
    elif name == "blur":
        change[[SHARPNESS, CONTRAST]] = (-1.0, -0.2)
        change[10] = -0.25
    elif name == "bump":
        change[[CENTRE_X, CENTRE_Y]] = (0.6, -0.3)
    elif name == "lane":
        change[[LIGHTNESS, HIGHLIGHT]] = (-0.35, -0.3)
    elif name == "new variety":
        change[[AREA, ASPECT]] = (0.9, -0.7)
        change[9:] = (0.6, -0.5, 0.4, 0.5, -0.4)
    return change


def _moments(rng: np.random.Generator, looks: int, mean: float, deviation: float) -> Moments:
    """The sums of so many normal measurements, without drawing each."""
    total = round(1000.0 * (looks * mean + math.sqrt(looks) * deviation * rng.standard_normal()))
    inner = looks * (1000.0 * deviation) ** 2 * rng.chisquare(looks) / looks
    return Moments(looks, total, math.ceil(total * total / looks + inner))


def _table(row: NDArray) -> dict[str, int]:
    return {name: int(c) for name, c in zip(CLASSES, row, strict=True)}


def _outlets(row: NDArray) -> dict[str, int]:
    return {"pass": int(row[0]), "reject": int(row[1] + row[2]), "juice": int(row[3])}
