"""A simulated belt and camera in a process of their own, and the line process that is connected to it.

A real camera needs none of the line's processor: its pictures arrive in the buffers of a driver. Here they arrive in
a ring of shared memory, drawn by another process on another core; a packet on a socket says which slot is filled, when
the exposure was and where the belt stood. Shots go back over a second socket with the moment at which they were fired,
and the belt answers with what its photo-eyes saw.

    python -m benchmarks.belt belt ...    draws, publishes, takes shots; prints the truth as JSON at its end
    python -m benchmarks.belt line ...    the agent's line process with that belt as its hardware

The module contains no measurement; it starts no process and pins none.
"""

import argparse
import json
import logging
import mmap
import os
import signal
import socket
import struct
import sys
import threading
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Final

import cv2
import msgspec
import numpy as np

from edge_agent.devices.hardware import LineHardware, simulation_config
from edge_agent.interfaces import Frame, Shot, Sighting
from edge_agent.line.process import Line
from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import Pipe
from edge_agent.simulation.line import SimulatedLine
from models.errors import CameraError

SLOTS: Final = 8
"""A frame stays untouched for seven exposures: 230 ms at 30 frames/s."""
_FILLED: Final = struct.Struct("<qdd")
"""Number of the frame, its exposure (monotonic seconds), belt position (mm)."""


class _Fired(msgspec.Struct, frozen=True, array_like=True):
    shot: Shot
    at_s: float


def ring_bytes(config: LineConfig) -> int:
    """Size of the shared memory."""
    geometry = simulation_config(config).geometry()
    return SLOTS * geometry.width_px * geometry.height_px * 3


def ring(config: LineConfig, memory_fd: int) -> np.ndarray:
    """uint8 (SLOTS, H, W, 3) on the shared memory."""
    geometry = simulation_config(config).geometry()
    memory = mmap.mmap(memory_fd, ring_bytes(config))
    return np.frombuffer(memory, np.uint8).reshape(SLOTS, geometry.height_px, geometry.width_px, 3)


# -- the belt's side -----


def run_belt(config: LineConfig, memory_fd: int, frames: socket.socket, shots: socket.socket) -> dict[str, object]:
    """Runs the belt until the line is gone or SIGTERM comes; returns the truth."""
    cv2.setNumThreads(1)
    slots = ring(config, memory_fd)
    line = SimulatedLine(simulation_config(config), schedule=config.trouble)
    threading.Thread(target=_take_shots, args=(line, shots), daemon=True).start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    published = unread = 0
    frames.setblocking(False)
    while not stop.is_set():
        frame = line.read(0.25)
        if frame is None:
            continue
        slots[published % SLOTS] = frame.image
        try:
            # Frames are numbered when they are published, so a gap is always a frame that the line lost.
            frames.send(_FILLED.pack(published, frame.captured_s, frame.belt_mm))
        except BlockingIOError:
            unread += 1
        except OSError:
            break
        published += 1
    truth = asdict(line.truth())
    return truth | {"published": published, "not_drawn_in_time": line.frames_dropped, "unread": unread}


def _take_shots(line: SimulatedLine, shots: socket.socket) -> None:
    while data := shots.recv(4096):
        fired = msgspec.msgpack.decode(data, type=_Fired)
        line.fire(fired.shot, fired.at_s)
        for sighting in line.sightings(float("inf")):
            shots.send(msgspec.msgpack.encode(sighting))


# -- the line's side -----


class RingCamera:
    """Reads frames from the ring without a copy, like the buffers of a camera driver."""

    def __init__(self, config: LineConfig, memory_fd: int, frames: socket.socket) -> None:
        self._slots = ring(config, memory_fd)
        self._frames = frames
        self.last: tuple[float, float] = (0.0, 0.0)
        """Exposure and belt position of the newest frame."""

    def read(self, timeout_s: float) -> Frame | None:
        """See `FrameSource`."""
        self._frames.settimeout(timeout_s)
        try:
            data = self._frames.recv(_FILLED.size)
        except TimeoutError:
            return None
        if not data:
            raise CameraError("camera.ended", "The belt is gone.", expected="a frame", got="nothing")
        number, captured_s, belt_mm = _FILLED.unpack(data)
        self.last = (captured_s, belt_mm)
        return Frame(self._slots[number % SLOTS], number, captured_s, belt_mm)

    def close(self) -> None:
        """See `FrameSource`."""
        self._frames.close()


class RemoteBelt:
    """Encoder, valves and photo-eyes of the belt. The belt runs at constant speed here."""

    def __init__(self, camera: RingCamera, shots: socket.socket, speed_mm_s: float) -> None:
        self._camera, self._shots, self._speed = camera, shots, speed_mm_s
        self._shots.setblocking(False)
        self._seen: deque[Sighting] = deque(maxlen=4096)

    def position_mm(self, at_s: float) -> float:
        """See `Encoder`."""
        captured_s, belt_mm = self._camera.last
        return belt_mm + (at_s - captured_s) * self._speed

    def speed_mm_s(self) -> float:
        """See `Encoder`."""
        return self._speed

    def fire(self, shot: Shot, at_s: float) -> None:
        """See `Ejector`."""
        self._shots.send(msgspec.msgpack.encode(_Fired(shot, at_s)))

    def sightings(self, _until_s: float) -> list[Sighting]:
        """See `Confirmation`; what the belt answered so far."""
        found = []
        while True:
            try:
                found.append(msgspec.msgpack.decode(self._shots.recv(4096), type=Sighting))
            except (BlockingIOError, msgspec.DecodeError):
                return found


def run_line(config: LineConfig, memory_fd: int, frames: socket.socket, shots: socket.socket, pipe: Pipe) -> int:
    """Runs the agent's own line process with this belt as its hardware."""
    camera = RingCamera(config, memory_fd, frames)
    belt = RemoteBelt(camera, shots, config.belt_mm_s)
    world = LineHardware(camera, belt, belt, None, "a belt in another process", belt)
    line = Line(config, pipe, world)
    signal.signal(signal.SIGTERM, lambda *_: line.stop())
    return line.run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["belt", "line"])
    parser.add_argument("--config", type=Path, required=True)
    for name in ("memory", "frames", "shots", "pipe"):
        parser.add_argument(f"--{name}-fd", type=int, default=-1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    config = msgspec.json.decode(options.config.read_bytes(), type=LineConfig)
    frames, shots = socket.socket(fileno=options.frames_fd), socket.socket(fileno=options.shots_fd)
    if options.side == "line":
        status = run_line(config, options.memory_fd, frames, shots, Pipe(socket.socket(fileno=options.pipe_fd)))
        os._exit(status)
    print(json.dumps(run_belt(config, options.memory_fd, frames, shots)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
