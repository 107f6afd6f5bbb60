"""Calibration: scale, lanes, orientation and speed are recovered or refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_agent.calibration.calibrate import Calibration, Target, calibrate, geometry_toml, write_calibration
from edge_agent.calibration.lanes import find_lanes
from edge_agent.calibration.overlay import Sketch, draw
from edge_agent.calibration.scale import parse_pattern, scale_from_board, scale_from_items
from edge_agent.calibration.survey import Blob, frames_of
from edge_agent.cli.commands import main
from edge_agent.config import load_agent_config
from edge_agent.devices.orientation import oriented
from edge_agent.interfaces import Frame, Lane
from edge_agent.line_config import LineConfig, Orientation
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from models.errors import CameraError, ConfigError, InputError

DATE = "2027-01-31"
WORLD = SimulationConfig(
    apples=16, varieties=("golden", "red"), width_px=480, lane_px=120, mm_per_px=0.9, items_per_s=7.0, seed=5
)
TRUE_PX = WORLD.belt_mm_s / WORLD.frames_per_s / WORLD.mm_per_px


class Replay:
    """Frames from memory, each changed on its way."""

    def __init__(self, frames: list[Frame], change: Callable[[np.ndarray], np.ndarray] = lambda image: image) -> None:
        self.left, self.change = list(reversed(frames)), change

    def read(self, _timeout_s: float) -> Frame | None:
        if not self.left:
            raise CameraError("camera.ended", "over")
        frame = self.left.pop()
        return replace(frame, image=np.ascontiguousarray(self.change(frame.image)))

    def close(self) -> None:
        self.left = []


def record(world: SimulationConfig, frames: int, schedule: str = "") -> list[Frame]:
    line = SimulatedLine(world, virtual=True, schedule=schedule)
    return [frame for frame in (line.read(1.0) for _ in range(frames)) if frame is not None]


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return record(WORLD, 180)


@pytest.fixture(scope="module")
def true_item_mm() -> float:
    """Median size of the items that pass in the recording."""
    line = SimulatedLine(WORLD, virtual=True)
    sizes = {}
    for _ in range(180):
        line.read(1.0)
        sizes |= {item.item_id: item.apple.length_mm for state in line._lanes for item in state.items}
    return float(np.median(list(sizes.values())))


def learn(
    frames: list[Frame],
    target: Target,
    change: Callable[[np.ndarray], np.ndarray] = lambda image: image,
    config: LineConfig | None = None,
) -> Calibration:
    found, _ = calibrate(config or LineConfig(), target, date=DATE, opener=lambda: Replay(frames, change))
    return found


@pytest.fixture(scope="module")
def straight(frames: list[Frame], true_item_mm: float) -> Calibration:
    return learn(frames[:140], Target(item_mm=true_item_mm))


@pytest.mark.slow
def test_scale_lanes_direction_and_speed_of_the_simulated_line_are_recovered(
    frames: list[Frame], true_item_mm: float
) -> None:
    done: list[tuple[int, int]] = []
    found, picture = calibrate(
        LineConfig(outlets_mm={"reject": 640.0}),
        Target(item_mm=true_item_mm),
        date=DATE,
        opener=lambda: Replay(frames),
        progress=lambda now, wanted: done.append((now, wanted)),
    )
    assert found.mm_per_px == pytest.approx(WORLD.mm_per_px, rel=0.015)
    assert found.mm_per_px_low <= found.mm_per_px <= found.mm_per_px_high
    assert found.lane_rows == ((0, 120), (120, 240))
    assert found.direction == "left-right"
    assert found.px_per_frame == pytest.approx(TRUE_PX, rel=0.005)
    assert found.belt_mm_s == pytest.approx(WORLD.belt_mm_s, rel=0.02)
    assert found.speed_spread < 0.01
    assert sum(found.lane_items) > 50
    assert found.outlets_mm == {"reject": 640.0}
    assert picture.shape[1] == 3 * 480
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda image: image[:, ::-1], id="right-left"),
        pytest.param(lambda image: 255 - image, id="white-belt"),
        pytest.param(lambda image: (image * 0.6).astype(np.uint8), id="dim"),
        pytest.param(lambda image: cv2.copyMakeBorder(image, 90, 30, 0, 0, cv2.BORDER_CONSTANT), id="frame-around"),
    ],
)
@pytest.mark.slow
def test_another_look_of_the_line_gives_the_same_measures(
    frames: list[Frame],
    true_item_mm: float,
    straight: Calibration,
    change: Callable[[np.ndarray], np.ndarray],
    request: pytest.FixtureRequest,
) -> None:
    found = learn(frames[:140], Target(item_mm=true_item_mm, lanes=2), change)
    assert found.items == pytest.approx(straight.items, abs=3)
    looks = request.node.callspec.id
    assert found.mm_per_px == pytest.approx(straight.mm_per_px, rel=0.015)
    assert found.px_per_frame == pytest.approx(TRUE_PX, rel=0.005)
    below = 90 if looks == "frame-around" else 0
    for (top, bottom), lane in zip(found.lane_rows, WORLD.geometry().lanes, strict=True):
        assert (top, bottom) == pytest.approx((lane.top_px + below, lane.bottom_px + below), abs=2)
    assert found.direction == ("right-left" if looks == "right-left" else "left-right")
    assert found.orientation == ("rotate-180" if looks == "right-left" else "none")


@pytest.mark.parametrize(
    ("orientation", "direction"),
    [("rotate-90", "bottom-top"), ("rotate-270", "top-bottom"), ("rotate-180", "right-left")],
)
@pytest.mark.slow
def test_items_may_travel_in_any_direction(
    frames: list[Frame], straight: Calibration, true_item_mm: float, orientation: Orientation, direction: str
) -> None:
    back: dict[str, Orientation] = {"rotate-90": "rotate-270", "rotate-270": "rotate-90", "rotate-180": "rotate-180"}
    found = learn(frames[:140], Target(item_mm=true_item_mm, lanes=2), lambda image: oriented(image, back[orientation]))
    assert (found.direction, found.orientation) == (direction, orientation)
    assert (found.width_px, found.height_px) == (480, 240)
    # The turned picture is that of the straight line, pixel by pixel: so are the measures.
    assert (found.items, found.mm_per_px, found.lane_rows) == (straight.items, straight.mm_per_px, straight.lane_rows)
    configured = LineConfig(camera="line.mp4", orientation="mirror")
    again = learn(
        frames[:140], Target(item_mm=true_item_mm), lambda image: oriented(image, back[orientation]), configured
    )
    assert again.orientation == f"mirror-{orientation}", "what was configured before is part of what is written"


@pytest.mark.slow
def test_a_board_is_measured_along_the_belt_of_a_turned_camera(frames: list[Frame]) -> None:
    found, _ = calibrate(
        LineConfig(),
        Target(pattern=(9, 6), square_mm=20.0),
        date=DATE,
        opener=lambda: Replay(frames, lambda image: oriented(image, "rotate-90")),
        board_opener=lambda: Replay([board(0.9, stretch=1.01, turn_deg=0.0)]),
    )
    assert found.orientation == "rotate-270"
    assert found.mm_per_px == pytest.approx(0.9 / 1.01, rel=0.004), "not 0.9, which holds across the belt"
    assert -0.02 < found.anisotropy < -0.005, "a pixel is shorter along the belt than across it"


def test_an_empty_belt_a_standing_belt_and_too_few_frames_are_distinguished(frames: list[Frame]) -> None:
    empty = record(msgspec.structs.replace(WORLD, items_per_s=0.001), 5)
    noise = np.random.default_rng(1)

    def standing(frame: Frame) -> list[Frame]:
        return [
            replace(frame, number=k, image=cv2.add(frame.image, noise.integers(0, 5, frame.image.shape, np.uint8)))
            for k in range(40)
        ]

    for scene, code in (
        (standing(empty[0]), "calibration.no_items"),
        (standing(frames[100]), "calibration.belt_stands"),
        (frames[:5], "calibration.too_few_frames"),
        ([], "calibration.too_few_frames"),
    ):
        with pytest.raises(InputError) as caught:
            learn(scene, Target(item_mm=75.0))
        assert caught.value.code == code
        assert caught.value.expected is not None


@pytest.mark.slow
def test_an_empty_lane_is_noticed_or_refused_when_two_are_expected(frames: list[Frame]) -> None:
    line = SimulatedLine(WORLD, virtual=True)
    belt = line._belt[:, : WORLD.width_px]

    def emptied(image: np.ndarray) -> np.ndarray:
        image = image.copy()
        image[120:] = belt[120:]
        return image

    with pytest.raises(InputError) as caught:
        learn(frames[:90], Target(item_mm=75.0, lanes=2), emptied)
    assert caught.value.code == "calibration.wrong_lanes"
    assert "2" in str(caught.value.expected)
    assert "around row 6" in str(caught.value.got)
    found = learn(frames[:150], Target(item_mm=75.0), emptied)
    assert len(found.lane_rows) == 1
    assert any("room for another lane" in note for note in found.notes)


def test_lanes_are_heaps_of_rows_and_a_smear_is_none() -> None:
    rng = np.random.default_rng(3)
    heaps = [float(v) for centre in (60, 180, 300) for v in rng.normal(centre, 8.0, 40)]
    found = find_lanes([*heaps, 400.0], [80.0] * 121, 420)
    assert [lane.top_px for lane in found.rows] == pytest.approx([0, 120, 240], abs=4)
    assert found.rows[-1].bottom_px == pytest.approx(360, abs=8)
    assert (found.items, found.stray) == ((40, 40, 40), 1)
    for rows, expected, code in (
        (list(rng.uniform(40, 380, 200)), None, "calibration.lanes_not_separable"),
        (list(rng.uniform(40, 380, 200)), 2, "calibration.lanes_not_separable"),
        (heaps, 2, "calibration.wrong_lanes"),
        (heaps[:6], 2, "calibration.too_few_items"),
        ([60.0, 61.0], None, "calibration.too_few_items"),
    ):
        with pytest.raises(InputError) as caught:
            find_lanes(rows, [80.0] * len(rows), 420, expected)
        assert caught.value.code == code


def board(
    mm_per_px: float, *, stretch: float = 1.0, tilt: float = 0.0, turn_deg: float = 7.0, noise: float = 3.0
) -> Frame:
    """A 9x6 board of 20 mm squares, seen so, over-sampled and noisy."""
    cell, over = 40, 3
    cells = np.indices((9, 12)).sum(axis=0) % 2
    cells[:, [0, -1]], cells[[0, -1]] = 1, 1
    art = np.kron(cells.astype(np.uint8) * 190 + 30, np.ones((cell, cell), np.uint8))
    scale = 20.0 / cell / mm_per_px * over
    angle = np.deg2rad(turn_deg)
    move = np.array([[1, 0, 320 * over], [0, 1, 240 * over], [0, 0, 1.0]])
    lens = np.array([[1, 0, 0], [0, stretch, 0], [tilt / over, 0, 1.0]])
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    centre = np.diag([scale, scale, 1.0]) @ np.array([[1, 0, -6.0 * cell], [0, 1, -4.5 * cell], [0, 0, 1.0]])
    big = cv2.warpPerspective(art, move @ lens @ turn @ centre, (640 * over, 480 * over), borderValue=220)
    grey = cv2.resize(big, (640, 480), interpolation=cv2.INTER_AREA).astype(np.float32)
    grey += np.random.default_rng(1).normal(0.0, noise, grey.shape)
    return Frame(np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2), 0, 0.0, 0.0)


@pytest.mark.parametrize(("mm_per_px", "turn_deg"), [(0.625, 0.0), (0.5, 12.0), (0.8, -90.0)])
def test_a_noisy_checkerboard_gives_the_scale(mm_per_px: float, turn_deg: float) -> None:
    found = scale_from_board([board(mm_per_px, turn_deg=turn_deg)], (9, 6), 20.0)
    assert found.mm_per_px == pytest.approx(mm_per_px, rel=0.002)
    assert found.residual_px < 0.35
    assert abs(found.anisotropy) < 0.005


def test_a_board_seen_badly_or_not_at_all_is_refused() -> None:
    for frame, code in (
        (board(0.625, stretch=0.95, turn_deg=0.0), "calibration.bad_board"),
        (board(0.625, tilt=0.0004), "calibration.bad_board"),
        (Frame(np.full((480, 640, 3), 90, np.uint8), 0, 0.0, 0.0), "calibration.no_board"),
    ):
        with pytest.raises(InputError) as caught:
            scale_from_board([frame], (9, 6), 20.0)
        assert caught.value.code == code
    for text in ("9", "9x", "2x6", "x", "9x6x4", "-9x6", "999x6"):
        with pytest.raises(InputError) as caught:
            parse_pattern(text)
        assert caught.value.code == "calibration.bad_pattern"
    with pytest.raises(InputError) as caught:
        scale_from_board([], (9, 6), float("nan"))
    assert caught.value.code == "calibration.bad_pattern"


@pytest.mark.slow
def test_a_board_before_the_items_sets_the_scale(frames: list[Frame]) -> None:
    found, _ = calibrate(
        LineConfig(),
        Target(pattern=(9, 6), square_mm=20.0),
        date=DATE,
        opener=lambda: Replay(frames),
        board_opener=lambda: Replay([board(0.9)]),
    )
    assert (found.scale_from, found.scale_seen) == ("checkerboard", 1)
    assert found.belt_mm_s == pytest.approx(WORLD.belt_mm_s, rel=0.005)


def test_the_interval_of_the_item_scale_narrows_with_items() -> None:
    rng = np.random.default_rng(2)
    few = scale_from_items(list(rng.normal(120, 6, 25)), 75.0)
    many = scale_from_items(list(rng.normal(120, 6, 2500)), 75.0)
    assert few.low < 0.625 < few.high
    assert many.high - many.low < 0.3 * (few.high - few.low)
    for lengths, item_mm, code in (
        ([120.0] * 11, 75.0, "calibration.too_few_items"),
        ([120.0] * 30, 0.5, "calibration.bad_item_size"),
        ([120.0] * 30, float("nan"), "calibration.bad_item_size"),
    ):
        with pytest.raises(InputError) as caught:
            scale_from_items(lengths, item_mm)
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("target", "date", "frames", "code"),
    [
        (Target(), DATE, 100, "calibration.no_scale"),
        (Target(item_mm=75.0, pattern=(9, 6), square_mm=20.0), DATE, 100, "calibration.no_scale"),
        (Target(item_mm=75.0), "31.01.2027", 100, "calibration.bad_date"),
        (Target(item_mm=75.0), DATE, 0, "calibration.bad_count"),
        (Target(item_mm=75.0, lanes=0), DATE, 100, "calibration.bad_count"),
    ],
)
def test_a_wrong_request_is_refused_before_the_camera_is_opened(
    target: Target, date: str, frames: int, code: str
) -> None:
    def never() -> Replay:
        raise AssertionError("opened")

    with pytest.raises(InputError) as caught:
        calibrate(LineConfig(), target, date=date, frames=frames, opener=never)
    assert caught.value.code == code


EXAMPLE = Calibration(
    date=DATE,
    camera="line\n[line]\nlanes = 9",
    width_px=640,
    height_px=340,
    frames=450,
    items=190,
    mm_per_px=0.62149,
    mm_per_px_low=0.619,
    mm_per_px_high=0.6225,
    scale_from="items",
    scale_seen=175,
    residual_px=0.0,
    anisotropy=0.0,
    lane_rows=((0, 170), (170, 340)),
    lane_centres=(84.5, 254.5),
    lane_items=(100, 90),
    stray_items=0,
    direction="bottom-top",
    orientation="rotate-90",
    px_per_frame=53.333,
    belt_mm_s=994.4,
    speed_spread=0.002,
    outlets_mm={"reject": 700.0, 'odd "name"\\ü.x': 812.5},
)


def test_the_written_geometry_is_what_the_agent_reads(tmp_path: Path) -> None:
    picture = np.zeros((20, 30, 3), np.uint8)
    geometry, overlay = tmp_path / "new" / "geometry.toml", tmp_path / "new" / "geometry.png"
    write_calibration(EXAMPLE, picture, geometry, overlay)
    line = load_agent_config(geometry, {}, {}).line
    assert (line.mm_per_px, line.belt_mm_s, line.lanes) == (0.62149, 994.4, 2)
    assert line.lane_rows == EXAMPLE.lane_rows
    assert (line.width_px, line.height_px, line.orientation) == (640, 340, "rotate-90")
    assert line.outlets_mm == EXAMPLE.outlets_mm
    assert cv2.imread(str(overlay)).shape == picture.shape
    assert sorted(path.name for path in geometry.parent.iterdir()) == ["geometry.png", "geometry.toml"]
    assert DATE in geometry_toml(EXAMPLE)
    with pytest.raises(InputError) as caught:
        write_calibration(EXAMPLE, picture, geometry / "below-a-file.toml", None)
    assert caught.value.code == "calibration.not_written"


def test_the_overlay_shows_lanes_and_ruler() -> None:
    image = np.full((200, 400, 3), 60, np.uint8)
    sketch = Sketch(0.5, (Lane(20, 100), Lane(100, 180)), (Blob(200.0, 60.0, 70.0, 66.0),), "title", "more", {})
    right = draw(image, sketch)
    assert right.shape[1] == 1200
    # Rows outside the lanes are dimmed, the item's outline is white.
    assert right[64 + 10].max() < 60
    assert (right[64 + 60 * 3, :, :] == 255).all(axis=1).any()


def green_columns(picture: np.ndarray, rows: slice) -> int:
    """Returns the number of columns that an arrow covers in these rows."""
    strip = picture[rows].astype(int)
    return int(((strip[:, :, 1] > 150) & (strip[:, :, 2] < 160)).any(axis=0).sum())


def test_the_overlay_shows_how_far_each_outlet_is() -> None:
    image = np.full((200, 400, 3), 60, np.uint8)
    outlets = {"reject": 900.0, "juice": 450.0}
    sketch = Sketch(0.5, (Lane(20, 180),), (), "title", "more", outlets)
    picture = draw(image, sketch)
    foot = 64 + 200 * 3 + 54
    assert picture.shape[0] == foot + 34 * 3
    juice, reject = (green_columns(picture, slice(foot + 34 * k, foot + 34 * (k + 1))) for k in (1, 2))
    assert juice / reject == pytest.approx(0.5, abs=0.03), "the nearest outlet comes first, both to one scale"
    many = {f"outlet-{k}-\u00e9\x00" + "x" * 40: 0.5 + 1000.0 * k for k in range(20)}
    assert draw(image, replace(sketch, outlets_mm=many)).shape[0] == foot + 34 * 9
    assert draw(image, replace(sketch, outlets_mm={})).shape[0] == foot + 34


def test_items_that_all_touch_are_too_few_single_ones() -> None:
    crowd = record(msgspec.structs.replace(WORLD, items_per_s=12.5, touching_share=0.99), 90)
    with pytest.raises(InputError) as caught:
        learn(crowd, Target(item_mm=75.0))
    assert caught.value.code in {"calibration.too_few_items", "calibration.no_items"}


@pytest.mark.slow
def test_a_belt_that_stood_for_half_of_the_time_is_measured_while_it_ran() -> None:
    scene = record(msgspec.structs.replace(WORLD, items_per_s=9.0), 210, "1s stopped; 4s clear")
    found = learn(scene, Target(item_mm=75.0))
    assert found.px_per_frame == pytest.approx(TRUE_PX, rel=0.01)
    assert found.direction == "left-right"


def test_a_silent_camera_is_named_and_a_failing_one_is_closed() -> None:
    class Silent:
        closed = 0

        def read(self, _timeout_s: float) -> Frame | None:
            return None

        def close(self) -> None:
            self.closed += 1

    camera = Silent()
    with pytest.raises(CameraError) as caught:
        next(frames_of(lambda: camera, 5))
    assert caught.value.code == "camera.stalled"
    assert camera.closed == 1


@pytest.mark.slow
def test_the_command_writes_geometry_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], frames: list[Frame]
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for frame in frames[:100]:
        cv2.imwrite(str(folder / f"{frame.number}.bmp"), frame.image)
    (folder / "50.bmp").write_bytes(b"no picture")
    cv2.imwrite(str(tmp_path / "board.png"), board(0.9).image)
    output = tmp_path / "geometry.toml"
    flags = ["calibrate", "--camera", str(folder), "--output", str(output), "--date", DATE, "--lanes", "2"]
    scale = ["--checkerboard", "9x6", "--square-mm", "20", "--board-camera", str(tmp_path / "board.png")]
    assert main([*flags, *scale, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["mm_per_px"] == pytest.approx(0.9, rel=0.002)
    assert facts["lane_rows"] == [[0, 120], [120, 240]]
    assert facts["date"] == DATE
    assert (tmp_path / "geometry.png").stat().st_size > 10_000
    assert load_agent_config(output, {}, {}).line.belt_mm_s == pytest.approx(1000.0, rel=0.01)
    assert main([*flags]) == 1
    assert "calibration.no_scale" in capsys.readouterr().err
    assert main(["calibrate", "--camera", str(tmp_path / "missing.mp4"), "--item-mm", "75"]) == 4
    assert "camera.absent" in capsys.readouterr().err
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    for number in range(12):
        (unreadable / f"{number}.png").write_bytes(b"no picture")
    assert main(["calibrate", "--camera", str(unreadable), "--item-mm", "75"]) == 4
    assert "camera.corrupt" in capsys.readouterr().err


def test_bad_configuration_stays_a_configuration_error(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text("[line]\nmm_per_pixel = 1.0\n")
    with pytest.raises(ConfigError):
        load_agent_config(path, {}, {})
    assert main(["calibrate", "--config", str(path), "--item-mm", "75"]) == 2
