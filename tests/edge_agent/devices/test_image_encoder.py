"""The image encoder keeps to the belt: speed changes, stops, jerks, repeated frames, a trembling camera."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.encoderless import FILMS, MOST_WRONG, follow
from edge_agent.devices.hardware import open_hardware
from edge_agent.devices.image_encoder import ImageEncodedCamera, ImageEncoder, belt_of
from edge_agent.ejection.queue import EjectionQueue
from edge_agent.interfaces import Encoder, Frame, FrameSource
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import LineCore
from edge_agent.line_config import LineConfig
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.belt_motion import learn_belt, mismatch, vertex
from edge_agent.vision.judge import Judge
from models.errors import CameraError, InputError
from tests.simulators.tiny_bundle import tiny_bundle

WORLD = SimulationConfig(
    apples=16, varieties=("golden", "red"), width_px=480, lane_px=120, mm_per_px=0.9, items_per_s=7.0, seed=5
)


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    line = SimulatedLine(WORLD, virtual=True)
    return [frame for frame in (line.read(1.0) for _ in range(180)) if frame is not None]


def drift(line: SimulatedLine, encoder: ImageEncoder, frames: int) -> np.ndarray:
    """Error of the position after each frame, millimetres."""
    errors = []
    for _ in range(frames):
        frame = line.read(1.0)
        if frame is not None:
            errors.append(encoder.feed(frame) - frame.belt_mm)
    return np.array(errors)


def test_the_image_encoder_keeps_to_the_belt_through_a_speed_change_and_a_stop() -> None:
    line = SimulatedLine(
        WORLD, virtual=True, schedule="3s speed_factor=0.6; 5s stopped; 7s stopped=false speed_factor=1.2"
    )
    encoder = ImageEncoder(WORLD.mm_per_px, nominal_mm_s=WORLD.belt_mm_s)
    as_seam: Encoder = encoder
    errors = drift(line, encoder, 190)
    assert np.abs(errors).max() < 6.0
    position_mm = as_seam.position_mm(line.now())
    assert as_seam.speed_mm_s() == 0.0
    assert as_seam.position_mm(line.now() + 1.0) == position_mm
    errors = drift(line, encoder, 110)
    assert np.abs(errors).max() < 6.0
    assert encoder.speed_mm_s() == pytest.approx(1200.0, rel=0.03)
    assert as_seam.position_mm(line.now() + 0.01) - as_seam.position_mm(line.now()) == pytest.approx(12.0, rel=0.03)
    # Only the pictures from which the belt was learnt were blind.
    assert encoder.blind_frames <= 45
    assert encoder.frames == 300


@pytest.mark.slow
def test_ejections_hit_by_the_image_encoder_alone(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    line = SimulatedLine(WORLD, virtual=True, schedule="5s speed_factor=0.7; 7s stopped; 8s clear")
    encoder = ImageEncoder(WORLD.mm_per_px, nominal_mm_s=WORLD.belt_mm_s)
    camera: FrameSource = ImageEncodedCamera(line, encoder)
    queue = EjectionQueue(encoder, line, lead_ms=0.0, clock=line.now)
    counter = LineCounter(WORLD.lanes, truth=line.truth, clock=line.now)
    core = LineCore(geometry=line.geometry, counter=counter, queue=queue, clock=line.now)
    core.use(Judge(tmp_path / "bundle"))
    for _ in range(300):
        before_s = line.now()
        frame = camera.read(1.0)
        queue.run_to(before_s, line.now())
        core.process(frame)
    shots = line.truth().ejections

    assert shots["on_time"] > 20
    assert shots.get("wrong", 0) + shots.get("gap", 0) + shots.get("late", 0) <= 0.05 * shots["on_time"]
    camera.close()


def test_the_image_encoder_keeps_its_speed_when_nothing_is_seen_but_not_for_ever(frames: list[Frame]) -> None:
    looks = [cv2.resize(frame.image, (160, 80), interpolation=cv2.INTER_AREA).astype(np.float32) for frame in frames]
    belt = learn_belt(looks[20:])
    encoder = ImageEncoder(WORLD.mm_per_px, hold_s=1.0, belt=belt)
    for frame in frames[30:90]:
        encoder.feed(frame)
    speed, blind, start = encoder.speed_mm_s(), encoder.blind_frames, encoder.position_mm(frames[89].captured_s)
    assert speed == pytest.approx(WORLD.belt_mm_s, rel=0.03)
    empty = np.clip(cv2.resize(belt, (480, 240)), 0, 255).astype(np.uint8)
    for number in range(90, 180):
        encoder.feed(replace(frames[number], image=empty))
    assert encoder.blind_frames - blind >= 89
    assert encoder.position_mm(frames[179].captured_s) - start == pytest.approx(speed * 1.0, rel=0.05)
    assert encoder.held_mm == pytest.approx(speed * 1.0, rel=0.1)
    assert encoder.speed_mm_s() == 0.0
    before = encoder.position_mm(frames[179].captured_s)
    again = [replace(frame, captured_s=frame.captured_s + 6.0) for frame in frames[30:60]]
    for frame in again:
        encoder.feed(frame)
    ran = again[-1].belt_mm - again[0].belt_mm
    assert encoder.position_mm(again[-1].captured_s) - before == pytest.approx(ran, abs=10.0)


def test_the_image_encoder_refuses_what_it_cannot_work_with(frames: list[Frame]) -> None:
    for options in ({"mm_per_px": 0.0}, {"mm_per_px": 0.5, "hold_s": -1.0}, {"mm_per_px": float("nan")}):
        with pytest.raises(InputError) as caught:
            ImageEncoder(**options)
        assert caught.value.code == "encoder.bad_setting"
    encoder = ImageEncoder(0.9)
    assert (encoder.position_mm(5.0), encoder.speed_mm_s()) == (0.0, 0.0)
    encoder.feed(frames[0])
    with pytest.raises(CameraError) as wrong:
        encoder.feed(replace(frames[1], image=frames[1].image[:50]))
    assert wrong.value.code == "camera.wrong_size"


def test_a_shift_is_read_between_pixels_and_over_any_range() -> None:
    x, y = np.meshgrid(np.arange(160.0), np.arange(60.0))
    for true in (-20.4, -0.3, 0.0, 0.25, 13.5, 40.1):
        a, b = (
            np.clip(15.5 - np.hypot(x - 80.0 - moved, y - 30.0), 0.0, 1.0).astype(np.float32) for moved in (0.0, true)
        )
        for shifts in (range(-60, 61), range(int(true) - 3, int(true) + 4)):
            fits = mismatch(a, b, shifts)
            best = int(fits.argmin())
            assert shifts[best] + vertex(fits, best) == pytest.approx(true, abs=0.12)
            at = shifts[best]
            one, other = a[:, max(0, -at) : 160 - max(0, at)], b[:, max(0, at) : 160 - max(0, -at)]
            plain = 1.0 - 2.0 * float((one * other).sum()) / float((one**2).sum() + (other**2).sum())
            assert fits[best] == pytest.approx(max(plain, 0.0), abs=1.0e-5)
    assert not np.isfinite(mismatch(a * 0.0, b * 0.0, range(-5, 6))).any()
    assert not np.isfinite(mismatch(a, b, range(97, 160))).any(), "too little of the two pictures is in common"


@pytest.mark.parametrize("film", ["six pictures a second, hand, 1000 mm/s", "trembling hand, speeds and stop"])
@pytest.mark.slow
def test_items_keep_their_identity_without_an_encoder(film: str) -> None:
    result = follow(FILMS[film], frames=150)
    assert result.items > 30
    assert result.wrong <= MOST_WRONG
    assert abs(result.given - result.items) <= MOST_WRONG * result.items + 1


@pytest.mark.slow
@pytest.mark.parametrize("film", FILMS)
def test_at_most_two_items_in_a_hundred_are_doubled_or_lost(film: str) -> None:
    # One film has some ninety items, of which two are more than two in a hundred already: two films are taken together.
    results = [follow(FILMS[film], frames=450, seed=seed) for seed in (2, 3)]
    items = sum(result.items for result in results)
    assert sum(result.wrong * result.items for result in results) <= MOST_WRONG * items, results


def test_too_few_pictures_that_differ_show_no_belt(frames: list[Frame]) -> None:
    assert belt_of([frames[20].image] * 50) is None
    assert belt_of(frame.image for frame in frames[20:60]) is not None


@pytest.mark.slow
def test_without_an_encoder_the_belt_is_measured_from_the_picture_by_default(
    tmp_path: Path, frames: list[Frame]
) -> None:
    for frame in frames[40:80]:
        cv2.imwrite(str(tmp_path / f"{frame.number}.png"), frame.image)
    for encoder, error_mm in (("", 6.0), ("image", 6.0), ("nominal", 800.0)):
        # The nominal speed is wrong by more than half.
        config = LineConfig(
            camera=str(tmp_path), paced=False, mm_per_px=0.9, belt_mm_s=400.0, encoder=encoder, frames_per_s=30.0
        )
        hardware = open_hardware(config)
        belts = [hardware.source.read(1.0).belt_mm for _ in range(40)]
        found = abs((belts[-1] - belts[0]) - (frames[79].belt_mm - frames[40].belt_mm))
        assert found < error_mm if encoder != "nominal" else found > 600.0
        hardware.close()
    simulated = open_hardware(LineConfig(encoder="image"), virtual=True)
    assert isinstance(simulated.encoder, ImageEncoder)
    assert isinstance(open_hardware(LineConfig(), virtual=True).encoder, SimulatedLine)
