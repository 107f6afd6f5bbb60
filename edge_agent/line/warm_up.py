"""What a standby holds in memory, and what it does while it waits (`standby` is the process around it).

It holds everything a line needs but its hardware: camera, encoder and ejector are opened after `Go`. Thread counts are
taken from the line and never measured here, because beside a working line and at a low priority the result is wrong.
"""

import gc
import socket
from dataclasses import dataclass
from pathlib import Path

import cv2
import msgspec

from edge_agent.devices.hardware import prerender
from edge_agent.line.loader import load_judge, return_memory
from edge_agent.line.process import serve
from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import Go, Pipe, Stop, ToLine, Waiting
from edge_agent.simulation.line import SimulatedLine
from edge_agent.vision.judge import Judge
from models.errors import UnavailableError

_BEAT_S = 1.0


@dataclass(slots=True)
class WarmLine:
    """A line that lacks nothing but its hardware.

    Args:
        config: The line.
        pipe: Connection to the supervisor.
        judge: The configuration's bundle; None = it is to be loaded by `load_for_many`, or there is none.
        drawn: The simulated line, where the camera is simulated.
    """

    config: LineConfig
    pipe: Pipe
    judge: Judge | None
    drawn: SimulatedLine | None

    def load_for_many(self) -> None:
        """Loads a bundle for several threads: they keep the priority of the thread that calls this.

        Raises:
            BundleError: The bundle is not usable.
        """
        if self.judge is None:
            self.judge = load_judge(self.config, lambda _directory, _digest: self.config.threads)

    def wait(self) -> bool:
        """Reports once a second that it waits; returns whether it becomes the line (else it is not needed any more)."""
        gc.collect()
        gc.freeze()
        return_memory()
        try:
            while True:
                self.pipe.send(Waiting())
                message = self.pipe.receive(ToLine, _BEAT_S)
                if isinstance(message, Go):
                    self.config = msgspec.structs.replace(self.config, **msgspec.structs.asdict(message))
                    return True
                if isinstance(message, Stop):
                    return False
        except UnavailableError:
            return False

    def serve(self) -> int:
        """Becomes the line; see `process.serve`."""
        return serve(self.config, self.pipe, judge=self.judge, drawn=self.drawn)


def warm_up(config_file: Path, pipe_fd: int) -> WarmLine:
    """Loads and tries everything that needs no device.

    Args:
        config_file: `LineConfig` as JSON.
        pipe_fd: Inherited socket to the supervisor.

    Raises:
        BundleError: The bundle is not usable.
        ConfigError: The simulation's settings are impossible.
    """
    config = msgspec.json.decode(config_file.read_bytes(), type=LineConfig)
    # OpenCV starts its helping threads when it first needs them, with the priority of the thread that needs them.
    cv2.setNumThreads(1)
    judge = load_judge(config, lambda _directory, _digest: 1) if config.threads <= 1 else None
    return WarmLine(config, Pipe(socket.socket(fileno=pipe_fd)), judge, prerender(config))
