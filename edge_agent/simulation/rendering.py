"""Draws the pictures of apples for the simulated line, once at its start; they are pasted afterwards.

Each apple is a sphere with a surface of its own (skin, lenticels, stem cavity, calyx, perhaps a defect) that is
looked up for a ring of roll phases, so that a defect turns in and out of sight as the item rolls. The truth of
every phase (how much of the visible disc is defect) comes from the same surface. This module has no
notion of time or belts.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from models.errors import InputError
from models.preprocess import decode_photo, segment_photo

Floats = NDArray[np.float32]
PHASES: Final = 20
"""Pictures per turn of a rendered apple: 18 degrees each."""
BOLT: Final = (118, 112, 106)
"""Colour of the bolts on the lane dividers, BGR."""
_BOLT_PX: Final = 14
_ROWS, _COLUMNS = 96, 192
_LIGHT: Final = np.array([-0.25, -0.45, 0.86], np.float32)


class Kind(StrEnum):
    """The kinds of items: sound, or the defect."""

    SOUND = "sound"
    ROT = "rot"
    WORM = "worm"
    BRUISE = "bruise"
    SCAB = "scab"
    HOLLOW = "hollow"
    """Looks sound and is light for its size: only a scale reveals it."""


DEFECTS: Final = (Kind.ROT, Kind.WORM, Kind.BRUISE, Kind.SCAB)
# Share of the visible disc from which a person would call the view defective; a hole shows at any size.
VISIBLE_SHARE: Final = {Kind.ROT: 0.015, Kind.WORM: 0.004, Kind.BRUISE: 0.02, Kind.SCAB: 0.008}
# Base, second colour (BGR) and how much of the second one shows.
VARIETIES: Final = {
    "red": ((38, 34, 150), (60, 110, 190), 0.25),
    "golden": ((62, 186, 204), (70, 175, 170), 0.35),
    "green": ((70, 168, 128), (80, 190, 165), 0.4),
    "bicolour": ((75, 180, 205), (45, 45, 175), 0.5),
    "russet": ((70, 130, 165), (60, 105, 140), 0.6),
}


@dataclass(frozen=True, slots=True)
class Sprite:
    """One picture of an item: its colour multiplied by its coverage, and the share that the belt keeps."""

    colour: NDArray[np.uint8]
    """uint8 (h, w, 3) BGR."""
    keeps: NDArray[np.uint8]
    """uint8 (h, w, 3), 0 where the item covers the belt."""


@dataclass(frozen=True, slots=True)
class RollingItem:
    """One apple as it rolls: its pictures by phase and the truth of each."""

    kind: str
    variety: str
    sprites: tuple[Sprite, ...]
    shares: tuple[float, ...]
    """Share (0..1) of the visible disc that is defect, for each phase."""
    labels: tuple[str, ...]
    """Label of the view for each phase: the kind where the defect shows, else `sound`; always `hollow` where it is."""
    length_mm: float
    name: str


def render_library(
    rng: np.random.Generator, *, apples: int, varieties: tuple[str, ...], mm_per_px: float, hollow: int = 0
) -> list[RollingItem]:
    """Draws `apples` apples: about half of them sound, the rest spread over the defects; and hollow ones besides.

    Args:
        rng: Decides everything.
        apples: How many.
        hollow: How many hollow ones, drawn last.
        varieties: Names from `VARIETIES`, taken in turn.
        mm_per_px: Of the camera.
    """
    kinds = [Kind.SOUND if at % 2 == 0 else DEFECTS[at // 2 % len(DEFECTS)] for at in range(apples)]
    kinds += [Kind.HOLLOW] * hollow
    # Variety changes only after each kind had its turn, so that no defect belongs to one variety.
    period = 2 * len(DEFECTS)
    return [
        _render(rng, kind, varieties[at // period % len(varieties)], mm_per_px, f"apple-{at}")
        for at, kind in enumerate(kinds)
    ]


def _render(rng: np.random.Generator, kind: Kind, variety: str, mm_per_px: float, name: str) -> RollingItem:
    length_mm = float(rng.uniform(66.0, 84.0))
    side = round(length_mm / mm_per_px)
    surface, defect = _surface(rng, kind, variety)
    start, aspect = _rotation(rng), float(rng.uniform(0.92, 1.0))
    normals, inside = _disc(side)
    shade, shine = _shading(normals)
    coverage = _squeezed(inside, aspect)
    keeps = _keeps(coverage)
    sprites, shares = [], []
    for phase in range(PHASES):
        angle = 2.0 * np.pi * phase / PHASES
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]], np.float32)
        points = normals @ (turn.T @ start).astype(np.float32)
        rows, columns = _where(points)
        colour = cv2.remap(surface, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        visible = cv2.remap(defect, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        lit = np.clip(colour * shade[:, :, None] + shine[:, :, None], 2.0, 255.0)
        shaded = np.ascontiguousarray(_squeezed(lit, aspect) * coverage[:, :, None], np.uint8)
        sprites.append(Sprite(shaded, keeps))
        shares.append(float(visible[inside > 0.5].mean()))
    needed = 0.0 if kind is Kind.HOLLOW else VISIBLE_SHARE.get(kind, 1.0)
    labels = tuple(str(kind) if share >= needed else str(Kind.SOUND) for share in shares)
    return RollingItem(str(kind), variety, tuple(sprites), tuple(shares), labels, length_mm, name)


def hollowed(item: RollingItem) -> RollingItem:
    """Returns a hollow item that looks like this one."""
    labels = (str(Kind.HOLLOW),) * len(item.labels)
    return replace(item, kind=str(Kind.HOLLOW), labels=labels, name=f"{item.name}-hollow")


def _squeezed(picture: Floats, aspect: float) -> Floats:
    size = (picture.shape[1], max(2, round(picture.shape[0] * aspect)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.float32)


def _keeps(coverage: Floats) -> NDArray[np.uint8]:
    """Returns the share of the belt that stays visible; one array serves all phases of an apple."""
    return np.ascontiguousarray(np.repeat(255.0 - 255.0 * coverage[:, :, None], 3, axis=2), np.uint8)


def _disc(side: int) -> tuple[Floats, Floats]:
    """Returns the unit normals of a sphere seen from +z, and the coverage of its disc with a soft rim."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2.0 - 1.0
    x, y = np.meshgrid(axis, axis)
    radius = np.sqrt(x * x + y * y)
    z = np.sqrt(np.maximum(0.0, 1.0 - np.minimum(radius, 1.0) ** 2))
    normals = np.stack((x, y, z), axis=2)
    normals /= np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-6)
    coverage = np.clip((1.0 - radius) * side / 2.0 + 0.5, 0.0, 1.0)
    return normals.astype(np.float32), coverage.astype(np.float32)


def _shading(normals: Floats) -> tuple[Floats, Floats]:
    """Returns the shade (Lambert with ambient light) and the highlight of the lamp (Blinn-Phong) of each pixel."""
    light = _LIGHT / np.linalg.norm(_LIGHT)
    half = light + np.array([0, 0, 1], np.float32)
    half /= np.linalg.norm(half)
    lambert = np.maximum(normals @ light, 0.0)
    shade = 0.42 + 0.68 * lambert
    shine = 70.0 * np.maximum(normals @ half, 0.0) ** 40
    return shade.astype(np.float32), shine.astype(np.float32)


def _rotation(rng: np.random.Generator) -> Floats:
    """Returns a random orientation (QR decomposition of a Gaussian matrix)."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    if np.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q.astype(np.float32)


def _where(points: Floats) -> tuple[Floats, Floats]:
    """Returns row and column of the surface for unit vectors (h, w, 3)."""
    latitude = np.arccos(np.clip(points[:, :, 1], -1.0, 1.0)) / np.pi * (_ROWS - 1)
    longitude = (np.arctan2(points[:, :, 2], points[:, :, 0]) / (2.0 * np.pi) + 0.5) * (_COLUMNS - 1)
    return latitude.astype(np.float32), longitude.astype(np.float32)


def _noise(rng: np.random.Generator, points: Floats, frequency: float, terms: int = 10) -> Floats:
    """Returns smooth noise on the sphere, about -1..1: a sum of waves in random directions."""
    directions = rng.normal(size=(terms, 3)) * frequency
    offsets = rng.uniform(0, 2 * np.pi, terms)
    waves = np.sin(points @ directions.T.astype(np.float32) + offsets.astype(np.float32))
    return np.asarray(waves.sum(axis=2) / np.sqrt(terms / 2.0) / 1.6, np.float32)


def _surface(rng: np.random.Generator, kind: Kind, variety: str) -> tuple[Floats, Floats]:
    """Returns colour float32 (96, 192, 3) and defect float32 (96, 192) over latitude and longitude."""
    latitude = np.linspace(0, np.pi, _ROWS, dtype=np.float32)[:, None]
    longitude = ((np.arange(_COLUMNS, dtype=np.float32) / (_COLUMNS - 1)) - 0.5)[None, :] * 2.0 * np.pi
    points = np.stack(
        (
            np.sin(latitude) * np.cos(longitude),
            np.broadcast_to(np.cos(latitude), (_ROWS, _COLUMNS)),
            np.sin(latitude) * np.sin(longitude),
        ),
        axis=2,
    ).astype(np.float32)
    colour = _skin(rng, points, longitude, variety)
    colour = _ends(rng, colour, points)
    if kind in {Kind.SOUND, Kind.HOLLOW}:
        return colour, np.zeros((_ROWS, _COLUMNS), np.float32)
    return _blemish(rng, colour, points, kind)


def _skin(rng: np.random.Generator, points: Floats, longitude: NDArray[np.floating], variety: str) -> Floats:
    base, second, amount = VARIETIES[variety]
    jitter = rng.uniform(0.9, 1.1, 3)
    side = rng.normal(size=3)
    blush = points @ (side / np.linalg.norm(side)).astype(np.float32)
    blush = blush + 0.35 * _noise(rng, points, 3.0)
    streaks = np.sin(longitude * rng.integers(14, 26) + 2.0 * _noise(rng, points, 2.0))
    mix = np.clip((blush + 0.25 * streaks) * 1.4 + (amount - 0.5) * 3.0, 0.0, 1.0)[:, :, None]
    colour = (1.0 - mix) * np.asarray(base, np.float32) * jitter + mix * np.asarray(second, np.float32)
    lenticels = _noise(rng, points, 26.0) > 1.05
    colour = np.where(lenticels[:, :, None], colour * 0.75 + 55.0, colour)
    return np.asarray(colour * (1.0 + 0.05 * _noise(rng, points, 12.0)[:, :, None]), np.float32)


def _ends(rng: np.random.Generator, colour: Floats, points: Floats) -> Floats:
    """Draws the stem cavity at the north pole and the calyx at the south pole: dark and brown, yet no defect."""
    wobble = 0.04 * _noise(rng, points, 5.0)
    north = np.arccos(np.clip(points[:, :, 1], -1, 1)) + wobble
    south = np.pi - np.arccos(np.clip(points[:, :, 1], -1, 1)) + wobble
    cavity = np.clip(1.0 - north / rng.uniform(0.3, 0.42), 0, 1)[:, :, None] ** 0.7
    russet = np.asarray((58.0, 105.0, 120.0), np.float32)
    tinted = colour * (1.0 - 0.75 * cavity) + russet * 0.75 * cavity * (1.0 - 0.55 * cavity)
    stem = (north < 0.075)[:, :, None]
    tinted = np.where(stem, np.asarray((28.0, 44.0, 62.0), np.float32), tinted)
    crown = np.clip(1.0 - south / rng.uniform(0.17, 0.25), 0, 1)[:, :, None] ** 0.5
    tinted = tinted * (1.0 - 0.8 * crown) + np.asarray((36.0, 52.0, 62.0), np.float32) * 0.8 * crown
    return np.asarray(tinted, np.float32)


def _blemish(rng: np.random.Generator, colour: Floats, points: Floats, kind: Kind) -> tuple[Floats, Floats]:
    """Draws the defect on the surface; returns colour and the defect's map."""
    if kind is Kind.SCAB:
        return _scab(rng, colour, points)
    away = _distance(rng, points)
    if kind is Kind.WORM:
        hole, halo = rng.uniform(0.07, 0.11), rng.uniform(0.2, 0.32)
        ring = np.clip(1.0 - (away + 0.05 * _noise(rng, points, 9.0)) / halo, 0, 1)[:, :, None]
        bitten = colour * (1.0 - 0.65 * ring) + np.asarray((40.0, 70.0, 105.0), np.float32) * 0.65 * ring
        bitten = np.where((away < hole)[:, :, None], np.asarray((12.0, 16.0, 22.0), np.float32), bitten)
        return np.asarray(bitten, np.float32), (away < 0.6 * halo).astype(np.float32)
    wobble = away + 0.10 * _noise(rng, points, 4.0)
    if kind is Kind.ROT:
        radius = rng.uniform(0.45, 0.85)
        soft = np.clip((radius - wobble) / 0.12, 0, 1)[:, :, None]
        rings = 1.0 + 0.10 * np.sin(away * 22.0)[:, :, None]
        brown = np.asarray((38.0, 68.0, 112.0), np.float32) * rng.uniform(0.75, 1.15) * rings
        return np.asarray(colour * (1 - 0.9 * soft) + brown * 0.9 * soft, np.float32), soft[:, :, 0].astype(np.float32)
    radius = rng.uniform(0.3, 0.5)
    soft = np.clip((radius - wobble) / 0.22, 0, 1)[:, :, None]
    dull = colour * np.asarray((0.52, 0.48, 0.58), np.float32) + np.asarray((10.0, 18.0, 26.0), np.float32)
    depth = rng.uniform(0.85, 1.0)
    bruised = colour * (1 - depth * soft) + dull * depth * soft
    return np.asarray(bruised, np.float32), (soft[:, :, 0] > 0.3).astype(np.float32)


def _distance(rng: np.random.Generator, points: Floats) -> Floats:
    """Returns the angle of each point from a random place off the poles, radians."""
    place = rng.normal(size=3)
    place[1] *= 0.6
    place /= np.linalg.norm(place)
    return np.asarray(np.arccos(np.clip(points @ place.astype(np.float32), -1, 1)), np.float32)


def _scab(rng: np.random.Generator, colour: Floats, points: Floats) -> tuple[Floats, Floats]:
    centre = rng.normal(size=3)
    found: NDArray[np.floating] = np.zeros(points.shape[:2], np.float32)
    rough = 0.03 * _noise(rng, points, 20.0)
    for _ in range(int(rng.integers(7, 15))):
        place = centre / np.linalg.norm(centre) + rng.normal(size=3) * 0.33
        place /= np.linalg.norm(place)
        away = np.arccos(np.clip(points @ place.astype(np.float32), -1, 1)) + rough
        found = np.maximum(found, np.clip((rng.uniform(0.06, 0.14) - away) / 0.03, 0, 1))
    dark = np.asarray((44.0, 56.0, 66.0), np.float32) * rng.uniform(0.8, 1.1)
    spotted = colour * (1 - 0.85 * found[:, :, None]) + dark * 0.85 * found[:, :, None]
    return np.asarray(spotted, np.float32), found.astype(np.float32)


def load_photos(folder: Path, *, mm_per_px: float, limit: int = 40) -> list[RollingItem]:
    """Loads rolling items from real photographs: the views of one item and axis, in frame order, are its phases.

    An item is defective when any view without doubt is labelled so; its kind is the commonest kind of those views.

    Args:
        folder: Holds `labels.csv` with path, item, axis, frame, label, kind, doubt.
        mm_per_px: Scale of the camera.
        limit: Largest number of sequences that are loaded.

    Raises:
        InputError: `photos.no_labels`, `photos.missing_columns`, and those of reading a photograph.
    """
    path = folder / "labels.csv"
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError("photos.no_labels", f"{path} cannot be read.", expected="labels.csv", got=error) from error
    needed = {"path", "item", "axis", "frame", "label"}
    if not rows or not needed <= rows[0].keys():
        found = sorted(rows[0]) if rows else "no row"
        raise InputError("photos.missing_columns", f"{path} lacks columns.", expected=sorted(needed), got=found)
    sequences: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        sequences[row["item"], row["axis"]].append(row)
    truths = {item: _truth_of([r for r in rows if r["item"] == item]) for item in {r["item"] for r in rows}}
    chosen = sorted(sequences.items())[:: max(1, len(sequences) // limit)][:limit]
    return [_rolling_photos(folder, item, rows, truths[item], mm_per_px) for (item, _), rows in chosen]


def _truth_of(rows: list[dict[str, str]]) -> str:
    kinds = [r.get("kind") or r["label"] for r in rows if r["label"] != Kind.SOUND and r.get("doubt", "0") != "1"]
    return max(sorted(set(kinds)), key=kinds.count) if kinds else str(Kind.SOUND)


def _rolling_photos(folder: Path, item: str, rows: list[dict[str, str]], kind: str, mm_per_px: float) -> RollingItem:
    length_mm, sprites, labels = 75.0, [], []
    for row in sorted(rows, key=lambda r: int(r["frame"])):
        place = (folder / row["path"]).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise InputError("photos.unsafe_path", "A label names a file outside.", expected=folder, got=row["path"])
        image, alpha = decode_photo(place.read_bytes(), name=row["path"])
        mask = segment_photo(image) if alpha is None else alpha
        left, top, width, height = cv2.boundingRect(mask)
        scale = length_mm / mm_per_px / max(width, height)
        size = (max(2, round(width * scale)), max(2, round(height * scale)))
        cut = (slice(top, top + height), slice(left, left + width))
        part = cv2.resize((mask[cut] > 0).astype(np.float32), size, interpolation=cv2.INTER_AREA)
        coverage = np.asarray(part, np.float32)
        colour = cv2.resize(image[cut], size, interpolation=cv2.INTER_AREA)
        sprites.append(Sprite((colour * coverage[:, :, None]).astype(np.uint8), _keeps(coverage)))
        sound = row["label"] == Kind.SOUND
        labels.append(str(Kind.SOUND) if sound else row.get("kind") or row["label"])
    shares = tuple(0.0 if label == Kind.SOUND else 1.0 for label in labels)
    return RollingItem(kind, item, tuple(sprites), shares, tuple(labels), length_mm, item)


def draw_belt(rng: np.random.Generator, size: tuple[int, int], lane_px: int) -> NDArray[np.uint8]:
    """Draws a dark belt of twice the image's width, so that a moving window always fits; lane dividers keep their rows.

    Args:
        rng: Source of the texture.
        size: Height and width of the image.
        lane_px: Height of a lane.

    Returns:
        uint8 (H, 2 W, 3) BGR.
    """
    height, width = size
    coarse = rng.normal(0.0, 1.0, (height // 8 + 1, width // 8)).astype(np.float32)
    texture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 2.5
    grey = 40.0 + texture + rng.normal(0.0, 1.2, (height, width))
    strip = np.repeat(grey[:, :, None], 3, axis=2) * np.array([1.06, 1.0, 0.95])
    image: NDArray[np.uint8] = np.clip(np.concatenate((strip, strip), axis=1), 5, 90).astype(np.uint8)
    for top in range(0, height + 1, lane_px):
        y = min(max(top, 1), height - 2)
        image[y - 1 : y + 1] = (70, 66, 62)
    return image


def draw_fixtures(
    rng: np.random.Generator, size: tuple[int, int], lane_px: int, each: int
) -> list[tuple[slice, slice]]:
    """Returns the places of bolts on the lane dividers: they belong to the machine and stand still while the belt runs.

    Args:
        rng: Source of the places.
        size: Height and width of the image.
        lane_px: Height of a lane.
        each: Number of bolts on each divider.
    """
    height, width = size
    tops = [min(max(top, 1), height - 2) - 1 for top in range(0, height + 1, lane_px)]
    lefts = rng.integers(0, width - _BOLT_PX, (len(tops), each))
    return [
        (slice(top, top + 2), slice(left, left + _BOLT_PX))
        for top, row in zip(tops, lefts.tolist(), strict=True)
        for left in row
    ]


def draw_noise(rng: np.random.Generator, size: tuple[int, int], sigma: float) -> list[NDArray[np.uint8]]:
    """Returns four frames of noise, to be added in turn; its mean of two sigma is part of the exposure."""
    return [np.clip(rng.normal(2 * sigma, sigma, (*size, 3)), 0, 255).astype(np.uint8) for _ in range(4)]


def draw_smudge(size: tuple[int, int], place: tuple[float, float], radius: float) -> Floats:
    """Returns one smudge on the lens, 0..1: opaque in its middle, without an edge.

    Args:
        size: Height and width of the image.
        place: Row and column of the middle, as shares.
        radius: As a share of the width.
    """
    height, width = size
    rows, columns = np.ogrid[:height, :width]
    away = np.hypot(rows - place[0] * height, columns - place[1] * width) / (radius * width)
    return np.asarray(np.clip(1.6 * (1.0 - away), 0.0, 1.0), np.float32)


def draw_dirt(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """Returns the smudges on the lens, 0..1; they keep their place while everything else moves."""
    height, width = size
    map_ = np.zeros((height, width), np.float32)
    for _ in range(9):
        centre = (int(rng.integers(0, width)), int(rng.integers(0, height)))
        cv2.circle(map_, centre, int(rng.integers(15, 70)), float(rng.uniform(0.5, 1.0)), -1)
    return np.asarray(cv2.GaussianBlur(map_, (0, 0), 14.0), np.float32)
