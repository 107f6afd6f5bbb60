"""Measures how many items a second this machine can judge."""

import time
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np

from edge_agent.devices.hardware import LineHardware, geometry_of, open_hardware
from edge_agent.ejection.queue import EjectionQueue
from edge_agent.interfaces import Frame
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import LineCore
from edge_agent.line_config import LineConfig
from edge_agent.vision.judge import Judge
from models.preprocess import make_view
from models.view_spec import PreprocessSpec


def capacity(config: LineConfig, *, bundle: Path | None = None, seconds: float = 1.5) -> dict[str, Any]:
    """Measures the load that one core of this machine can carry.

    Without a bundle the vision part alone is measured (drawing the simulated frames is timed apart).
    """
    cv2.setNumThreads(1)
    world = open_hardware(msgspec.structs.replace(config, camera="simulated", trouble=""), virtual=True)
    frame = _next_frame(world)
    counter = LineCounter(config.lanes)
    queue = EjectionQueue(world.encoder, world.ejector, lead_ms=0.0, clock=lambda: 0.0)
    judge = Judge(bundle) if bundle else None
    core = LineCore(geometry=geometry_of(config, world, frame), counter=counter, queue=queue, clock=lambda: 0.0)
    core.use(judge)
    drawing = working = 0.0
    frames = 0
    while drawing + working < seconds:
        started = time.perf_counter()
        frame = _next_frame(world)
        drawn = time.perf_counter()
        core.process(frame)
        drawing, working = drawing + drawn - started, working + time.perf_counter() - drawn
        frames += 1
    view_ms = _view_ms(frame)
    frame_ms = working / frames * 1000.0 + (0.0 if judge else view_ms * 6.0 * config.items_per_s * config.lanes / 30.0)
    load = (frame_ms + drawing / frames * 1000.0) * config.frames_per_s / 1000.0
    return {
        "frame_ms": round(frame_ms, 3),
        "drawing_ms": round(drawing / frames * 1000.0, 3),
        "cores_per_line": round(load, 3),
        "items_per_s_per_core": round(config.items_per_s * config.lanes / load, 1),
    }


def _next_frame(world: LineHardware) -> Frame:
    while True:
        frame = world.source.read(1.0)
        if frame is not None:
            return frame


def _view_ms(frame: Frame) -> float:
    """Returns the time to cut one view, without the model, milliseconds."""
    height, width = frame.image.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    cv2.circle(mask, (width // 2, height // 4), 60, 255, -1)
    spec = PreprocessSpec()
    started = time.perf_counter()
    for _ in range(20):
        make_view(frame.image, mask, spec)
    return (time.perf_counter() - started) * 1000.0 / 20.0
