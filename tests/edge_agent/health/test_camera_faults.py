"""Each camera fault is named within two seconds, its frames are refused, and it is over within five."""

from dataclasses import replace

import numpy as np
import pytest

from edge_agent.health.camera import CameraHealth
from edge_agent.interfaces import Frame
from edge_agent.simulation.faults import Faults
from edge_agent.vision.judge import Judge
from tests.simulators.camera_bench import FAULTS, Bench
from tests.simulators.tiny_bundle import tiny_bundle


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return Judge(directory)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_within_two_seconds_and_over_within_five(fault: str) -> None:
    bench = Bench()
    bench.run(3.0)
    assert bench.events == []
    began_s = bench.trouble(FAULTS[fault], 4.0)
    ended_s = bench.now
    bench.run(5.0)
    (named_s, code), (over_s, over) = bench.events
    assert (code, over) == (f"camera.{fault}", "camera.recovered")
    assert named_s - began_s <= 2.0
    assert 0.0 < over_s - ended_s <= 5.0


def test_a_camera_that_is_black_from_the_start_is_named() -> None:
    bench = Bench()
    bench.trouble(FAULTS["black"], 2.0)
    assert [code for _, code in bench.events] == ["camera.black"]


def test_one_fault_that_becomes_another_is_named_again() -> None:
    bench = Bench()
    bench.run(2.0)
    bench.trouble(FAULTS["black"], 2.0)
    bench.trouble(FAULTS["absent"], 2.0)
    bench.run(2.0)
    assert [code for _, code in bench.events] == ["camera.black", "camera.absent", "camera.recovered"]


@pytest.mark.parametrize(
    "trouble",
    [
        Faults(brightness=0.6),
        Faults(brightness=1.4),
        Faults(brightness=0.35),
        Faults(blue=0.6, red=1.4),
        pytest.param(Faults(blur_px=4.0), marks=pytest.mark.slow),
        pytest.param(Faults(dirt=0.8), marks=pytest.mark.slow),
        Faults(stopped=True),
        pytest.param(Faults(speed_factor=0.3), marks=pytest.mark.slow),
        Faults(corrupt_share=0.1),
        Faults(drop_share=0.2),
    ],
)
def test_ordinary_disturbances_are_no_fault(trouble: Faults) -> None:
    bench = Bench()
    bench.run(2.0)
    bench.trouble(trouble, 4.0)
    bench.run(2.0)
    assert bench.events == []


def test_a_repeated_picture_compressed_again_is_frozen_only_while_the_belt_moves() -> None:
    bench = Bench()
    bench.run(3.0)
    picture = bench.line.read(1.0).image
    rng = np.random.default_rng(5)

    def shown(number: int, belt_mm: float) -> bool:
        image = picture.copy()
        image[rng.random(image.shape) < 0.01] ^= 1
        return bench.watch.take(Frame(image, number, number / 30.0, belt_mm), number / 30.0)

    standing = [shown(number, 5000.0) for number in range(100, 160)]
    assert all(standing[1:])
    assert bench.events == []
    moving = [shown(number, 5000.0 + 33.0 * (number - 160)) for number in range(161, 200)]
    assert not any(moving)
    assert [code for _, code in bench.events] == ["camera.frozen"]


def torn(frame: Frame, before: Frame, old_rows: slice) -> Frame:
    image = frame.image.copy()
    image[old_rows] = before.image[old_rows]
    return replace(frame, image=image)


@pytest.mark.parametrize("old_rows", [slice(85, None), slice(0, 85), slice(50, 100)])
def test_a_picture_torn_between_two_frames_is_refused_and_named(old_rows: slice) -> None:
    bench = Bench()
    bench.run(2.0)
    before = bench.line.read(1.0)
    assert before is not None
    assert bench.watch.take(before, bench.now)
    accepted = []
    for _ in range(30):
        frame = bench.line.read(1.0)
        assert frame is not None
        # The buffer holds a part of the frame before; what was torn once is not carried on.
        accepted.append(bench.watch.take(torn(frame, before, old_rows), bench.now))
        before = frame
        if bench.watch.fault:
            break
        good = bench.line.read(1.0)
        assert good is not None
        assert bench.watch.take(good, bench.now)
        before = good
    assert not any(accepted)
    assert bench.watch.fault == "camera.corrupt"
    bench.run(2.0)
    assert not bench.watch.fault


def test_rows_that_a_compressed_stream_always_repeats_are_no_torn_picture() -> None:
    bench = Bench()
    first = bench.line.read(1.0)
    assert first is not None
    for _ in range(90):
        frame = bench.line.read(1.0)
        assert frame is not None
        # A third of the picture shows the machine's frame, which the encoder repeats to the last bit.
        assert bench.watch.take(torn(frame, first, slice(110, None)), bench.now)
    assert not bench.watch.fault


def test_a_belt_that_stops_before_a_compressed_stream_tears_no_picture() -> None:
    bench = Bench()
    bench.run(2.0)
    bench.line.set_trouble(Faults(stopped=True))
    bench.run(1.0)
    still = bench.line.read(1.0)
    for _ in range(20):
        frame = bench.line.read(1.0)
        assert frame is not None
        assert still is not None
        assert bench.watch.take(torn(frame, still, slice(60, None)), bench.now)
    assert not bench.watch.fault


def test_bad_frames_are_refused_and_not_counted_as_dropped(judge: Judge) -> None:
    bench = Bench(judge)
    bench.run(2.0)
    bench.trouble(Faults(corrupt_share=0.1), 6.0)
    bench.run(1.0)
    total = bench.counter.total
    assert total["frames_bad"] > 5
    assert total["frames_dropped"] == 0
    assert total["frames"] + total["frames_bad"] == round(bench.now * 30.0) + 1


def test_the_watch_of_a_recording_looks_at_sizes_only() -> None:
    watch = CameraHealth(frames_per_s=30.0, live=False)
    dark = np.zeros((40, 60, 3), np.uint8)
    assert all(watch.take(Frame(dark, n, n / 30.0, 0.0), n / 30.0) for n in range(90))
    watch.silent(100.0)
    assert watch.fault == ""
    assert not watch.take(Frame(dark[:20], 90, 3.0, 0.0), 3.0)
    assert watch.fault == "camera.wrong_size"
