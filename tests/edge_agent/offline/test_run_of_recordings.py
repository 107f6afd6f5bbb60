"""Recordings from real lines have lost frames, cut files, damaged pictures, another size. Items are counted right."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_agent.calibration.calibrate import Target, calibrate
from edge_agent.devices.hardware import geometry_of, open_hardware
from edge_agent.line_config import LineConfig
from edge_agent.offline.collect import collect
from edge_agent.offline.run import run_standalone
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from models.errors import CameraError, ConfigError
from tests.simulators.matroska import write_video
from tests.simulators.tiny_bundle import tiny_bundle

WORLD = SimulationConfig(
    apples=12, varieties=("golden",), width_px=320, lane_px=100, mm_per_px=1.25, items_per_s=6.0, seed=7
)
LINE = LineConfig(mm_per_px=1.25, lanes=2, paced=False)
FRAMES = 75


@dataclass(frozen=True)
class Filmed:
    """The pictures of a line, and how many items a run over all of them finds."""

    images: list[np.ndarray]
    bundle: Path
    items: int


def run(path: Path, bundle: Path, **changes: object) -> dict[str, object]:
    return run_standalone(msgspec.structs.replace(LINE, camera=str(path), **changes), bundle=bundle)


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Filmed:
    folder = tmp_path_factory.mktemp("filmed")
    tiny_bundle(folder / "bundle")
    line = SimulatedLine(WORLD, virtual=True)
    images = [line.read(1.0).image for _ in range(FRAMES)]
    video(folder / "all.mkv", images, range(FRAMES))
    facts = run(folder / "all.mkv", folder / "bundle")
    assert facts["frames"] == FRAMES
    return Filmed(images, folder / "bundle", int(facts["items"]))


def video(path: Path, images: list[np.ndarray], kept: object, stamps: dict[int, int] | None = None) -> None:
    """Frames `kept` of the line, each at its time or at the stamp that is given for it."""
    numbers = list(kept)
    times = [(stamps or {}).get(n, round(1000.0 * n / WORLD.frames_per_s)) for n in numbers]
    write_video(path, [images[n] for n in numbers], times)


HOLES = {
    "one-lost": ([30], {}),
    "five-percent-lost": ([12, 13, 31, 55], {}),
    "hole-at-the-start": ([1, 2, 3], {}),
    "doubled-stamps": ([], {10: 300, 41: 1333}),
    "stamps-that-jump-back": ([], {n: round(1000.0 * (n - 38) / 30.0) for n in range(40, FRAMES)}),
    "variable-rate": (list(range(20, 50, 2)), {}),
}


@pytest.mark.parametrize("encoder", ["", "nominal"])
@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.slow
def test_a_hole_costs_at_most_one_item(hole: str, encoder: str, filmed: Filmed, tmp_path: Path) -> None:
    lost, stamps = HOLES[hole]
    video(tmp_path / "line.mkv", filmed.images, [n for n in range(FRAMES) if n not in lost], stamps)
    facts = run(tmp_path / "line.mkv", filmed.bundle, encoder=encoder)
    assert facts["frames"] == FRAMES - len(lost)
    assert filmed.items - 1 <= facts["items"] <= filmed.items


@pytest.mark.slow
def test_calibrate_and_run_find_the_same_items_and_the_true_speed(filmed: Filmed, tmp_path: Path) -> None:
    lost = [n for n in range(FRAMES) if n % 19 == 7]
    video(tmp_path / "line.mkv", filmed.images, [n for n in range(FRAMES) if n not in lost])
    config = msgspec.structs.replace(LINE, camera=str(tmp_path / "line.mkv"))
    found, _ = calibrate(config, Target(item_mm=75.0), date="2027-01-31")
    assert found.px_per_frame == pytest.approx(1000.0 / 30.0 / 1.25, rel=0.02)
    facts = run(
        tmp_path / "line.mkv",
        filmed.bundle,
        mm_per_px=found.mm_per_px,
        belt_mm_s=found.belt_mm_s,
        lane_rows=found.lane_rows,
        width_px=found.width_px,
        height_px=found.height_px,
    )
    assert facts["items"] == found.items
    assert filmed.items - 1 <= found.items <= filmed.items


@pytest.mark.slow
def test_jerky_pictures_give_the_same_items_in_calibrate_and_run(filmed: Filmed, tmp_path: Path) -> None:
    # Filmed from a screen: every third picture, shown three times.
    write_video(
        tmp_path / "jerky.mkv",
        [filmed.images[n - n % 3] for n in range(FRAMES)],
        [round(1000.0 * n / 30.0) for n in range(FRAMES)],
    )
    config = msgspec.structs.replace(LINE, camera=str(tmp_path / "jerky.mkv"))
    found, _ = calibrate(config, Target(item_mm=75.0), date="2027-01-31")
    facts = run(tmp_path / "jerky.mkv", filmed.bundle)
    assert found.belt_mm_s / found.mm_per_px == pytest.approx(1000.0 / 1.25, rel=0.05)
    assert abs(found.items - facts["items"]) <= 1
    assert abs(facts["items"] - filmed.items) <= 1


def folder_of(filmed: Filmed, path: Path, suffix: str = ".jpg") -> Path:
    path.mkdir(exist_ok=True)
    for number, image in enumerate(filmed.images):
        cv2.imwrite(str(path / f"{number}{suffix}"), image)
    return path


def test_damaged_pictures_keep_their_place_and_are_counted(filmed: Filmed, tmp_path: Path) -> None:
    folder = folder_of(filmed, tmp_path / "frames")
    for number, share in ((9, 0.0), (33, 0.5), (34, 0.95)):
        data = (folder / f"{number}.jpg").read_bytes()
        (folder / f"{number}.jpg").write_bytes(data[: int(share * len(data))])
    for encoder in ("", "nominal"):
        facts = run(folder, filmed.bundle, encoder=encoder)
        assert (facts["frames"], facts["frames_bad"], facts["frames_dropped"]) == (FRAMES - 3, 3, 0)
        assert filmed.items - 1 <= facts["items"] <= filmed.items
        assert facts["camera"] == {"frames": FRAMES - 3, "corrupt": 3}


def test_a_cut_video_shows_how_many_frames_are_missing(filmed: Filmed, tmp_path: Path) -> None:
    path = tmp_path / "line.avi"
    height, width = filmed.images[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30.0, (width, height))
    for image in filmed.images:
        writer.write(image)
    writer.release()
    path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    facts = run(path, filmed.bundle)
    assert 0 < facts["frames"] < FRAMES
    assert facts["frames"] + facts["frames_bad"] == FRAMES


def test_twelve_bits_in_sixteen_are_judged_like_eight(filmed: Filmed, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number, image in enumerate(filmed.images):
        cv2.imwrite(str(tmp_path / "deep" / f"{number}.png"), image.astype(np.uint16) << 4)
    assert run(tmp_path / "deep", filmed.bundle)["items"] == filmed.items


def test_pictures_of_another_size_are_named_and_not_judged(filmed: Filmed, tmp_path: Path) -> None:
    folder = folder_of(filmed, tmp_path / "frames")
    size = {"width_px": 320, "height_px": 200}
    for number in range(50, FRAMES):
        image = cv2.resize(filmed.images[number], None, fx=2.0, fy=2.0)
        cv2.imwrite(str(folder / f"{number}.jpg"), image)
    facts = run(folder, filmed.bundle, **size)
    assert (facts["frames"], facts["frames_bad"]) == (50, FRAMES - 50)
    assert facts["camera"]["wrong_size"] == FRAMES - 50
    assert facts["items"] <= filmed.items
    with pytest.raises(CameraError) as caught:
        run(folder, filmed.bundle, width_px=640, height_px=340)
    assert caught.value.code == "camera.wrong_size"
    with pytest.raises(CameraError) as caught:
        collect(
            msgspec.structs.replace(LINE, camera=str(folder), width_px=640, height_px=340),
            tmp_path / "views",
            items=3,
        )
    assert caught.value.code == "camera.wrong_size"


@pytest.mark.parametrize(
    "changes",
    [
        {"lane_rows": ((0, 100), (100, 220)), "height_px": 200, "width_px": 320},
        {"lane_rows": ((-5, 100), (100, 200))},
        {"lane_rows": ((100, 200), (0, 100))},
        {"lane_rows": ((0, 100), (100, 104))},
        {"lane_rows": ((0, 100), (90, 200))},
        {"lane_rows": ((0, 100),)},
    ],
)
def test_lanes_that_cannot_be_are_refused_before_the_camera_is_opened(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        open_hardware(msgspec.structs.replace(LINE, camera="/not/there.mp4", **changes))
    assert caught.value.code == "line.bad_lane_rows"


def test_lanes_outside_the_picture_are_a_fault_of_the_camera(filmed: Filmed, tmp_path: Path) -> None:
    config = msgspec.structs.replace(
        LINE, camera=str(folder_of(filmed, tmp_path / "frames")), lane_rows=((0, 100), (100, 201)), encoder="nominal"
    )
    hardware = open_hardware(config)
    frame = hardware.source.read(1.0)
    with pytest.raises(CameraError) as caught:
        geometry_of(config, hardware, frame)
    assert caught.value.code == "camera.wrong_size"
    with pytest.raises(ConfigError) as refused:
        open_hardware(msgspec.structs.replace(LINE, camera="x.mp4", width_px=320))
    assert refused.value.code == "line.bad_picture"
