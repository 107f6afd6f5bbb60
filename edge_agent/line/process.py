"""The line process: `python -m edge_agent.line.process --config FILE --pipe-fd N`.

Threads, each owning its state: *camera* reads frames into a mailbox of one (the freshest wins, losses are counted by
frame numbers); the main thread sorts; *ejection* fires; *loader* reads a new bundle and warms it up beside the
current one, then hands it over, and the main thread switches between two frames; *reporter* sends beats and windows
and may be as slow as the supervisor. The path from frame to ejector waits for none of them.

Cyclic garbage collection is off while sorting; the reporter collects once per window, after the heap of the start
was frozen, so a collection looks at little.
"""

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec

from edge_agent.devices.cameras import is_live
from edge_agent.devices.hardware import LineHardware, geometry_of, open_hardware
from edge_agent.health.abstain_budget import AbstainWatch
from edge_agent.health.camera import CameraHealth
from edge_agent.interfaces import Frame, Lane, LineGeometry
from edge_agent.line.core import LineCore
from edge_agent.line.counters import LineCounter
from edge_agent.line.fail_safe import FailSafe
from edge_agent.line.loader import (
    LoadedJudge,
    LoadedShadow,
    Loader,
    fault_of,
    is_due,
    load_judge,
    load_shadow,
    return_memory,
)
from edge_agent.line.shadow import Shadow
from edge_agent.line.thread_tuning import facts, tune_opencv
from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import (
    Beat,
    Faulted,
    FromLine,
    Load,
    LoadFailed,
    LoadShadow,
    ModelFailed,
    Pipe,
    Ready,
    SetLot,
    ShadowChanged,
    ShadowFailed,
    Stop,
    Swapped,
    ToLine,
    Tuned,
    WindowClosed,
)
from edge_agent.simulation.line import SimulatedLine
from edge_agent.vision.judge import Judge
from models.errors import BundleError, CameraError, SortlineError
from models.messages import Fault
from models.recipe import UNSURE
from models.windows import Window

log = logging.getLogger("sortline.line")
_READ_S = 0.25
_REOPEN_S = 1.0
_BLIND_S = 0.05
"""Between two turns of the fail-safe: at 1 m/s half a picture is 200 mm."""
_SUCCESSOR_S = 0.1
"""How often a line without supervisor looks for another one."""
_STUCK = 5
"""Exit status of a line whose camera hangs in its driver."""
_THREAD_DIED = 6
"""Exit status of a line that lost one of its threads."""
_MAX_REPORTS = 256
_SWITCH_S = 0.0005
"""A thread that is due (ejection) waits at most so long for one that computes in Python; the default is 5 ms."""


class Line:
    """One line at work.

    Args:
        config: The line.
        pipe: To the supervisor.
        world: Camera, encoder, ejector; opened from the configuration unless given.
        judge: The configuration's bundle, if it is loaded already.
    """

    def __init__(
        self, config: LineConfig, pipe: Pipe, world: LineHardware | None = None, *, judge: Judge | None = None
    ) -> None:
        self._config, self._pipe = config, pipe
        self._world = world or open_hardware(config)
        self._stop = threading.Event()
        self._reports: queue.Queue[FromLine] = queue.Queue(_MAX_REPORTS)
        self.reports_dropped = 0
        self._mailbox = threading.Condition()
        self._frame: tuple[Frame, int] | None = None
        """The freshest frame, and how many were refused before it."""
        self._ended = False
        self._status = 0
        self._watch = CameraHealth(
            frames_per_s=config.frames_per_s,
            stall_s=config.stall_s,
            slow_share=config.slow_share,
            live=config.camera == "simulated" or is_live(config.camera),
            on_change=self._camera_changed,
        )
        self._refused = self._refused_seen = 0
        """Frames the watch refused, and those the sorting thread knows of: it must not take them for dropped."""
        self._champion = judge
        self._waiting: tuple[LoadedJudge, tuple[str, str]] | None = None
        """The bundle that is ready, and the lot that ran when it became so."""
        self._loader = Loader(config.threads, self._say, lambda: self._champion)
        self._next_lot: deque[tuple[SetLot, float]] = deque(maxlen=1)
        """The lot that shall begin, and when that was said (monotonic)."""
        simulation = self._world.simulation
        self._counter = LineCounter(
            config.lanes,
            lot=config.lot,
            variety=config.variety,
            lifetime_items=config.lifetime_items,
            truth=simulation.truth if simulation else None,
        )
        self._queue = self._world.ejection_queue(config, time.monotonic)
        self._fail_safe = FailSafe(
            config.fail_safe, self._first_geometry(), self._queue, self._counter, self._world.belt, self._acted
        )
        self._core: LineCore | None = None
        self._abstain = AbstainWatch()
        self._abstain_of = ("", "", "")
        self._orphaned_s: float | None = None
        self._owner_s = self._touched_s()

    # -- life -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Sorts until told to stop; returns the exit status.

        5: only a new process can open the camera again; 6: one of its threads died of an error of ours.
        """
        self._tune_opencv()
        sys.setswitchinterval(_SWITCH_S)
        judge = self._champion = self._champion or self._first_judge()
        self._counter.use_shadow(self._first_shadow(judge))
        threads = [
            threading.Thread(target=body, name=name, daemon=True)
            for name, body in (
                ("camera", self._read_camera),
                ("commands", self._take_commands),
                ("loader", lambda: self._loader.run(self._stop)),
                ("reporter", self._report),
            )
        ]
        self._queue.start()
        for thread in threads:
            thread.start()
        self._say(Ready(camera=self._world.description, lanes=self._config.lanes))
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
        return self._status

    def _tune_opencv(self) -> None:
        threads = self._config.opencv_threads or self._config.threads
        if threads:
            cv2.setNumThreads(threads)
        else:
            self._say(Tuned(facts=facts("opencv", tune_opencv())))

    def _first_judge(self) -> Judge | None:
        try:
            return load_judge(self._config, self._loader.threads_for)
        except BundleError as error:
            self._say(LoadFailed(digest=self._config.digest, fault=fault_of(error)))
            return None

    def _first_shadow(self, champion: Judge | None) -> Shadow | None:
        try:
            return load_shadow(self._config, champion)
        except BundleError as error:
            self._say(LoadFailed(digest="", fault=fault_of(error)))
            return None

    def stop(self) -> None:
        """Ends the line within two seconds."""
        self._stop.set()

    def thread_died(self, died: threading.ExceptHookArgs) -> None:
        """A line without one of its threads looks alive and sorts nothing: it ends, and a new one is started."""
        name = died.thread.name if died.thread else "unknown"
        log.critical("thread %s died", name, exc_info=(died.exc_type, died.exc_value, died.exc_traceback))  # type: ignore[arg-type]
        self._status = _THREAD_DIED
        self._stop.set()
        self._end()

    def _say(self, message: FromLine) -> None:
        """Queues a report; never waits. A full queue drops it, and the counter says so."""
        try:
            self._reports.put_nowait(message)
        except queue.Full:
            self.reports_dropped += 1

    # -- sorting (main thread) --------------------------------------------------------------------------------

    def _sort(self, judge: Judge | None) -> None:
        while not self._stop.is_set():
            frame = self._newest_frame()
            if frame is None:
                if self._ended:
                    break
                self._unseen()
                continue
            core = self._core
            if core is None:
                core = self._core = self._make_core(frame)
                if judge is not None:
                    core.use(judge)
            self._switch(core)
            try:
                core.process(frame)
            except CameraError as error:
                self._watch.failed(error, time.monotonic())
            else:
                self._fail_safe.saw(frame.belt_mm)
            self._guard()
        if self._core is not None:
            self._core.flush()

    def _newest_frame(self) -> Frame | None:
        shadow = self._counter.shadow
        if shadow is not None:
            shadow.idle.set()
        with self._mailbox:
            if self._frame is None and not self._ended:
                self._mailbox.wait(_BLIND_S if self._watch.fault else _READ_S)
            newest, self._frame = self._frame, None
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
        """No frame can be judged now; what left the picture meanwhile is."""
        self._guard()
        if self._core is not None:
            self._switch(self._core)
            if self._watch.blind:
                self._core.unseen(self._world.encoder.position_mm(time.monotonic()))

    def _guard(self) -> None:
        now_s = time.monotonic()
        self._fail_safe.step(self._watch.fault, now_s, self._world.encoder.position_mm(now_s))
        if self._core is not None:
            self._fail_safe.instruct(self._core)

    def _acted(self, action: str, fault: str) -> None:
        """The fail-safe began, changed or ended."""
        if action:
            self._say_fault("line.fail_safe", f"{action} because of {fault}.")
        else:
            self._say_fault("line.fail_safe_over", "Everything is judged again.")

    def _first_geometry(self) -> LineGeometry:
        """Before the first frame the width of the picture is not known: as wide as the way to the outlets."""
        config = self._config
        width_px = round(max(config.outlets_mm.values(), default=1000.0) / config.mm_per_px)
        lanes = tuple(Lane(k, k + 1) for k in range(config.lanes))
        return LineGeometry(width_px, config.lanes, config.mm_per_px, lanes, config.outlets_mm)

    def _make_core(self, frame: Frame) -> LineCore:
        geometry = self._fail_safe.geometry = geometry_of(self._config, self._world, frame)
        return LineCore(
            geometry=geometry,
            counter=self._counter,
            queue=self._queue,
            clock=time.monotonic,
            on_model_failure=lambda judge, error: self._say(ModelFailed(digest=judge.digest, fault=fault_of(error))),
            confirmation=self._world.confirmation,
            weights=self._world.weights,
            shadow=self._counter.shadow,
            on_ejector=self._ejector_trouble,
        )

    def _ejector_trouble(self, lane: int, outlet: str, trouble: str) -> None:
        what = {
            "weak": "misses more items than a good valve; check air pressure, nozzle and valve.",
            "slow": "takes effect later than it did; the lead follows, but the valve is wearing.",
            "": "works as it did.",
        }[trouble]
        self._say_fault(f"ejector.{trouble or 'recovered'}", f"Ejector {outlet} of lane {lane} {what}")

    def _switch(self, core: LineCore) -> None:
        """Takes over what is ready: one assignment between two frames, a lot and a bundle at a gap on the belt."""
        if self._next_lot:
            self._begin_lot(core, *self._next_lot[0])
        if self._loader.shadow:
            self._switch_shadow(core, self._loader.shadow.pop())
        if not self._loader.judge or not self._may_switch(core, self._loader.judge[0]):
            return
        started = time.perf_counter()
        loaded = self._loader.judge.pop()
        judge = self._champion = loaded.judge
        window = self._counter.close_window()
        core.use(judge)
        gap_ms = (time.perf_counter() - started) * 1000.0
        if window.items or window.frames:
            self._say(WindowClosed(window=window))
        self._say(Swapped(digest=judge.digest, load_ms=loaded.load_ms, gap_ms=gap_ms))
        log.info("bundle %s judges from now on", judge.digest[:12])
        self._check_shadow(core, judge)

    def _switch_shadow(self, core: LineCore, loaded: LoadedShadow) -> None:
        window = self._counter.close_window()
        if core.shadow is not None:
            core.shadow.retire()
        core.shadow = loaded.shadow
        self._counter.use_shadow(loaded.shadow)
        if window.items or window.frames:
            self._say(WindowClosed(window=window))
        if loaded.shadow is not None:
            loaded.shadow.start()
        digest = loaded.shadow.judge.digest if loaded.shadow else ""
        self._say(ShadowChanged(digest=digest, load_ms=loaded.load_ms))
        if core.judge is not None:
            self._check_shadow(core, core.judge)

    def _check_shadow(self, core: LineCore, champion: Judge) -> None:
        """A challenger that wants other views than a new champion takes is given up."""
        shadow = core.shadow
        if shadow is None:
            return
        try:
            shadow.check(champion)
        except BundleError as error:
            shadow.retire()
            core.shadow = None
            self._counter.use_shadow(None)
            self._say(ShadowFailed(digest=shadow.judge.digest, fault=fault_of(error)))

    def _may_switch(self, core: LineCore, loaded: LoadedJudge) -> bool:
        """At once where there is nothing to keep running; else when what the bundle waits for has come.

        Items in sight keep the bundle that took their first view either way: the gap only spares them two models.
        """
        if self._waiting is None or self._waiting[0] is not loaded:
            self._waiting = (loaded, self._counter.lot_and_variety)
        return core.judge is None or is_due(
            loaded,
            waited_s=time.monotonic() - loaded.since_s,
            line_within_s=self._config.swap_within_s,
            at_gap=core.tracker.open == 0,
            lot_changed=self._counter.lot_and_variety != self._waiting[1],
        )

    def _begin_lot(self, core: LineCore, wish: SetLot, since_s: float) -> None:
        """At a gap; when none comes within `swap_within_s`, between two frames: items in sight then are of the new lot.

        A window never mixes two lots.
        """
        if core.tracker.open and time.monotonic() - since_s <= self._config.swap_within_s:
            return
        wish, _ = self._next_lot.pop()
        if (wish.lot, wish.variety) == self._counter.lot_and_variety:
            return
        window = self._counter.close_window()
        self._counter.begin_lot(wish.lot, wish.variety)
        if window.items or window.frames:
            self._say(WindowClosed(window=window))
        log.info("lot %r of variety %r runs from now on", wish.lot, wish.variety)

    # -- camera thread ----------------------------------------------------------------------------------------

    def _read_camera(self) -> None:
        while not self._stop.is_set():
            try:
                frame = self._world.source.read(_READ_S)
            except CameraError as error:
                if error.code == "camera.ended":
                    self._end()
                    return
                self._watch.failed(error, time.monotonic())
                if error.code == "camera.stuck":
                    self._status = _STUCK
                    self._end()
                    return
                if error.code != "camera.stalled":
                    self._stop.wait(_REOPEN_S)
                continue
            if frame is None:
                self._watch.silent(time.monotonic())
            elif self._watch.take(frame, time.monotonic()):
                with self._mailbox:
                    self._frame = frame, self._refused
                    self._mailbox.notify()
            else:
                self._refused += 1
                self._counter.count("frames_bad")

    def _end(self) -> None:
        with self._mailbox:
            self._ended = True
            self._mailbox.notify()

    def _camera_changed(self, code: str, message: str) -> None:
        """The watch named a fault, or its end."""
        log.warning("%s: %s", code, message)
        if code != "camera.recovered":
            self._counter.camera(code)
        self._say_fault(code, message)

    def _say_fault(self, code: str, message: str) -> None:
        self._say(Faulted(fault=Fault(code=code, message=message[:600], at_ms=time.time_ns() // 1_000_000)))

    # -- commands ---------------------------------------------------------------------------------------------

    def _take_commands(self) -> None:
        while not self._stop.is_set():
            try:
                message = self._pipe.receive(ToLine, 0.5)
            except SortlineError as error:
                log.warning("supervisor is gone: %s", error)
                self._orphaned_s = time.monotonic()
                until_s = self._orphaned_s + self._config.orphan_s
                while time.monotonic() < until_s and self._touched_s() == self._owner_s:
                    if self._stop.wait(_SUCCESSOR_S):
                        break
                self._stop.set()
                return
            match message:
                case Load() | LoadShadow():
                    self._loader.offer(message)
                case SetLot():
                    self._next_lot.append((message, time.monotonic()))
                case Stop():
                    self._stop.set()

    def _touched_s(self) -> float:
        """When a supervisor last began; 0 where that is not known."""
        try:
            return Path(self._config.owner).stat().st_mtime if self._config.owner else 0.0
        except OSError:
            return 0.0

    # -- reporter thread --------------------------------------------------------------------------------------

    def _report(self) -> None:
        next_beat = next_window = time.monotonic()
        next_window += self._config.window_s
        while True:
            last = self._stop.is_set()
            now = time.monotonic()
            if now >= next_window or last:
                next_window = now + self._config.window_s
                window = self._counter.close_window()
                self._say(WindowClosed(window=window))
                self._watch_budget(window)
                gc.collect()
            if now >= next_beat:
                next_beat = now + 1.0
                self._say(self._beat())
            self._drain()
            if last:
                return
            self._stop.wait(0.05)

    def _watch_budget(self, window: Window) -> None:
        """Says when the line abstains more often than its recipe allows, and when it does not any more."""
        core = self._core
        if core is None or core.judge is None:
            return
        of = (window.bundle, window.variety, window.lot)
        if of != self._abstain_of:
            self._abstain_of = of
            self._abstain.forget()
        budget = core.judge.recipe.policy(window.variety, window.lot).budget
        if not self._abstain.update(window.items, window.grades.get(UNSURE, 0), budget):
            return
        seen = f"{self._abstain.share:.1%} of the items are unsure, the budget is {budget:.1%}"
        fault = Fault(code="recipe.within_budget", message=f"The line abstains within its budget again: {seen}.")
        if self._abstain.over:
            fault = Fault(code="recipe.over_budget", message=f"The line abstains too often: {seen}.")
        self._say(Faulted(fault=msgspec.structs.replace(fault, at_ms=time.time_ns() // 1_000_000)))

    def _drain(self) -> None:
        while self._orphaned_s is None:
            try:
                message = self._reports.get_nowait()
            except queue.Empty:
                return
            try:
                self._pipe.send(message)
            except SortlineError as error:
                log.warning("report lost: %s", error)
                self.reports_dropped += 1
                return

    def _beat(self) -> Beat:
        core = self._core
        speed = self._world.encoder.speed_mm_s()
        lot, variety = self._counter.lot_and_variety
        judge = core.judge if core else None
        return Beat(
            digest=judge.digest if judge else "",
            items_on_bundle=core.items_on_bundle if core else 0,
            belt_running=speed > 1.0 and not self._watch.blind,
            camera_fault=self._watch.fault,
            live=self._counter.live(self._config.boot_id, speed, camera_fault=self._watch.fault),
            lot=lot,
            variety=variety,
            terms=judge.recipe.terms_source(variety, lot) if judge else "",
        )


def serve(
    config: LineConfig,
    pipe: Pipe,
    *,
    judge: Judge | None = None,
    drawn: SimulatedLine | None = None,
    environment_exit: Callable[[int], None] = os._exit,
) -> int:
    """Opens the world and sorts until told to stop; the rest of this process's life.

    Args:
        config: The line.
        pipe: To the supervisor.
        judge: The configuration's bundle, if it is loaded already.
        drawn: Its simulated line, if it is drawn already.
        environment_exit: Ends the process.

    Returns:
        The exit status; 3: camera or devices cannot be opened.
    """
    try:
        line = Line(config, pipe, open_hardware(config, drawn=drawn), judge=judge)
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
    """Entry of the process."""
    import argparse  # noqa: PLC0415  only the process needs it

    parser = argparse.ArgumentParser(prog="python -m edge_agent.line.process", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="LineConfig as JSON")
    parser.add_argument("--pipe-fd", type=int, required=True, help="inherited socket to the supervisor")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    config = msgspec.json.decode(arguments.config.read_bytes(), type=LineConfig)
    return serve(config, Pipe(socket.socket(fileno=arguments.pipe_fd)))


if __name__ == "__main__":
    raise SystemExit(main())
