"""Each quantity of the camera reacts to its own fault and hardly to the others; levels survive restarts and damage."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_agent.health.belt_look import Exposure, look_at
from edge_agent.health.camera_levels import LOOKS, CameraLevels, read_levels, write_levels
from edge_agent.health.camera_sensor import BURST, CameraChange, CameraSensor
from edge_agent.health.evidence import CODES, RECOVERED, condition_of, evidence_picture, place_of
from edge_agent.interfaces import Frame
from edge_agent.simulation.faults import Faults, parse_faults
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.segmentation import Locator
from models.errors import InputError
from models.messages import MAX_PICTURE_BYTES
from models.windows import DIRT_COLUMNS, DIRT_ROWS, QUANTITIES, CameraCounts

CONFIG = SimulationConfig(apples=8, varieties=("golden",), belt_mm_s=937.0)
"""A speed at which the simulated belt, which repeats itself, does not keep step with the frames."""
EDGE_PX = 26
PAUSE = 5
"""Frames between two bursts: fewer than on a line, where they are about a second apart."""


class Bench:
    """A simulated line whose frames go to a sensor, in virtual time."""

    def __init__(self, seed: int = 1, *, path: Path | None = None, config: SimulationConfig = CONFIG) -> None:
        self.line = SimulatedLine(msgspec.structs.replace(config, seed=seed), virtual=True)
        self.locator = Locator(self.line.geometry)
        self.path, self.repeats, self.turn = path, 0, 0
        self.changes: list[CameraChange] = []
        self.sensor = self.fresh_sensor()

    def fresh_sensor(self, key: str = "camera") -> CameraSensor:
        return CameraSensor(
            self.line.geometry.mm_per_px,
            key=key,
            path=self.path,
            edge_px=EDGE_PX,
            repeated=lambda: self.repeats,
            on_change=self.changes.append,
        )

    def burst(self) -> Sequence[Exposure]:
        self.turn += 1
        found = []
        for at in range(PAUSE + self.turn % 5 + BURST):
            frame = self.line.read(1.0)
            assert frame is not None
            if at >= PAUSE + self.turn % 5:
                places = self.locator.find(frame.image)
                boxes = tuple((p.left_px, p.top_px, p.right_px, p.bottom_px) for p in places)
                found.append(Exposure(frame, boxes))
        return found

    def looks(self, number: int) -> CameraCounts:
        self.sensor.take()
        for _ in range(number):
            self.sensor.look(self.burst())
        counts = self.sensor.take()
        counts.check()
        return counts

    def learn(self) -> CameraLevels:
        self.looks(LOOKS)
        assert self.sensor.levels is not None
        return self.sensor.levels


def outside(counts: CameraCounts, least: int) -> set[str]:
    return {name for name, looks in counts.outside.items() if looks >= least}


FAULTS = [
    ("brightness=0.8", {"exposure"}),
    ("brightness=1.25", {"exposure"}),
    ("red=0.9", {"red_to_green"}),
    ("blue=1.12", {"blue_to_green"}),
    ("blur_px=1", {"sharpness"}),
    ("flicker=0.04", {"flicker"}),
    ("shift_x_px=6", {"shift_x_px"}),
    ("shift_y_px=-5", {"shift_y_px"}),
    ("dirt=0.8 dirt_x=0.8 dirt_y=0.2", {"dirt"}),
    ("dirt=0.6 dirt_x=0.2 dirt_y=0.7 dirt_level=90", {"dirt"}),
    ("dirt=0.6 dirt_x=0.5 dirt_y=0.5 dirt_level=10", {"dirt"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_fault_moves_its_own_quantity_out_of_its_band_and_no_other(seed: int) -> None:
    bench = Bench(seed)
    levels = bench.learn()
    assert set(levels.level) == set(QUANTITIES)
    calm = bench.looks(15)
    assert outside(calm, 1) == set(), "nothing is reported where nothing is wrong"
    for knobs, expected in FAULTS:
        bench.line.set_trouble(parse_faults(knobs))
        bench.looks(18)
        found = bench.looks(6)
        assert outside(found, 5) == expected, knobs
        bench.line.set_trouble(Faults())
        bench.looks(24)
        assert outside(bench.looks(4), 1) == set(), f"{knobs} is over"


def test_a_smudge_is_found_where_it_is_and_named_and_its_end_too() -> None:
    bench = Bench(4)
    bench.learn()
    bench.line.set_trouble(parse_faults("dirt=0.8 dirt_x=0.8 dirt_y=0.2"))
    counts = bench.looks(20)
    grid = counts.dirt_counts() * 2 > counts.dirt_looks
    rows, columns = np.nonzero(grid)
    assert abs((columns.mean() + 0.5) / DIRT_COLUMNS - 0.8) < 0.08
    assert abs((rows.mean() + 0.5) / DIRT_ROWS - 0.2) < 0.12
    bench.line.set_trouble(Faults())
    bench.looks(30)
    began, ended = (next(c for c in bench.changes if c.outside is out) for out in (True, False))
    assert condition_of(began) == ("optics.dirty", "Wipe the lens; the dirt is at the upper right of the picture.")
    assert condition_of(ended)[0] == RECOVERED
    picture = evidence_picture(began)
    assert 1000 < len(picture) <= MAX_PICTURE_BYTES
    shown = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    assert shown is not None
    assert shown.shape[1] > 1.9 * 480, "before and now stand side by side"


@pytest.mark.slow
def test_a_restart_with_a_dirty_lens_is_still_seen(tmp_path: Path) -> None:
    bench = Bench(5, path=tmp_path / "levels")
    bench.learn()
    bench.line.set_trouble(parse_faults("dirt=0.8 dirt_x=0.3 dirt_y=0.3 blur_px=0.8"))
    bench.sensor = bench.fresh_sensor()
    assert bench.sensor.levels is not None
    assert outside(bench.looks(14), 6) >= {"sharpness"}


def learnt(path: Path) -> CameraLevels:
    bench = Bench(6, path=path)
    return bench.learn()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CameraLevels]:
    path = tmp_path_factory.mktemp("levels") / "camera-levels"
    return path, learnt(path)


def test_levels_come_back_as_they_were_learnt_and_belong_to_one_camera(kept: tuple[Path, CameraLevels]) -> None:
    path, levels = kept
    assert read_levels(path, levels.key) == levels
    assert read_levels(path, "another camera") is None
    assert read_levels(path.with_name("none"), levels.key) is None


DAMAGE: list[Callable[[bytes], bytes]] = [
    lambda data: b"",
    lambda data: data[:-100],
    lambda data: bytes(4) + data[4:],
    lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
    lambda data: b"\x00" * 5_000_000,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_levels_are_named_and_learnt_again(
    damage: Callable[[bytes], bytes], kept: tuple[Path, CameraLevels], tmp_path: Path
) -> None:
    path = tmp_path / "levels"
    path.write_bytes(damage(kept[0].read_bytes()))
    with pytest.raises(InputError) as caught:
        read_levels(path, "camera")
    assert caught.value.code == "camera.levels_damaged"
    assert CameraSensor(0.625, key="camera", path=path).levels is None


@pytest.mark.parametrize(
    "change",
    [
        {"static_size": (3, 3)},
        {"static_size": (0, 0), "static": b""},
        {"level": {}},
        {"level": {"exposure": 40.0}, "spread": {"exposure": 1.0}},
        {"spread": {}},
    ],
)
def test_levels_whose_parts_do_not_fit_are_refused(
    change: dict[str, object], kept: tuple[Path, CameraLevels], tmp_path: Path
) -> None:
    write_levels(tmp_path / "levels", msgspec.structs.replace(kept[1], **change))
    with pytest.raises(InputError):
        read_levels(tmp_path / "levels", "camera")


def test_a_file_that_is_taken_away_has_the_levels_learnt_again(kept: tuple[Path, CameraLevels], tmp_path: Path) -> None:
    path = tmp_path / "levels"
    path.write_bytes(kept[0].read_bytes())
    bench = Bench(6, path=path)
    bench.looks(1)
    assert bench.sensor.levels is not None
    path.unlink()
    bench.looks(1)
    assert bench.sensor.levels is None


def test_a_disk_that_takes_nothing_leaves_the_levels_in_memory(tmp_path: Path) -> None:
    bench = Bench(7, path=tmp_path / "no such folder" / "levels")
    bench.learn()
    assert bench.looks(2).exposure.count == 2


def test_a_belt_that_stands_teaches_nothing_and_shows_no_dirt() -> None:
    bench = Bench(8)
    bench.line.set_trouble(Faults(stopped=True))
    bench.burst()
    counts = bench.looks(4)
    assert (counts.looks, counts.dirt_looks, counts.exposure.count) == (4, 0, 0)
    assert bench.sensor.levels is None


def test_offers_are_taken_about_once_a_second_and_the_newest_burst_wins() -> None:
    bench = Bench(10)
    asked = 0

    def boxes() -> list[tuple[int, int, int, int]]:
        nonlocal asked
        asked += 1
        return []

    for _ in range(300):
        frame = bench.line.read(1.0)
        assert frame is not None
        bench.sensor.offer(frame, boxes)
    assert 8 * BURST <= asked <= 12 * BURST
    burst = bench.sensor._take(0.0)
    assert burst is not None
    assert burst[-1].frame.number > 250
    assert bench.sensor._take(0.0) is None


def exposures(*frames: tuple[tuple[int, int, int, int], ...], advance_mm: float) -> list[Exposure]:
    found = []
    for number, boxes in enumerate(frames):
        image = np.full((340, 640, 3), 40, np.uint8)
        for left, top, right, bottom in boxes:
            image[top:bottom, left:right] = 200
        found.append(Exposure(Frame(image, number, number / 30.0, number * advance_mm), boxes))
    return found


@pytest.mark.parametrize("advance_mm", [33.3, 166.0])
def test_an_item_is_left_out_and_what_stands_still_is_measured_also_where_frames_were_dropped(
    advance_mm: float,
) -> None:
    dirt = (320, 170, 400, 226)
    passing = [(40 + 30 * n, 20, 160 + 30 * n, 140) for n in range(BURST)]
    look = look_at(exposures(*((dirt, item) for item in passing), advance_mm=advance_mm), 0.625)
    assert np.nanmax(look.colour[6:8, 8:10]) > 190.0, "the dirt is seen"
    assert np.nanmax(look.colour[:5]) < 45.0, "the items are not"


def test_repeated_frames_are_counted_once() -> None:
    bench = Bench(11)
    bench.repeats = 3
    assert bench.sensor.take().repeated == 3
    bench.repeats = 5
    assert bench.sensor.take().repeated == 2
    assert bench.sensor.take().repeated == 0


def test_places_in_the_picture_have_names() -> None:
    grid = np.zeros((DIRT_ROWS, DIRT_COLUMNS), bool)
    names = {}
    for row, column in ((0, 0), (0, 15), (11, 8), (6, 8), (6, 0)):
        grid[:] = False
        grid[row, column] = True
        names[row, column] = place_of(grid)
    assert list(names.values()) == ["upper left", "upper right", "lower", "middle", "left"]
    grid[:] = True
    assert place_of(grid) == "all over it"


@pytest.mark.parametrize("quantity", sorted(CODES))
def test_every_quantity_has_an_instruction(quantity: str) -> None:
    grid = np.zeros((DIRT_ROWS, DIRT_COLUMNS), bool)
    image = np.zeros((34, 64, 3), np.uint8)
    change = CameraChange(quantity, True, 30.0, 40.0, image, grid, b"")
    code, message = condition_of(change)
    assert code.startswith("optics.")
    assert message.endswith(".")
    assert evidence_picture(change)
