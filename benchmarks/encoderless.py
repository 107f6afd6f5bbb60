"""Identities of items on lines without an encoder, and the cost of measuring the belt from the picture.

The simulated line is filmed as people film real ones: in jerks (six pictures a second, each repeated five times at
thirty frames a second), by a hand that trembles, through changes of speed and stops. The truth of every picture is
known. An item is *wrong* when it has several identities, shares one, or was never seen.

    python -m benchmarks.encoderless [--quick]
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import cv2
import numpy as np

from benchmarks.tracking import Identities, true_boxes
from edge_agent.devices.image_encoder import ImageEncoder, belt_of
from edge_agent.interfaces import Frame
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.follower import ItemFollower

MOST_WRONG: Final = 0.02
"""Largest share of wrong items on each material."""
MOST_MS: Final = 6.0
"""Largest processor time per frame of 640 x 340 pixels, milliseconds."""


@dataclass(frozen=True, slots=True)
class Film:
    """One way of filming the line.

    Attributes:
        repeated: Each picture is shown so many times.
        wobble_px: Standard deviation of a slow tremble of the camera, in each direction.
        schedule: Faults of the simulated line.
        speed: Factor on the belt speed of 1000 mm/s.
        nominal: Factor on the nominal speed that the encoder is given.
    """

    repeated: int = 1
    wobble_px: float = 0.0
    schedule: str = ""
    speed: float = 1.0
    nominal: float = 1.0


SPEEDS: Final = "2s speed_factor=0.33; 4s speed_factor=1; 6s stopped; 8s speed_factor=0.5; 10s clear"
FILMS: Final = {
    "steady": Film(),
    "nominal speed wrong by 40 %": Film(nominal=0.6),
    "three times slower, stop, and back": Film(schedule=SPEEDS),
    "trembling hand": Film(wobble_px=4.0),
    "trembling hand, speeds and stop": Film(wobble_px=4.0, schedule=SPEEDS),
    "six pictures a second, 400 mm/s": Film(repeated=5, speed=0.4),
    "six pictures a second, 700 mm/s": Film(repeated=5, speed=0.7),
    "six pictures a second, 1000 mm/s": Film(repeated=5),
    "six pictures a second, hand, 400 mm/s": Film(repeated=5, wobble_px=4.0, speed=0.4),
    "six pictures a second, hand, 1000 mm/s": Film(repeated=5, wobble_px=4.0),
    "six pictures a second, hand, speeds and stop": Film(repeated=5, wobble_px=4.0, speed=0.6, schedule=SPEEDS),
}


def filmed(film: Film, *, frames: int, seed: int = 1) -> Iterator[tuple[Frame, list[tuple[int, int, float]]]]:
    """Yields frames as that camera gives them, with the true (id, lane, x) of each item wholly in the picture."""
    config = SimulationConfig(seed=seed, apples=24, belt_mm_s=1000.0 * film.speed, items_per_s=9.0 * film.speed)
    line = SimulatedLine(config, virtual=True, schedule=film.schedule)
    rng = np.random.default_rng((seed, 7))
    hand = np.zeros(2)
    shown: tuple[Frame, list[tuple[int, int, float]]] | None = None
    for number in range(frames):
        frame = line.read(1.0)
        assert frame is not None
        if shown is None or number % film.repeated == 0:
            shown = frame, true_boxes(line, frame)
        picture, boxes = shown
        image = picture.image
        if film.wobble_px:
            # A random walk that is drawn back to the middle: it moves over about a third of a second.
            hand += rng.normal(0.0, film.wobble_px * 0.43, 2) - 0.1 * hand
            move = np.array([[1.0, 0.0, hand[0]], [0.0, 1.0, hand[1]]])
            size = (image.shape[1], image.shape[0])
            image = np.asarray(cv2.warpAffine(image, move, size, borderMode=cv2.BORDER_REPLICATE), np.uint8)
            boxes = [(item, lane, x + hand[0]) for item, lane, x in boxes]
        yield replace(picture, image=image, number=number, captured_s=number / 30.0), boxes


@dataclass(frozen=True, slots=True)
class Result:
    """The identities that the items of one film received."""

    items: int
    given: int
    doubled: int
    shared: int
    lost: int
    ms: float

    @property
    def wrong(self) -> float:
        """Share of items with several identities, a shared one, or none."""
        return (self.doubled + self.shared + self.lost) / max(self.items, 1)


def follow(film: Film, *, frames: int, seed: int = 1) -> Result:
    """Follows the items of a film by the picture alone."""
    config = SimulationConfig(seed=seed)
    belt = belt_of(frame.image for frame, _ in filmed(film, frames=min(frames, 240), seed=seed))
    encoder = ImageEncoder(config.mm_per_px, nominal_mm_s=1000.0 * film.speed * film.nominal, belt=belt)
    follower = ItemFollower(config.geometry(), 6)
    identities, observed, seconds = Identities(), Counter[int](), 0.0
    for frame, truth in filmed(film, frames=frames, seed=seed):
        started = time.process_time()
        belt_mm = encoder.feed(frame)
        seconds += time.process_time() - started
        places = follower.locator.find(frame.image)
        seen, _ = follower.tracker.update(places, frame.number, frame.captured_s, belt_mm)
        identities.add(truth, [(track.item_id, place.lane, place.x_px) for track, place in seen])
        observed.update(item for item, _, _ in truth)
    found = identities.figures()
    # An item at the edge of a single picture is no loss.
    lost = sum(count >= 2 for item, count in observed.items() if item not in {true for true, _ in identities.pairs})
    return Result(
        len(observed),
        follower.items,
        int(found["items_with_several_ids"]),
        int(found["ids_with_several_items"]),
        lost,
        1000.0 * seconds / frames,
    )


def main() -> int:
    """Prints the figures; 1 when one is beyond its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten seconds of each film instead of forty")
    parser.add_argument("--only", default="", help="films whose name contains this")
    options = parser.parse_args()
    good = True
    print(f"{'film':48} {'items':>6} {'ids':>6} {'doubled':>8} {'shared':>7} {'lost':>5} {'wrong':>7} {'ms':>6}")
    for name, film in FILMS.items():
        if options.only not in name:
            continue
        r = follow(film, frames=360 if options.quick else 1200)
        good &= r.wrong <= MOST_WRONG and r.ms <= MOST_MS
        counts = f"{r.items:6} {r.given:6} {r.doubled:8} {r.shared:7} {r.lost:5}"
        print(f"{name:48} {counts} {r.wrong:7.1%} {r.ms:6.2f}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
