"""Collects views for training with the same locations, tracks and masks as the line that will judge.

Each chosen view is written as a PNG with its mask as alpha channel, so that `models.preprocess.view_of_photo` gives
byte for byte the view the line would have judged. The simulated line labels each view by what is visible in it, and
names as `item` the apple, not its appearance on the belt: the same apple may come again and must not be on both sides
of a split. After some items a new world with new apples begins. Views of a real camera have an empty label, which a
person fills in.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import msgspec
import numpy as np

from edge_agent.devices.frames import frames
from edge_agent.devices.hardware import LineHardware, geometry_of, open_hardware
from edge_agent.interfaces import Frame
from edge_agent.line_config import LineConfig
from edge_agent.vision.follower import ItemFollower
from edge_agent.vision.segmentation import Detection, Locator
from edge_agent.vision.tracking import Track
from models.errors import InputError
from models.files import write_atomically

_WORLD_ITEMS = 40
"""Number of items taken from one simulated world before new apples are drawn."""
COLUMNS = ("path", "item", "lot", "label", "kind", "variety", "view", "weight_g", "length_mm")


@dataclass(frozen=True, slots=True)
class Collected:
    """Counts of what was written."""

    items: int
    views: int
    directory: str
    labels: dict[str, int]


def collect(
    config: LineConfig,
    output: Path,
    *,
    items: int,
    max_views: int = 6,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Collected:
    """Runs the line without judging and writes `output/views/*.png` and `output/labels.csv`.

    Args:
        config: Configuration of the line; a simulated one runs in virtual time, as fast as it can.
        output: A new or empty folder.
        items: Number of items after which it stops.
        max_views: Largest number of views per item.
        progress: Called with (items so far, items wanted).

    Raises:
        InputError: `collect.not_empty`.
        CameraError: The camera is not there.
    """
    if output.exists() and any(output.iterdir()):
        raise InputError("collect.not_empty", f"{output} is not empty.", expected="a new folder", got=str(output))
    (output / "views").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    done, seed, ended = 0, config.seed, False
    while done < items and not ended:
        world = open_hardware(msgspec.structs.replace(config, seed=seed), virtual=True)
        writer = _Writer(config, world, output, max_views, seed)
        wanted = min(_WORLD_ITEMS, items - done) if world.simulation else items - done
        try:
            ended = True
            for frame in frames(world.source, patience_s=world.patience_s):
                writer.take(frame)
                progress(done + writer.items, items)
                if writer.items >= wanted:
                    ended = False
                    break
        finally:
            world.close()
        done, seed = done + writer.items, seed + 1
        rows += writer.rows
    return _finish(output, rows)


class _Writer:
    """Writes the views of items as they pass; the rows of an item count once it has left the picture."""

    def __init__(self, config: LineConfig, world: LineHardware, output: Path, max_views: int, seed: int) -> None:
        self._config, self._world, self._output, self._max_views = config, world, output, max_views
        self._seed = seed
        self.rows: list[dict[str, object]] = []
        self._open: dict[int, list[dict[str, object]]] = {}
        self._follower: ItemFollower | None = None
        self.items = 0

    def take(self, frame: Frame) -> None:
        if self._follower is None:
            self._follower = ItemFollower(geometry_of(self._config, self._world, frame), self._max_views)
        chosen, closed = self._follower.take(frame)
        for track, place in chosen:
            self._view(frame, track, place, self._follower.locator)
        for track in closed:
            rows = self._open.pop(track.item_id, [])
            self.rows.extend(rows)
            self.items += bool(rows)

    def _view(self, frame: Frame, track: Track, place: Detection, locator: Locator) -> None:
        simulation = self._world.simulation
        truth = simulation.view_truth(frame.belt_mm, track.lane, track.item_mm) if simulation else None
        if simulation is not None and truth is None:
            return
        crop, mask = locator.mask(frame.image, place)
        track.views.append(mask)
        number = len(track.views)
        path = f"views/{self._seed}-{track.item_id:05d}-{number}.png"
        item = f"{self._seed}-{truth.apple}" if truth else f"{self._seed}-{track.item_id:05d}"
        cv2.imwrite(str(self._output / path), np.dstack((crop, mask)), [cv2.IMWRITE_PNG_COMPRESSION, 1])
        row: dict[str, object] = {"path": path, "item": item, "lot": self._config.lot, "view": number}
        row["length_mm"] = round(track.length_mm, 1)  # as the line gives it to a model
        if truth is not None:
            row |= {
                "label": truth.label,
                "kind": truth.kind,
                "variety": truth.variety,
                "weight_g": round(truth.weight_g, 1),
            }
        self._open.setdefault(track.item_id, []).append(row)


def _finish(output: Path, rows: list[dict[str, object]]) -> Collected:
    """Writes the labels and removes the views of items that never left the picture."""
    kept = {str(row["path"]) for row in rows}
    for path in (output / "views").iterdir():
        if f"views/{path.name}" not in kept:
            path.unlink()
    stream = io.StringIO()
    table = csv.DictWriter(stream, COLUMNS, restval="")
    table.writeheader()
    table.writerows(rows)
    write_atomically(output / "labels.csv", stream.getvalue().encode())
    labels = [str(row.get("label", "")) for row in rows]
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    return Collected(len({str(row["item"]) for row in rows}), len(rows), str(output), counts)
