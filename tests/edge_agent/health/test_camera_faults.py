"""A camera at fault is named within two seconds, its frames are refused, the fail-safe is done, and it comes back."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.devices.cameras import ConstantSpeedEncoder
from edge_agent.devices.drivers.belt import BeltMessage, RepeatedRequest
from edge_agent.devices.hardware import open_hardware
from edge_agent.devices.live_camera import READER, Backlog, LiveCamera
from edge_agent.ejection.confirmation import ConfirmationLedger
from edge_agent.ejection.queue import EjectionQueue, EjectionRules
from edge_agent.health.camera import CameraHealth
from edge_agent.interfaces import Frame
from edge_agent.line.counters import LineCounter
from edge_agent.line.fail_safe import FailSafe
from edge_agent.line.sorting import LineCore
from edge_agent.line_config import FailSafeConfig, LineConfig
from edge_agent.simulation.faults import Faults
from edge_agent.simulation.line import SimulatedItem, SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge, Judged
from models.errors import CameraError, ConfigError, UnavailableError
from tests.simulators.tiny_bundle import tiny_bundle

FAULTS = {
    "absent": Faults(absent=True),
    "frozen": Faults(freeze=True),
    "corrupt": Faults(corrupt_share=0.6),
    "black": Faults(brightness=0.0),
    "overexposed": Faults(brightness=9.0),
    "wrong_size": Faults(wrong_size=True),
    "stalled": Faults(drop_share=1.0),
    "slow": Faults(drop_share=0.55),
}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return Judge(directory)


class Bench:
    """The line process's loop over a simulated line whose clock the frames move."""

    def __init__(self, judge: Judge | None = None, *, seed: int = 1, ledger: bool = False, **fail_safe: object) -> None:
        config = SimulationConfig(apples=8, varieties=("golden",), seed=seed, defect_share=0.5, lanes=1)
        self.line = SimulatedLine(config, virtual=True)
        self.counter = LineCounter(1, truth=self.line.truth, clock=self.line.now)
        self.queue = EjectionQueue(
            self.line,
            self.line,
            clock=self.line.now,
            rules=EjectionRules(),
            ledger=ConfirmationLedger() if ledger else None,
        )
        self.judged: list[tuple[Judged, str]] = []
        self.core = LineCore(
            geometry=self.line.geometry,
            counter=self.counter,
            queue=self.queue,
            clock=self.line.now,
            on_verdict=lambda judged, outlet: self.judged.append((judged, outlet)),
            confirmation=self.line if ledger else None,
        )
        self.core.use(judge)
        self.events: list[tuple[float, str]] = []
        self.watch = CameraHealth(frames_per_s=30.0, on_change=lambda code, _: self.events.append((self.now, code)))
        self.actions: list[str] = []
        self.safe = FailSafe(
            FailSafeConfig(**fail_safe),  # type: ignore[arg-type]
            self.line.geometry,
            self.queue,
            self.counter,
            self.line,
            lambda action, _: self.actions.append(action),
        )

    @property
    def now(self) -> float:
        return self.line.now()

    def run(self, seconds: float) -> None:
        until_s = self.now + seconds
        while self.now < until_s - 1e-6:
            self._turn()

    def _turn(self) -> None:
        before_s, frame = self.now, None
        try:
            frame = self.line.read(1.0)
        except CameraError as error:
            self.watch.failed(error, self.now)
        else:
            if frame is None:
                self.watch.silent(self.now)
        self.queue.run_to(before_s, self.now)
        if frame is not None and self.watch.take(frame, self.now):
            if self.core.judge is not None:
                self.core.process(frame)
            self.safe.saw(frame.belt_mm)
        elif frame is not None:
            self.counter.count("frames_bad")
            self.core.refused(1)
        self.safe.step(self.watch.fault, self.now, self.line.position_mm(self.now))
        self.safe.instruct(self.core)
        if frame is None or self.watch.blind:
            self.core.unseen(self.line.position_mm(self.now))

    def trouble(self, trouble: Faults, seconds: float) -> float:
        began_s = self.now
        self.line.set_trouble(trouble)
        self.run(seconds)
        self.line.set_trouble(Faults())
        return began_s

    @property
    def escaped(self) -> int:
        """Items that passed the outlet on the belt."""
        return sum(count for what, count in self.line.truth().outcomes.items() if what.endswith(">pass"))


# -- naming ---------------------------------------------------------------------------------------------------


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
def test_what_a_line_lives_with_is_no_fault(trouble: Faults) -> None:
    bench = Bench()
    bench.run(2.0)
    bench.trouble(trouble, 4.0)
    bench.run(2.0)
    assert bench.events == []


def test_a_repeated_picture_that_was_compressed_anew_is_frozen_only_while_the_belt_moves() -> None:
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


# -- fail-safes -----------------------------------------------------------------------------------------------


def blind_line(judge: Judge, fault: str, seconds: float = 4.0, **fail_safe: object) -> Bench:
    bench = Bench(judge, **fail_safe)
    bench.run(3.0)
    bench.trouble(FAULTS[fault], seconds)
    bench.run(3.0)
    return bench


def test_pass_fires_nothing_and_counts_the_belt_nobody_saw(judge: Judge) -> None:
    bench = blind_line(judge, "absent", default="pass")
    window = bench.counter.close_window()
    assert window.camera["blind_mm"] == pytest.approx(4500, abs=100)
    assert window.camera["blind_ms"] == pytest.approx(4500, abs=100)
    assert "blind_shots" not in window.camera
    assert bench.escaped > 30


@pytest.mark.parametrize(("fault", "named_after_s"), [("frozen", 0.8), ("stalled", 1.1)])
def test_eject_all_lets_no_item_through_once_the_fault_is_named(judge: Judge, fault: str, named_after_s: float) -> None:
    bench = Bench(judge, default="eject-all")
    bench.run(4.0)
    before = bench.escaped
    bench.trouble(FAULTS[fault], 5.0)
    # 9 items/s at 1 m/s. Between the camera and the outlet lie 700 mm of items that were judged (most as sound), and
    # what passed the outlet before the fault was named is gone.
    assert bench.escaped - before <= 9 * (0.8 + max(named_after_s - 0.7, 0.0)) + 2
    bench.run(2.0)
    assert bench.counter.close_window().camera["blind_shots"] > 100


def test_eject_all_hits_every_item_of_the_unseen_stretch(judge: Judge) -> None:
    bench = Bench(judge, default="eject-all")
    bench.run(3.0)
    from_mm = bench.line.position_mm(bench.now)
    bench.line.set_trouble(FAULTS["absent"])
    items: dict[int, SimulatedItem] = {}
    for step in range(60):
        if step == 40:
            bench.line.set_trouble(Faults())
            to_mm = bench.line.position_mm(bench.now) - 200.0  # from here on the camera sees at least half of it
        bench.run(0.1)
        items |= {item.item_id: item for item in bench.line._lanes[0].items}
    unseen = [item for item in items.values() if from_mm < item.item_mm < to_mm]
    assert len(unseen) > 25
    assert [item for item in unseen if not item.ejected_to] == []


def test_eject_all_on_a_standing_belt_fires_nothing(judge: Judge) -> None:
    bench = Bench(judge, default="eject-all")
    bench.run(3.0)
    bench.trouble(Faults(stopped=True), 1.0)
    bench.line.set_trouble(Faults(stopped=True, absent=True))
    bench.run(0.5)
    fired = bench.queue.fired
    bench.run(5.0)
    assert bench.queue.fired == fired


def test_eject_all_blames_no_valve(judge: Judge) -> None:
    bench = Bench(judge, ledger=True, default="eject-all")
    bench.run(3.0)
    bench.trouble(FAULTS["absent"], 3.0)
    bench.run(2.0)
    counts = bench.queue.ledger.counts()
    assert counts["0/reject/fired"] < bench.queue.fired
    assert counts.get("0/reject/missed", 0) == 0


def test_stop_line_stops_the_belt_and_starts_it_again(judge: Judge) -> None:
    bench = Bench(judge, default="stop-line")
    bench.run(3.0)
    bench.trouble(FAULTS["black"], 3.0)
    assert bench.line.speed_mm_s() == 0.0
    bench.run(2.0)
    assert bench.line.speed_mm_s() == pytest.approx(1000.0)
    assert bench.actions == ["stop-line", ""]
    assert bench.counter.close_window().camera["blind_mm"] < 300


def test_each_fault_has_its_own_action(judge: Judge) -> None:
    bench = Bench(judge, default="stop-line", frozen="eject-all", absent="pass")
    bench.run(2.0)
    for fault in ("frozen", "absent", "black"):
        bench.trouble(FAULTS[fault], 2.0)
        bench.run(1.5)
    assert bench.actions == ["eject-all", "", "pass", "", "stop-line", ""]


def test_a_slow_camera_is_judged_and_not_blind(judge: Judge) -> None:
    bench = blind_line(judge, "slow", default="eject-all")
    window = bench.counter.close_window()
    assert [code for _, code in bench.events] == ["camera.slow", "camera.recovered"]
    assert bench.actions == ["pass", ""]
    assert "blind_ms" not in window.camera


@pytest.mark.parametrize(
    ("fault", "action"),
    [
        ("absent", "pass"),
        ("frozen", "stop-line"),
        ("corrupt", "eject-all"),
        *(
            pytest.param(fault, action, marks=pytest.mark.slow)
            for fault in ("absent", "frozen", "corrupt", "black", "stalled")
            for action in ("pass", "eject-all", "stop-line")
        ),
    ],
)
def test_no_item_is_judged_twice_across_a_fault(judge: Judge, fault: str, action: str) -> None:
    bench = Bench(judge, seed=4, default=action)
    bench.run(2.0)
    for seconds in (0.2, 1.5):
        bench.trouble(FAULTS[fault], seconds)
        bench.run(2.0)
    places = sorted(judged.track.item_mm for judged, _ in bench.judged)
    assert len(places) > 25
    assert min(np.diff(places)) > 40.0  # the smallest apple is 45 mm long


# -- live cameras ---------------------------------------------------------------------------------------------


class Hanging:
    """A capture that gives some frames, then blocks until it is let go."""

    def __init__(self, frames: int) -> None:
        self.left, self.free = frames, threading.Event()

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def get(self, _what: int) -> float:
        return 0.0

    def release(self) -> None:
        self.free.set()

    def read(self) -> tuple[bool, np.ndarray | None]:
        if self.left == 0:
            self.free.wait(30.0)
            return False, None
        self.left -= 1
        return True, np.full((40, 60, 3), self.left, np.uint8)


@pytest.fixture
def opened() -> Iterator[list[Hanging]]:
    captures: list[Hanging] = []
    yield captures
    for capture in captures:
        capture.free.set()


def first_error(camera: LiveCamera, now: list[float]) -> str:
    for _ in range(1000):
        now[0] += 0.25
        try:
            camera.read(0.0)
        except CameraError as error:
            return error.code
    return ""


def test_readers_that_hang_are_never_more_than_the_limit(opened: list[Hanging]) -> None:
    now = [0.0]

    def opener(_source: str) -> Hanging:
        opened.append(Hanging(0))
        return opened[-1]

    camera = LiveCamera("7", encoder=ConstantSpeedEncoder(1000.0), max_readers=3, clock=lambda: now[0], opener=opener)
    codes, waits = [], []
    while "camera.stuck" not in codes:
        before_s = now[0]
        codes.append(first_error(camera, now))
        waits.append(now[0] - before_s)
    assert codes == ["camera.stalled", "camera.stalled", "camera.stuck"]
    assert sum(thread.name.startswith(READER) for thread in threading.enumerate()) <= 3
    assert waits == [1.25, 2.25, 4.25]  # the patience doubles, so that a driver gets time to come back
    camera.close()


def test_old_frames_of_a_buffer_are_told_from_fresh_ones() -> None:
    period_s = 1.0 / 30.0
    backlog, now_s = Backlog(period_s, 0.0), 0.0
    found = []
    for took_s in (0.001, 0.002, 0.001, 0.030, 0.033, 0.004, 0.033, 1.0, 0.001, 0.001, 0.033, 0.033):
        found.append(backlog.holds(now_s, now_s + took_s))
        now_s += took_s
    # Opened: three old ones. A short wait in between is jitter. After a gap of a second: the two behind it are old.
    assert found == [True, True, True, False, False, False, False, False, True, True, False, False]


def test_a_source_without_a_pace_is_not_thrown_away_for_ever() -> None:
    backlog = Backlog(1.0 / 30.0, 0.0)
    found = [backlog.holds(n * 0.001, (n + 1) * 0.001) for n in range(2000)]
    assert found.count(True) == pytest.approx(1000, abs=2)
    assert not any(found[1100:])


# -- the belt -------------------------------------------------------------------------------------------------


def test_a_wish_is_repeated_until_it_is_heard_and_the_last_one_counts() -> None:
    told: list[BeltMessage] = []
    deaf = [3]
    heard = threading.Event()

    def tell(message: BeltMessage) -> None:
        if deaf[0]:
            deaf[0] -= 1
            raise UnavailableError("driver.no_answer", "Deaf.")
        told.append(message)
        heard.set()

    wish = RepeatedRequest(tell, every_s=0.01)
    wish.start()
    assert not heard.wait(0.05)  # nothing is told before somebody wishes
    wish.stop("camera.frozen")
    assert heard.wait(300.0)
    assert told[0] == BeltMessage(stop=True, reason="camera.frozen", sequence=1)
    wish.run()
    while not any(message.sequence == 2 for message in tuple(told)):
        heard.clear()
        assert heard.wait(300.0)
    wish.close()
    assert told[-1] == BeltMessage(stop=False, reason="", sequence=2)
    assert wish.counters["no_answer"] == 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"fail_safe": FailSafeConfig(black="stop-line")}, "line.no_belt_control"),
        ({"fail_safe": FailSafeConfig(default="eject-all", outlet="bin")}, "line.no_fail_safe_outlet"),
        ({"belt": "modbus://plc/holding/3"}, "line.no_encoder"),
    ],
)
def test_a_fail_safe_that_cannot_be_done_is_refused_at_the_start(
    tmp_path: Path, changes: dict[str, object], code: str
) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((40, 60, 3), np.uint8))
    with pytest.raises(ConfigError) as caught:
        open_hardware(LineConfig(camera=str(tmp_path), **changes))  # type: ignore[arg-type]
    assert caught.value.code == code


def test_actions_follow_the_default_unless_said() -> None:
    config = FailSafeConfig(default="eject-all", black="stop-line")
    assert config.action("camera.black") == "stop-line"
    assert config.action("camera.frozen") == "eject-all"
    assert config.action("camera.slow") == "pass"
    assert config.actions == {"eject-all", "stop-line", "pass"}
    assert Counter(FailSafeConfig().actions) == {"pass": 1}
