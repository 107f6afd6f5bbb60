"""Runs the line without a supervisor: a recording, a camera or the simulation through one bundle, in one thread.

Unpaced, every frame is judged, and the same recording with the same bundle gives the same verdicts.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import cv2
import msgspec

from edge_agent.devices.frames import frames
from edge_agent.devices.hardware import LineHardware, geometry_of, open_hardware
from edge_agent.ejection.queue import EjectionQueue
from edge_agent.line.counters import LineCounter
from edge_agent.line.loader import load_shadow
from edge_agent.line.shadow import Shadow
from edge_agent.line.sorting import LineCore
from edge_agent.line_config import LineConfig
from edge_agent.recording.recorder import Recorder
from edge_agent.vision.judge import Judge, Judged
from models.errors import SortlineError
from models.messages import Live


def run_standalone(
    config: LineConfig,
    *,
    bundle: Path | None,
    seconds: float = 0.0,
    on_live: Callable[[Live], None] = lambda _live: None,
    verdicts: TextIO | None = None,
    recorder: Recorder | None = None,
) -> dict[str, Any]:
    """Sorts until the camera ends or `seconds` of its time are over.

    Args:
        config: Configuration of the line; `paced=False` runs recordings and the simulation as fast as they can.
        bundle: Directory of the bundle that judges; None = items pass unjudged.
        seconds: Duration in the camera's time; 0 = until the camera ends.
        on_live: Called about once a second of the line's time.
        verdicts: Stream that takes one JSON line per item.
        recorder: Takes every frame and decision, and is closed at the end; an error marks its segment. The caller
            closes it when this raises.

    Returns:
        Totals: frames, items, classes, outlets, latency quantiles, truth where it is known, the recording's counters.

    Raises:
        BundleError: The bundle is not usable.
        CameraError: The camera is not there or fails.
    """
    cv2.setNumThreads(1)
    judge = Judge(bundle, threads=config.threads or 1) if bundle else None
    world = open_hardware(config, virtual=not config.paced)
    now_s = [0.0]
    clock = time.monotonic if config.paced else (lambda: now_s[0])
    simulation = world.simulation
    counter = LineCounter(
        config.lanes,
        lot=config.lot,
        variety=config.variety,
        truth=simulation.truth if simulation else None,
        clock=clock,
    )
    queue = world.ejection_queue(config, clock)
    shadow = counter.shadow = load_shadow(config, judge)
    if config.paced:
        queue.start()
    started = time.perf_counter()
    core: LineCore | None = None
    next_live_s, bad = 0.0, 0
    try:
        for frame in frames(world.source, seconds=seconds, patience_s=world.patience_s):
            before_s, now_s[0] = now_s[0], frame.captured_s
            if core is None:
                core = LineCore(
                    geometry=geometry_of(config, world, frame),
                    counter=counter,
                    queue=queue,
                    clock=clock,
                    confirmation=world.confirmation,
                    weights=world.weights,
                    shadow=shadow,
                    on_verdict=_verdict_takers(verdicts, recorder),
                )
                core.use(judge)
            bad = _count_bad(world, counter, bad, core)
            if not config.paced:
                queue.run_to(before_s, now_s[0])
            if recorder is not None:
                recorder.offer(core, frame)
            core.process(frame)
            if recorder is not None:
                recorder.processed()
            if frame.captured_s >= next_live_s:
                next_live_s = frame.captured_s + 1.0
                on_live(counter.live("0" * 16, world.encoder.speed_mm_s()))
        _count_bad(world, counter, bad, core)
        if core is not None:
            core.flush()
    except SortlineError as error:
        if recorder is not None:
            recorder.keep(error.code)
        raise
    finally:
        _close(queue, world, shadow)
    facts = _summary(counter, world, time.perf_counter() - started)
    if recorder is not None:
        recorder.ended()
        recorder.close()
        facts["recording"] = recorder.facts()
    return facts


def _close(queue: EjectionQueue, world: LineHardware, shadow: Shadow | None) -> None:
    queue.stop()
    world.close()
    if shadow is not None:
        shadow.stop()


def _count_bad(world: LineHardware, counter: LineCounter, known: int, core: LineCore | None) -> int:
    """Counts the frames the camera could not use since the last call, and returns their number so far."""
    bad = world.frames_bad
    counter.count("frames_bad", bad - known)
    if core is not None:
        core.refused(bad - known)
    return bad


def _verdict_takers(stream: TextIO | None, recorder: Recorder | None) -> Callable[[Judged, str], None] | None:
    takers = ([_verdict_writer(stream)] if stream else []) + ([recorder.decided] if recorder else [])

    def give(judged: Judged, outlet: str) -> None:
        for take in takers:
            take(judged, outlet)

    return give if takers else None


def _verdict_writer(stream: TextIO) -> Callable[[Judged, str], None]:
    def write(judged: Judged, outlet: str) -> None:
        facts = {"item": judged.track.item_id, "lane": judged.track.lane, "item_mm": round(judged.track.item_mm, 1)}
        row = facts | msgspec.to_builtins(judged.verdict) | {"outlet": outlet}
        stream.write(msgspec.json.encode(row).decode() + "\n")

    return write


def _summary(counter: LineCounter, world: LineHardware, elapsed_s: float) -> dict[str, Any]:
    window = counter.close_window()
    facts: dict[str, Any] = {
        "bundle": window.bundle,
        "seconds": round(elapsed_s, 2),
        "frames": window.frames,
        "frames_dropped": window.frames_dropped,
        "frames_bad": window.frames_bad,
        "items": window.items,
        "items_unjudged": window.items_unjudged,
        "verdicts_late": window.verdicts_late,
        "views": window.views,
        "classes": window.classes,
        "outlets": window.outlets,
        "shadow": window.shadow,
        "latency_p50_ms": round(window.latency_ms.quantile(0.5), 2) if window.items else None,
        "latency_p99_ms": round(window.latency_ms.quantile(0.99), 2) if window.items else None,
        "inference_p50_ms": round(window.inference_ms.quantile(0.5), 2) if window.views else None,
    }
    if world.camera is not None:
        facts["camera"] = {name: count for name, count in asdict(world.camera.counters).items() if count}
    if world.simulation is not None:
        facts["truth"] = asdict(world.simulation.truth())
    return facts
