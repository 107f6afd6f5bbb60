"""A line process whose camera hangs in its driver; started as `python -m edge_agent.line.process` is.

The capture gives the simulated line's frames in real time. A file beside the configuration (`camera.state`) says what
it does: `good`, `hang` (a running `read()` blocks for ever), `gone` (nothing opens).
"""

import argparse
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.devices.hardware import LineHardware, simulation_config
from edge_agent.devices.live_camera import LiveCamera
from edge_agent.line.process import Line
from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import Pipe
from edge_agent.simulation.line import SimulatedLine


class Capture:
    """The part of `cv2.VideoCapture` that is used, over the simulated line."""

    def __init__(self, line: SimulatedLine, state: Path) -> None:
        self._line, self._state = line, state

    def isOpened(self) -> bool:  # noqa: N802  (OpenCV's name)
        return self._state.read_text() != "gone"

    def get(self, _what: int) -> float:
        return 0.0

    def release(self) -> None:
        return

    def read(self) -> tuple[bool, Any]:
        while True:
            state = self._state.read_text()
            if state == "hang":
                threading.Event().wait()
            if state == "gone":
                return False, None
            frame = self._line.read(1.0)
            if frame is not None:
                return True, frame.image


class Encoded(LiveCamera):
    """Its frames carry the simulated belt's position."""

    def __init__(self, line: SimulatedLine, state: Path) -> None:
        super().__init__("hanging", encoder=line, opener=lambda _source: Capture(line, state))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--pipe-fd", type=int, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    config = msgspec.json.decode(arguments.config.read_bytes(), type=LineConfig)
    simulated = SimulatedLine(simulation_config(config), clock=time.monotonic)
    camera = Encoded(simulated, arguments.config.parent / "camera.state")
    world = LineHardware(camera, simulated, simulated, simulated, "hanging", None, simulated)
    return Line(config, Pipe(socket.socket(fileno=arguments.pipe_fd)), world).run()


if __name__ == "__main__":
    import os

    os._exit(main())
