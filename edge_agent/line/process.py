"""The line process: `python -m edge_agent.line.process --config FILE --pipe-fd N`.

Each thread owns its state: *camera* reads frames into a mailbox of one (`camera_feed`); the main thread sorts and
switches bundles, challengers and lots between two frames (`switching`); *ejection* fires; *loader* reads a new bundle
and warms it up beside the current one; *commands* reads what the supervisor sends; *reporter* sends beats and windows
(`reporting`) and may be as slow as the supervisor. The path from frame to ejector waits for none of them.

Cyclic garbage collection is off while the line sorts; the reporter collects once per window. The heap of the start is
frozen before, so a collection looks at little.
"""

import gc
import hashlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import cv2
import msgspec

from edge_agent.devices.cameras import is_live
from edge_agent.devices.hardware import LineHardware, geometry_of, open_hardware
from edge_agent.health.camera import CameraHealth
from edge_agent.health.camera_sensor import CameraChange, CameraSensor
from edge_agent.health.evidence import condition_of, evidence_picture
from edge_agent.interfaces import Frame, Lane, LineGeometry
from edge_agent.line.camera_feed import CameraFeed
from edge_agent.line.counters import LineCounter
from edge_agent.line.fail_safe import ACTIONS, FailSafe
from edge_agent.line.loader import fault_of, load_judge, load_shadow, return_memory
from edge_agent.line.reporting import Outbox, Reporter
from edge_agent.line.shadow import Shadow
from edge_agent.line.sorting import LineCore
from edge_agent.line.standby import parse_command_line, watch_quietly
from edge_agent.line.switching import Switching
from edge_agent.line.thread_tuning import facts, tune_opencv
from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import (
    Faulted,
    Load,
    LoadFailed,
    LoadShadow,
    ModelFailed,
    Pictured,
    Pipe,
    Ready,
    SetLot,
    Stop,
    ToLine,
    Tuned,
)
from edge_agent.simulation.line import SimulatedLine
from edge_agent.vision.judge import Judge
from models.errors import BundleError, CameraError, SortlineError
from models.messages import Evidence, wall_ms

log = logging.getLogger("sortline.line")
_FRAME_S: Final = 0.25
"""Longest wait of the sorting thread for a frame."""
_BLIND_S: Final = 0.05
"""The same while the camera is at fault, which is the pace of the fail-safe: at 1 m/s half a picture is 200 mm."""
_SUCCESSOR_S: Final = 0.1
"""How often a line without supervisor looks for another one."""
_STUCK: Final = 5
"""Exit status of a line whose camera hangs in its driver."""
_THREAD_DIED: Final = 6
"""Exit status of a line that lost one of its threads."""
_EDGE_OF_LANE: Final = 0.15
"""Share of a lane's width: an item of which less is in the picture may not be found."""
_SWITCH_S: Final = 0.0005
"""Longest time a thread that is due (ejection) waits for one that computes in Python; Python's default is 5 ms."""


class Line:
    """One line at work.

    Args:
        config: The line.
        pipe: Connection to the supervisor.
        world: Camera, encoder and ejector; opened from the configuration unless given.
        judge: The configuration's bundle, if it is loaded already.
    """

    def __init__(
        self, config: LineConfig, pipe: Pipe, world: LineHardware | None = None, *, judge: Judge | None = None
    ) -> None:
        self._config, self._pipe = config, pipe
        self._world = world or open_hardware(config)
        self._stop = threading.Event()
        self._thread_died = False
        self._outbox = Outbox(pipe)
        self._live = config.camera == "simulated" or is_live(config.camera)
        self._health = CameraHealth(
            frames_per_s=config.frames_per_s,
            stall_s=config.stall_s,
            slow_share=config.slow_share,
            live=self._live,
            on_change=self._camera_changed,
        )
        simulation = self._world.simulation
        self._counter = LineCounter(
            config.lanes,
            lot=config.lot,
            variety=config.variety,
            lifetime_items=config.lifetime_items,
            truth=simulation.truth if simulation else None,
        )
        self._camera = CameraFeed(
            self._world.source,
            self._health,
            self._counter,
            self._stop,
            frames_bad=lambda: self._world.frames_bad,
        )
        self._refused_seen = 0
        """Refused frames that the core has been given."""
        self.switching = Switching(
            self._counter,
            self._outbox.say,
            swap_within_s=config.swap_within_s,
            threads=config.threads,
            champion=judge,
            outlets=config.outlets,
        )
        self._queue = self._world.ejection_queue(config, time.monotonic)
        self._fail_safe = FailSafe(
            config.fail_safe,
            self._first_geometry(),
            self._queue,
            self._counter,
            self._world.belt,
            self._acted,
            requested=ACTIONS.get(config.safe_state),
        )
        self._core: LineCore | None = None
        self._sensor: CameraSensor | None = None
        """Watches a live camera by its own picture, from the first frame on."""
        self._reporter = Reporter(
            self._outbox,
            self._counter,
            self._health,
            self._world.encoder,
            lambda: self._core,
            window_s=config.window_s,
            boot_id=config.boot_id,
        )
        self._owner_s = self._touched_s()

    # -- life -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Sorts until the line is stopped or its camera ends.

        Returns:
            The exit status: 0; 5: only a new process can open the camera again; 6: a thread died of a defect of this
            program.
        """
        self._tune_opencv()
        sys.setswitchinterval(_SWITCH_S)
        judge = self.switching.champion = self.switching.champion or self._first_judge()
        self._counter.use_shadow(self._first_shadow(judge))
        threads = [
            threading.Thread(target=body, name=name, daemon=True)
            for name, body in (
                ("camera", self._camera.run),
                ("commands", self._take_commands),
                ("loader", lambda: self.switching.loader.run(self._stop)),
                ("reporter", lambda: self._reporter.run(self._stop)),
            )
        ]
        self._queue.start()
        for thread in threads:
            thread.start()
        self._outbox.say(Ready(camera=self._world.description, lanes=self._config.lanes))
        gc.collect()
        gc.freeze()
        gc.disable()
        return_memory()
        try:
            self._sort(judge)
        finally:
            self._stop.set()
            self._queue.stop()
            self._world.close()
            threads[-1].join(1.5)
            self._pipe.close()
        if self._thread_died:
            return _THREAD_DIED
        return _STUCK if self._camera.stuck else 0

    def _tune_opencv(self) -> None:
        threads = self._config.opencv_threads or self._config.threads
        if threads:
            cv2.setNumThreads(threads)
        else:
            self._outbox.say(Tuned(facts=facts("opencv", tune_opencv())))

    def _first_judge(self) -> Judge | None:
        try:
            return load_judge(self._config, self.switching.loader.threads_for)
        except BundleError as error:
            self._outbox.say(LoadFailed(digest=self._config.digest, fault=fault_of(error)))
            return None

    def _first_shadow(self, champion: Judge | None) -> Shadow | None:
        try:
            return load_shadow(self._config, champion)
        except BundleError as error:
            self._outbox.say(LoadFailed(digest="", fault=fault_of(error)))
            return None

    def stop(self) -> None:
        """Ends the line within two seconds."""
        self._stop.set()

    def thread_died(self, died: threading.ExceptHookArgs) -> None:
        """Ends the line: without one of its threads it would look alive and sort nothing. A new one is started."""
        name = died.thread.name if died.thread else "unknown"
        log.critical("thread %s died", name, exc_info=(died.exc_type, died.exc_value, died.exc_traceback))  # type: ignore[arg-type]
        self._thread_died = True
        self._stop.set()
        self._camera.end()

    # -- sorting (main thread) --------------------------------------------------------------------------------

    def _sort(self, judge: Judge | None) -> None:
        while not self._stop.is_set():
            if self._world.heartbeat is not None:
                self._world.heartbeat.turned()
            frame = self._newest_frame()
            if frame is None:
                if self._camera.ended:
                    break
                self._unseen()
                continue
            core = self._core
            try:
                if core is None:
                    core = self._core = self._make_core(frame)
                    if judge is not None:
                        core.use(judge)
                self.switching.apply(core)
                core.process(frame)
            except CameraError as error:
                self._health.failed(error, time.monotonic())
            else:
                self._fail_safe.saw(frame.belt_mm)
                if self._sensor is not None:
                    self._sensor.offer(frame, core.boxes)
            self._guard()
        if self._core is not None:
            self._core.flush()

    def _newest_frame(self) -> Frame | None:
        shadow = self._counter.shadow
        if shadow is not None:
            shadow.idle.set()
        newest = self._camera.take(_BLIND_S if self._health.fault else _FRAME_S)
        if shadow is not None:
            shadow.idle.clear()
        if newest is None:
            return None
        frame, refused = newest
        if self._core is not None:
            self._core.refused(refused - self._refused_seen)
        self._refused_seen = refused
        return frame

    def _unseen(self) -> None:
        """Finishes the items that leave the picture while no frame can be judged."""
        self._guard()
        if self._core is not None:
            self.switching.apply(self._core)
            if self._health.blind:
                self._core.unseen(self._world.encoder.position_mm(time.monotonic()))

    def _guard(self) -> None:
        now_s = time.monotonic()
        self._fail_safe.step(self._health.fault, now_s, self._world.encoder.position_mm(now_s))
        if self._core is not None:
            self._fail_safe.instruct(self._core)

    def _acted(self, action: str, fault: str) -> None:
        """Reports that the fail-safe began, changed or ended."""
        if action:
            self._outbox.say_fault("line.fail_safe", f"{action} because of {fault}.")
        else:
            self._outbox.say_fault("line.fail_safe_over", "Everything is judged again.")

    def _first_geometry(self) -> LineGeometry:
        """Returns a geometry for the fail-safe before the first frame: as wide as the way to the farthest outlet."""
        config = self._config
        width_px = round(max(config.outlets_mm.values(), default=1000.0) / config.mm_per_px)
        lanes = tuple(Lane(k, k + 1) for k in range(config.lanes))
        return LineGeometry(width_px, config.lanes, config.mm_per_px, lanes, config.outlets_mm)

    def _make_core(self, frame: Frame) -> LineCore:
        geometry = self._fail_safe.geometry = geometry_of(self._config, self._world, frame)
        if self._live:
            self._watch_camera(geometry)
        return LineCore(
            geometry=geometry,
            counter=self._counter,
            queue=self._queue,
            clock=time.monotonic,
            on_model_failure=lambda judge, error: self._outbox.say(
                ModelFailed(digest=judge.digest, fault=fault_of(error))
            ),
            confirmation=self._world.confirmation,
            weights=self._world.weights,
            shadow=self._counter.shadow,
            on_ejector=self._ejector_trouble,
        )

    def _watch_camera(self, geometry: LineGeometry) -> None:
        """Starts the thread that watches the camera by its own picture."""
        self._sensor = self._counter.camera_sensor = CameraSensor(
            geometry.mm_per_px,
            key=camera_key(self._config, geometry),
            edge_px=round(_EDGE_OF_LANE * min(lane.bottom_px - lane.top_px for lane in geometry.lanes)),
            path=Path(self._config.camera_levels) if self._config.camera_levels else None,
            repeated=lambda: self._health.repeated,
            on_change=self._optics_changed,
        )
        body = self._sensor.run
        threading.Thread(target=lambda: watch_quietly(body, self._stop), name="camera-sensor", daemon=True).start()

    def _optics_changed(self, change: CameraChange) -> None:
        """Reports a quantity of the camera that left its learnt band, with a picture, or that it is back."""
        code, message = condition_of(change)
        self._outbox.say_fault(code, message, subject=change.quantity)
        jpeg = evidence_picture(change) if change.outside else b""
        if jpeg:
            evidence = Evidence(at_ms=wall_ms(), code=code, quantity=change.quantity, jpeg=jpeg)
            self._outbox.say(Pictured(evidence=evidence))

    def _ejector_trouble(self, lane: int, outlet: str, trouble: str) -> None:
        what = {
            "weak": "misses more items than a good valve; check air pressure, nozzle and valve.",
            "slow": "takes effect later than it did; the lead follows, but the valve is wearing.",
            "": "works as it did.",
        }[trouble]
        code = f"ejector.{trouble or 'recovered'}"
        self._outbox.say_fault(code, f"Ejector {outlet} of lane {lane} {what}", subject=f"{outlet} {lane}")

    def _camera_changed(self, code: str, message: str) -> None:
        """Counts and reports a fault of the camera, or its end."""
        log.warning("%s: %s", code, message)
        if code != "camera.recovered":
            self._counter.camera(code)
        self._outbox.say_fault(code, message)

    # -- commands ---------------------------------------------------------------------------------------------

    def _take_commands(self) -> None:
        while not self._stop.is_set():
            try:
                message = self._pipe.receive(ToLine, 0.5)
            except SortlineError as error:
                log.warning("supervisor is gone: %s", error)
                self._outlive_supervisor()
                self._stop.set()
                return
            match message:
                case Load() | LoadShadow():
                    self.switching.loader.offer(message)
                case SetLot():
                    self.switching.request_lot(message, time.monotonic())
                case Stop():
                    self._stop.set()

    def _outlive_supervisor(self) -> None:
        """Sorts on until another supervisor begins or `orphan_s` is over."""
        self._outbox.orphaned = True
        until_s = time.monotonic() + self._config.orphan_s
        while time.monotonic() < until_s and self._touched_s() == self._owner_s:
            if self._stop.wait(_SUCCESSOR_S):
                break

    def _touched_s(self) -> float:
        """Returns when a supervisor last began (seconds since 1970); 0 where that is not known."""
        try:
            return Path(self._config.owner).stat().st_mtime if self._config.owner else 0.0
        except OSError:
            return 0.0


def camera_key(config: LineConfig, geometry: LineGeometry) -> str:
    """Names camera and geometry, to which learnt levels belong; hashed, because an address may hold a password."""
    facts = (
        *(config.camera, config.orientation, config.seed, config.photos),
        *(geometry.width_px, geometry.height_px, round(geometry.mm_per_px, 6)),
        *((lane.top_px, lane.bottom_px) for lane in geometry.lanes),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def serve(
    config: LineConfig,
    pipe: Pipe,
    *,
    judge: Judge | None = None,
    drawn: SimulatedLine | None = None,
    environment_exit: Callable[[int], None] = os._exit,
) -> int:
    """Opens the hardware and sorts until the line is stopped; the rest of this process's life.

    Args:
        config: The line.
        pipe: Connection to the supervisor.
        judge: The configuration's bundle, if it is loaded already.
        drawn: The simulated line, if it is drawn already.
        environment_exit: Ends the process.

    Returns:
        The exit status as in `Line.run`; 3: camera or devices cannot be opened.
    """
    try:
        hardware = open_hardware(config, drawn=drawn)
        if config.heartbeat:
            hardware.show_heartbeat(config.heartbeat)
        line = Line(config, pipe, hardware, judge=judge)
    except SortlineError as error:
        pipe.send(Faulted(fault=fault_of(error)))
        log.warning("%s", error)
        return 3
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: line.stop())
    threading.excepthook = line.thread_died
    status = line.run()
    # A driver thread may hang in C code for ever; everything that matters is already written.
    logging.shutdown()
    environment_exit(status)
    return status


def main(argv: list[str] | None = None) -> int:
    """Runs the process."""
    arguments = parse_command_line("process", __doc__ or "", argv)
    config = msgspec.json.decode(arguments.config.read_bytes(), type=LineConfig)
    return serve(config, Pipe(socket.socket(fileno=arguments.pipe_fd)))


if __name__ == "__main__":
    raise SystemExit(main())
