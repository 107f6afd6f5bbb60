"""The line: every item once, views evenly spaced, ejections on position, swaps between frames, faults survived."""

import threading
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edge_agent.devices.cameras import ConstantSpeedEncoder, open_camera
from edge_agent.devices.live_camera import LiveCamera
from edge_agent.ejection.queue import EjectionQueue
from edge_agent.interfaces import Frame, Shot
from edge_agent.line.counters import LineCounter
from edge_agent.line.selftest import run_selftest
from edge_agent.line.sorting import LineCore
from edge_agent.line_config import LineConfig
from edge_agent.offline.collect import collect
from edge_agent.offline.contact_sheet import write_sheet
from edge_agent.offline.run import run_standalone
from edge_agent.simulation.faults import Faults, parse_fault_schedule
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge
from edge_agent.vision.segmentation import Locator
from models.bundle import read_bundle
from models.errors import BundleError, CameraError, ConfigError, InputError
from models.preprocess import make_view, view_of_photo
from tests.simulators.tiny_bundle import tiny_bundle

SMALL = SimulationConfig(apples=8, varieties=("golden",))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return directory


def core_of(line: SimulatedLine, judge: Judge | None = None) -> LineCore:
    counter = LineCounter(line.config.lanes, truth=line.truth, clock=line.now)
    queue = EjectionQueue(line, line, lead_ms=0.0, clock=line.now)
    core = LineCore(geometry=line.geometry, counter=counter, queue=queue, clock=line.now)
    core.use(judge)
    return core


def drive(line: SimulatedLine, core: LineCore, frames: int) -> None:
    for _ in range(frames):
        before_s = line.now()
        frame = line.read(1.0)
        core.queue.run_to(before_s, line.now())
        if frame is not None:
            core.process(frame)


def test_the_same_seed_gives_the_same_frames_and_another_does_not() -> None:
    first, again = SimulatedLine(SMALL, virtual=True), SimulatedLine(SMALL, virtual=True)
    other = SimulatedLine(msgspec.structs.replace(SMALL, seed=2), virtual=True)
    for _ in range(25):
        a, b, c = first.read(1.0), again.read(1.0), other.read(1.0)
    assert a
    assert b
    assert c
    assert np.array_equal(a.image, b.image)
    assert (a.belt_mm, a.number) == (b.belt_mm, b.number)
    assert not np.array_equal(a.image, c.image)


@pytest.mark.slow
def test_items_are_found_once_each_at_ten_per_second_with_some_touching(bundle: Path) -> None:
    config = SimulationConfig(items_per_s=10.0, seed=3)
    line = SimulatedLine(config, virtual=True)
    core = core_of(line, Judge(bundle))
    drive(line, core, 1000)
    window = core.counter.close_window()
    settled = sum(line.truth().outcomes.values())
    assert settled > 550
    found = window.items + window.items_unjudged
    # Items between the camera and the last outlet have a verdict and are not settled yet.
    assert abs(found - settled) <= 0.005 * settled + 2 * 12
    assert window.items_unjudged <= 0.005 * found
    assert window.views / window.items == pytest.approx(6.0, abs=0.3)
    window.check()


def test_the_verdict_comes_with_the_last_view_and_not_when_the_item_has_left(bundle: Path) -> None:
    line = SimulatedLine(SMALL, virtual=True)
    core = core_of(line, Judge(bundle))
    waited: list[tuple[float, int]] = []
    core.on_verdict = lambda found, _outlet: waited.append((line.now() - found.track.viewed_s, len(found.track.views)))
    drive(line, core, 200)
    at_once = [seconds for seconds, _ in waited if seconds == 0.0]
    assert len(waited) > 80
    assert len(at_once) >= 0.97 * len(waited), "few items are lost from sight before their last view"
    # Verdict and ejection stay single although the item is still seen for some frames.
    assert core.counter.total["items"] == len(waited)


@pytest.mark.slow
def test_every_ejection_hits_the_item_it_was_meant_for(bundle: Path) -> None:
    line = SimulatedLine(
        SMALL, virtual=True, schedule="4s speed_factor=0.6; 8s stopped; 10s speed_factor=1.2; 13s clear"
    )
    core = core_of(line, Judge(bundle))
    drive(line, core, 700)
    shots = line.truth().ejections
    assert shots["on_time"] > 100
    assert shots.get("wrong", 0) + shots.get("gap", 0) + shots.get("late", 0) <= 0.01 * shots["on_time"]


@pytest.mark.slow
def test_a_swap_loses_and_doubles_no_item(bundle: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    tiny_bundle(second, bias=3.0)
    line = SimulatedLine(SMALL, virtual=True)
    core = core_of(line, Judge(bundle))
    judged: list[tuple[int, int]] = []
    core.on_verdict = lambda found, _outlet: judged.append((found.track.item_id, id(found.track.judge)))
    judges = [Judge(second), Judge(bundle)]
    for number in range(20):
        drive(line, core, 37)
        core.use(judges[number % 2])
    drive(line, core, 60)
    ids = [item for item, _ in judged]
    assert len(ids) == len(set(ids))
    assert len({judge for _, judge in judged}) > 2
    unjudged = core.counter.total["items_unjudged"]
    assert len(ids) + unjudged + core.tracker.open == pytest.approx(core._ids, abs=2)
    assert unjudged <= 1


def test_without_a_bundle_items_pass_and_are_counted() -> None:
    line = SimulatedLine(SMALL, virtual=True)
    core = core_of(line)
    drive(line, core, 200)
    window = core.counter.close_window()
    assert window.items == 0
    assert window.items_unjudged > 50
    assert line.truth().ejections == {}


def test_a_large_batch_is_judged_like_its_views_one_by_one(bundle: Path) -> None:
    classifier = Judge(bundle).classifier
    views = np.random.default_rng(4).integers(0, 256, (7, 64, 64, 3), dtype=np.uint8)
    whole = classifier.classify(views)
    single = [classifier.classify(view[None]) for view in views]
    assert whole.probabilities.shape[0] == whole.embedding.shape[0] == 7
    assert np.allclose(whole.probabilities, np.concatenate([a.probabilities for a in single]), atol=1e-6)
    assert np.allclose(whole.embedding, np.concatenate([a.embedding for a in single]), rtol=1e-5)


def test_a_model_that_breaks_while_it_works_is_put_aside(bundle: Path) -> None:
    line = SimulatedLine(SMALL, virtual=True)
    judge = Judge(bundle)
    core = core_of(line, judge)
    seen: list[str] = []
    core.on_model_failure = lambda _judge, error: seen.append(error.code)
    drive(line, core, 60)

    def broken(*_: object) -> None:
        raise BundleError("model.not_finite", "NaN", expected="finite", got="nan")

    judge.classifier.classify = broken  # type: ignore[method-assign]
    drive(line, core, 120)
    assert seen == ["model.not_finite"]
    assert core.judge is None
    assert core.counter.total["items_unjudged"] > 20


@pytest.mark.parametrize("knobs", ["brightness=0.6", "blue=1.3 red=0.8", "blur_px=2", "dirt=0.6", "drop_share=0.3"])
@pytest.mark.slow
def test_trouble_does_not_stop_the_sorting(bundle: Path, knobs: str) -> None:
    line = SimulatedLine(SMALL, virtual=True, schedule=f"2s {knobs}")
    core = core_of(line, Judge(bundle))
    drive(line, core, 400)
    assert core.counter.total["items"] > 150


def test_torn_and_black_frames_are_refused_and_the_line_goes_on(bundle: Path) -> None:
    line = SimulatedLine(SMALL, virtual=True)
    core = core_of(line, Judge(bundle))
    drive(line, core, 60)
    line.set_trouble(Faults(brightness=0.0))
    drive(line, core, 10)
    assert core.counter.total["frames_bad"] >= 5
    line.set_trouble(Faults())
    drive(line, core, 200)
    assert core.counter.total["items"] > 50


def test_a_schedule_is_read_or_refused_with_the_nearest_knob() -> None:
    steps = parse_fault_schedule("60s clear; 30s brightness=0.7 freeze")
    assert [(s.after_s, s.trouble.brightness, s.trouble.freeze) for s in steps] == [
        (30.0, 0.7, True),
        (60.0, 1.0, False),
    ]
    for text, code in (("30s brigthness=1", "trouble.unknown_knob"), ("soon dirt=1", "trouble.malformed")):
        with pytest.raises(ConfigError) as caught:
            parse_fault_schedule(text)
        assert caught.value.code == code
    with pytest.raises(ConfigError, match="did you mean brightness"):
        parse_fault_schedule("1s brigthness=1")


def test_an_item_in_the_picture_is_where_the_truth_says() -> None:
    line = SimulatedLine(SMALL, virtual=True)
    locator = Locator(line.geometry)
    matched = 0
    for _ in range(90):
        frame = line.read(1.0)
        for place in locator.find(frame.image):
            if place.whole and not place.touching:
                item_mm = frame.belt_mm - place.x_px * line.config.mm_per_px
                truth = line.view_truth(frame.belt_mm, place.lane, item_mm, tolerance_mm=4.0)
                assert truth is not None
                matched += 1
    assert matched > 200


@pytest.mark.slow
def test_collected_views_are_those_that_would_have_been_judged(tmp_path: Path) -> None:
    found = collect(LineConfig(), tmp_path / "views", items=12)
    assert found.views >= 60
    rows = (tmp_path / "views" / "labels.csv").read_text().splitlines()
    assert rows[0] == "path,item,lot,label,kind,variety,view,weight_g,length_mm"
    line = SimulatedLine(SimulationConfig(), virtual=True)
    core = core_of(line)
    spec = read_bundle.__globals__["PreprocessSpec"]()
    views = set()
    for _ in range(120):
        frame = line.read(1.0)
        for place in core.locator.find(frame.image):
            if place.whole:
                views.add(make_view(*core.locator.mask(frame.image, place), spec).tobytes())
    stored = [view_of_photo(path, spec).tobytes() for path in sorted((tmp_path / "views" / "views").iterdir())[:30]]
    assert all(view in views for view in stored)
    with pytest.raises(InputError) as caught:
        collect(LineConfig(), tmp_path / "views", items=1)
    assert caught.value.code == "collect.not_empty"


@pytest.mark.slow
def test_a_recording_is_judged_alike_every_time(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    line = SimulatedLine(SMALL, virtual=True)
    for number in range(60):
        cv2.imwrite(str(folder / f"frame{number}.png"), line.read(1.0).image)
    (folder / "frame20.png").write_bytes(b"no picture")
    config = LineConfig(camera=str(folder), paced=False)
    texts = []
    for attempt in range(2):
        path = tmp_path / f"verdicts{attempt}.jsonl"
        with path.open("w") as stream:
            facts = run_standalone(config, bundle=bundle, verdicts=stream)
        texts.append(path.read_text())
    assert facts["frames"] == 59
    assert facts["items"] > 10
    assert texts[0] == texts[1]


def test_a_video_plays_and_ends_and_a_truncated_one_too(tmp_path: Path) -> None:
    path = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30.0, (320, 200))
    for number in range(20):
        writer.write(np.full((200, 320, 3), number * 10, np.uint8))
    writer.release()
    camera = open_camera(str(path), belt_mm_s=900.0, paced=False)
    frames = [camera.read(1.0) for _ in range(20)]
    assert [frame.number for frame in frames] == list(range(20))
    assert frames[10].belt_mm == pytest.approx(900.0 * 10 / 30.0)
    with pytest.raises(CameraError) as caught:
        camera.read(1.0)
    assert caught.value.code == "camera.ended"
    broken = tmp_path / "broken.avi"
    broken.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CameraError) as caught:
        open_camera(str(broken), belt_mm_s=900.0, paced=False).read(1.0)
    assert caught.value.code in {"camera.corrupt", "camera.ended"}


@pytest.mark.parametrize("what", ["missing.mp4", "empty-folder"])
def test_a_camera_that_is_not_there_is_named(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty-folder").mkdir()
    with pytest.raises(CameraError) as caught:
        open_camera(str(tmp_path / what), belt_mm_s=900.0)
    assert caught.value.code == "camera.absent"


class StuckCapture:
    """A device that gives three frames and then blocks for ever, as OpenCV does after a reconnect."""

    def __init__(self) -> None:
        self.left = 3
        self.stuck = threading.Event()

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def get(self, _what: int) -> float:
        return 0.0

    def release(self) -> None:
        self.stuck.set()

    def read(self) -> tuple[bool, np.ndarray | None]:
        if self.left == 0:
            self.stuck.wait(30.0)
            return False, None
        self.left -= 1
        self.stuck.wait(0.02)  # a camera has a pace; what comes without one is old
        return True, np.full((40, 60, 3), self.left, np.uint8)


def test_a_device_that_blocks_for_ever_is_given_up_and_reopened() -> None:
    opened: list[StuckCapture] = []

    def opener(_source: str) -> StuckCapture:
        opened.append(StuckCapture())
        return opened[-1]

    camera = LiveCamera("7", encoder=ConstantSpeedEncoder(1000.0), stall_s=0.3, opener=opener)
    frames, codes = 0, []
    while len(codes) < 2:
        try:
            frames += camera.read(0.1) is not None
        except CameraError as error:
            codes.append(error.code)
    camera.close()
    for capture in opened:
        capture.stuck.set()
    assert codes == ["camera.stalled", "camera.stalled"]
    assert frames >= 2
    assert camera.counters.reopened == 2
    assert camera.counters.frames == 3 * (len(opened) - 1) or len(opened) >= 2


def test_an_ejector_that_fails_does_not_stop_the_queue() -> None:
    line = SimulatedLine(SMALL, virtual=True)

    class Broken:
        def fire(self, _shot: Shot, _at_s: float) -> None:
            raise OSError("valve")

    queue = EjectionQueue(line, Broken(), lead_ms=0.0, clock=line.now)
    queue.schedule(Shot(0, "reject", 1, 10.0))
    queue.fire_due(0.012)
    assert (queue.failed, queue.fired) == (1, 0)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, ""),
        ({"poison": "nan"}, "model.not_finite"),
        ({"poison": "shape"}, "model.wrong_signature"),
        ({"poison": "golden"}, "golden.mismatch"),
    ],
)
def test_the_self_test_catches_what_must_not_run(tmp_path: Path, options: dict[str, str], code: str) -> None:
    tiny_bundle(tmp_path / "b", **options)
    report = run_selftest(tmp_path / "b", digest=None, budget_ms=1000.0, batch=2, runs=5)
    assert report.ok is (code == "")
    assert (report.fault.code if report.fault else "") == code
    slow = run_selftest(tmp_path / "b", digest=None, budget_ms=1e-6, batch=2, runs=5)
    assert slow.fault is not None
    assert code or slow.fault.code == "selftest.too_slow"


def test_a_frame_of_another_size_is_refused_by_name(bundle: Path) -> None:
    line = SimulatedLine(SMALL, virtual=True)
    core = core_of(line, Judge(bundle))
    with pytest.raises(CameraError) as caught:
        core.process(Frame(np.zeros((10, 10, 3), np.uint8), 0, 0.0, 0.0))
    assert caught.value.code == "camera.wrong_size"


@pytest.mark.parametrize(("shape", "whole"), [("disc", True), ("two lobes", False)])
def test_rot_as_dark_as_the_belt_stays_part_of_its_apple(shape: str, whole: bool) -> None:
    line = SimulatedLine(SMALL, virtual=True)
    locator = Locator(line.geometry)
    belt = np.full((line.geometry.height_px, line.geometry.width_px, 3), 40, np.uint8)
    locator.find(belt)
    image, truth = belt.copy(), np.zeros(belt.shape[:2], np.uint8)
    if shape == "disc":
        cv2.circle(truth, (300, 85), 60, 255, cv2.FILLED)
    else:
        cv2.rectangle(truth, (240, 60), (360, 80), 255, cv2.FILLED)
        cv2.rectangle(truth, (240, 60), (260, 140), 255, cv2.FILLED)
    image[truth > 0] = (60, 180, 200)
    if shape == "disc":
        # The rim has rotten to the colour of the belt.
        cv2.circle(image, (322, 138), 22, (40, 40, 40), cv2.FILLED)
    (place,) = locator.find(image)
    _, mask = locator.mask(image, place)
    covered = cv2.countNonZero(mask) / cv2.countNonZero(truth)
    if whole:
        assert 0.97 < covered < 1.01
    else:
        assert covered == pytest.approx(1.0, abs=0.02), "what is far from convex is not filled up with belt"


@pytest.mark.slow
def test_a_picture_sheet_shows_what_was_judged_or_says_that_nothing_was(bundle: Path, tmp_path: Path) -> None:
    config = LineConfig(paced=False, items_per_s=6.0)
    summary = write_sheet(config, bundle, tmp_path / "line.png", seconds=2.5)
    assert summary["items"] > 8
    picture = cv2.imread(str(tmp_path / "line.png"))
    assert picture is not None
    # A headline, two rows of frames of 340 pixels, and items in two columns.
    assert picture.shape[1] == 1280
    assert picture.shape[0] > 64 + 2 * 340 + 74 * (summary["shown"] // 2)
    with pytest.raises(InputError, match=r"expected an item"):
        write_sheet(config, bundle, tmp_path / "none.png", seconds=0.1)
    assert not (tmp_path / "none.png").exists()
