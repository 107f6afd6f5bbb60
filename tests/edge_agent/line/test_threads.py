"""Threads of the line: the simulated belt is shared by camera and valves, and no thread dies unnoticed."""

import itertools
import socket
import sys
import threading

import pytest

from edge_agent.devices.hardware import LineHardware, NullEjector, open_hardware
from edge_agent.interfaces import Frame, Shot
from edge_agent.line.process import Line
from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import Pipe
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from models.errors import CameraError


def test_valves_that_fire_while_the_camera_draws_disturb_nothing() -> None:
    line = SimulatedLine(SimulationConfig(apples=8, varieties=("golden",), items_per_s=12.0), virtual=True)
    done, problems = threading.Event(), []

    def fire() -> None:
        try:
            for number in itertools.count():
                if done.is_set():
                    return
                line.fire(
                    Shot(number % 2, "reject", number, line.position_mm(line.now())), line.now() + number % 9 / 40
                )
        except RuntimeError as error:
            problems.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    valves = threading.Thread(target=fire, name="valves")
    valves.start()
    try:
        for _ in range(150):
            line.read(0.0)
    finally:
        done.set()
        valves.join(5.0)
        sys.setswitchinterval(before)
    assert problems == []


class BrokenDriver:
    """A camera whose driver raises what no camera may raise."""

    def read(self, _timeout_s: float) -> Frame | None:
        raise RuntimeError("a defect of the driver")

    def close(self) -> None:
        """Nothing to let go of."""


@pytest.mark.slow
def test_a_line_that_lost_a_thread_ends_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    config = LineConfig(threads=1)
    simulated = open_hardware(config)
    line = Line(config, Pipe(ours), LineHardware(BrokenDriver(), simulated.encoder, NullEjector()))
    monkeypatch.setattr(threading, "excepthook", line.thread_died)
    try:
        assert line.run() == 6
    finally:
        theirs.close()


def test_a_camera_that_ends_is_no_thread_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends(BrokenDriver):
        def read(self, _timeout_s: float) -> Frame | None:
            raise CameraError("camera.ended", "The recording is over.")

    ours, theirs = socket.socketpair()
    config = LineConfig(threads=1)
    line = Line(config, Pipe(ours), LineHardware(Ends(), open_hardware(config).encoder, NullEjector()))
    monkeypatch.setattr(threading, "excepthook", line.thread_died)
    try:
        assert line.run() == 0
    finally:
        theirs.close()
