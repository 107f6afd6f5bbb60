"""Commands on a live camera, over a real socket in real processes, survive a pause and end with exit status 0."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.devices.hardware import open_hardware
from edge_agent.line_config import LineConfig
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from models.errors import CameraError
from tests.simulators.stream_camera import StreamCamera
from tests.simulators.tiny_bundle import tiny_bundle

WORLD = SimulationConfig(
    apples=12,
    varieties=("golden",),
    width_px=320,
    lane_px=100,
    mm_per_px=1.25,
    items_per_s=6.0,
    seed=7,
    belt_mm_s=500.0,
)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    line = SimulatedLine(WORLD, virtual=True)
    return [line.read(1.0).image for _ in range(150)]


@pytest.fixture
def camera(images: list[np.ndarray]) -> Iterator[StreamCamera]:
    with StreamCamera(images, 15.0).running() as camera:
        yield camera


def command(tmp_path: Path, camera: StreamCamera, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "line.toml"
    config.write_text("[line]\nmm_per_px = 1.25\nframes_per_s = 15.0\nbelt_mm_s = 250.0\n")
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", *arguments, "--camera", camera.url, "--config", str(config), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "collect", "calibrate"])
def test_a_command_survives_a_pause_and_ends_with_exit_status_0(
    name: str, tmp_path: Path, camera: StreamCamera
) -> None:
    tiny_bundle(tmp_path / "bundle")
    arguments = {
        "run": ["--bundle", str(tmp_path / "bundle"), "--seconds", "8"],
        "collect": ["--items", "40", "--output", str(tmp_path / "views")],
        "calibrate": ["--item-mm", "75", "--frames", "400", "--output", str(tmp_path / "geometry.toml")],
    }[name]
    camera.pause_after, camera.pause_s = 15, 3.0
    done = command(tmp_path, camera, name, *arguments)
    assert done.returncode == 0, done.stderr
    assert "being reopened" in done.stderr
    assert camera.connections >= 2
    facts = json.loads(done.stdout)
    assert facts["items"] >= 5
    if name == "run":
        assert facts["camera"]["reopened"] >= 1


@pytest.mark.slow
def test_a_command_ends_in_order_while_a_thread_still_waits_for_the_camera(
    tmp_path: Path, camera: StreamCamera
) -> None:
    camera.silent.set()
    done = command(tmp_path, camera, "collect", "--items", "3", "--output", str(tmp_path / "views"))
    assert done.returncode == 4, done.stderr
    assert "camera." in done.stderr


@pytest.mark.slow
def test_a_camera_that_comes_back_at_another_size_is_named(camera: StreamCamera, images: list[np.ndarray]) -> None:
    config = LineConfig(
        camera=camera.url, mm_per_px=1.25, width_px=320, height_px=200, frames_per_s=15.0, encoder="nominal"
    )
    hardware = open_hardware(config)
    codes, frames = set(), 0
    for _ in range(400):
        try:
            frames += hardware.source.read(0.25) is not None
        except CameraError as error:
            codes.add(error.code)
        if frames == 10 and camera.pause_after == 0:
            camera.pictures = [camera._jpeg(np.repeat(np.repeat(image, 2, 0), 2, 1)) for image in images[:30]]
            camera.pause_after, camera.pause_s = camera.sent + 1, 0.1
        if "camera.wrong_size" in codes:
            break
    hardware.close()
    assert "camera.wrong_size" in codes
    assert hardware.frames_bad >= 1
