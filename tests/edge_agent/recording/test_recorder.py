"""Recordings: bit-exact replay from any moment, torn tails, quota, full disks, hostile files."""

import errno
import io
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.cli.commands import main
from edge_agent.ejection.queue import EjectionQueue
from edge_agent.interfaces import Frame
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import LineCore
from edge_agent.line_config import LineConfig
from edge_agent.offline.run import run_standalone
from edge_agent.recording.comparison import replay
from edge_agent.recording.recorder import Recorder, encode_image
from edge_agent.recording.replay import Replay
from edge_agent.recording.segments import (
    FrameHead,
    framed,
    opening,
    read_segment,
    segment_files,
)
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge
from models.errors import CameraError, ConfigError, InputError
from tests.simulators.tiny_bundle import tiny_bundle

SMALL = SimulationConfig(apples=8, varieties=("golden",))
ROOMY = 10**10


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return directory


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    line = SimulatedLine(SMALL, virtual=True, schedule="1.5s speed_factor=0.7; 3s brightness=0.8; 5s clear")
    return [frame for frame in (line.read(1.0) for _ in range(180)) if frame is not None]


class LineHardware:
    """One core over given frames, in virtual time; the recorder's queue is emptied before each frame."""

    def __init__(self, recorder: Recorder | None, judge: Judge | None) -> None:
        self.line = SimulatedLine(SMALL, virtual=True)
        self.recorder = recorder
        self.core = LineCore(
            geometry=self.line.geometry,
            counter=LineCounter(2, clock=lambda: 0.0),
            queue=EjectionQueue(self.line, self.line, lead_ms=0.0, clock=lambda: 0.0),
            clock=lambda: 0.0,
            on_verdict=recorder.decided if recorder else None,
        )
        self.core.use(judge)

    def run(self, frames: list[Frame], *, drain: bool = True) -> None:
        for frame in frames:
            if self.recorder:
                self.recorder.offer(self.core, frame)
            self.core.process(frame)
            if self.recorder:
                self.recorder.processed()
            if drain and self.recorder:
                drained(self.recorder)

    def end(self) -> None:
        self.core.flush()
        self.recorder.ended()
        self.recorder.close()


def drained(recorder: Recorder) -> None:
    """Waits until the writer has taken everything, frames included."""
    passed = threading.Event()
    while recorder._thread.is_alive() and (recorder._queue or recorder._frames_waiting):
        passed.wait(0.0005)


def record(folder: Path, bundle: Path, frames: list[Frame], **options: object) -> Recorder:
    recorder = Recorder(folder, **({"quota_bytes": ROOMY} | options))
    world = LineHardware(recorder, Judge(bundle))
    world.run(frames)
    world.end()
    return recorder


@pytest.mark.slow
def test_a_replay_is_equal_in_every_bit_across_segments(bundle: Path, tmp_path: Path, frames: list[Frame]) -> None:
    recorder = record(tmp_path / "rec", bundle, frames, segment_s=1.0)
    assert recorder.counters.frames == len(frames)
    assert recorder.counters.segments >= 5
    source = Replay(tmp_path / "rec")
    assert len(source.stretches) == 1
    assert source.stretches[0].ended
    for frame in frames:
        again = source.read(1.0)
        assert again is not None
        assert np.array_equal(again.image, frame.image)
        assert (again.number, again.captured_s, again.belt_mm) == (frame.number, frame.captured_s, frame.belt_mm)
        assert source.position_mm(frame.captured_s) == frame.belt_mm
        assert source.now() == frame.captured_s
    with pytest.raises(CameraError) as caught:
        source.read(1.0)
    assert caught.value.code == "camera.ended"
    report = replay(tmp_path / "rec", bundle)
    assert report.exact is True
    assert report.equal == report.compared == report.decisions > 45
    assert (report.missing, report.extra, report.not_comparable) == (0, 0, 0)
    assert report.belts_compared == recorder.counters.segments - 1
    assert report.notes == []


@pytest.mark.parametrize("start", [0, 70])
@pytest.mark.slow
def test_weights_of_a_load_cell_are_replayed_from_the_frame_they_were_known(
    tmp_path: Path, frames: list[Frame], start: int
) -> None:
    tiny_bundle(tmp_path / "weighing", weighs=True, bias=-2.0)
    recorder = Recorder(tmp_path / "rec", quota_bytes=ROOMY)
    world = LineHardware(None, Judge(tmp_path / "weighing"))

    class Cell:
        """Gives some items no weight, others only when they have been seen for a while."""

        def value_for(self, item_mm: float) -> float | None:
            known_mm = world.core.frame_number * 25.0
            return 100.0 + item_mm % 90.0 if item_mm % 5.0 > 1.0 and item_mm < known_mm else None

    world.core.weights = (Cell(), Cell())
    world.run(frames[:start])
    world.recorder, world.core.on_verdict = recorder, recorder.decided
    world.run(frames[start:])
    world.end()
    decisions = [decision for stretch in Replay(tmp_path / "rec").stretches for decision in stretch.decisions]
    assert {decision.weight_g is None for decision in decisions} == {True, False}
    assert len({decision.weighed_frame for decision in decisions}) > 15
    report = replay(tmp_path / "rec", tmp_path / "weighing")
    assert report.exact
    assert report.equal == len(decisions) > 20


def test_the_encoder_of_a_recording_is_straight_between_frames(
    bundle: Path, tmp_path: Path, frames: list[Frame]
) -> None:
    record(tmp_path / "rec", bundle, frames[:4])
    source = Replay(tmp_path / "rec")
    assert source.position_mm(1.0) == 0.0
    first, second = frames[0], frames[1]
    source.read(0.0)
    between = source.position_mm((first.captured_s + second.captured_s) / 2)
    assert between == pytest.approx((first.belt_mm + second.belt_mm) / 2)
    assert source.speed_mm_s() == pytest.approx(1000.0)
    assert source.position_mm(first.captured_s - 0.01) == pytest.approx(first.belt_mm - 10.0)
    assert source.position_mm(frames[3].captured_s + 0.01) == pytest.approx(frames[3].belt_mm + 10.0)


@pytest.mark.slow
def test_a_recording_that_starts_in_the_middle_of_a_run_replays_exactly(
    bundle: Path, tmp_path: Path, frames: list[Frame]
) -> None:
    recorder = Recorder(tmp_path / "rec", quota_bytes=ROOMY)
    world = LineHardware(None, Judge(bundle))
    world.run(frames[:100])
    world.recorder, world.core.on_verdict = recorder, recorder.decided
    assert world.core.tracker.open > 3
    world.run(frames[100:])
    world.end()
    report = replay(tmp_path / "rec", bundle)
    assert report.exact is True
    assert report.equal > 20
    first = Replay(tmp_path / "rec").stretches[0].checkpoint
    assert any(track.views for track in first.tracks)


@pytest.mark.slow
def test_a_bundle_swapped_in_the_middle_is_compared_for_its_own_items(
    bundle: Path, tmp_path: Path, frames: list[Frame]
) -> None:
    tiny_bundle(tmp_path / "other", bias=3.0)
    recorder = Recorder(tmp_path / "rec", quota_bytes=ROOMY, segment_s=1.0)
    world = LineHardware(recorder, None)
    world.run(frames[:40])
    world.core.use(Judge(bundle))
    world.run(frames[40:120])
    world.core.use(Judge(tmp_path / "other"))
    world.run(frames[120:])
    world.end()
    for directory in (bundle, tmp_path / "other"):
        report = replay(tmp_path / "rec", directory)
        assert report.exact is True, report.differences
        assert len(report.recorded_bundles) == 2
        assert report.equal > 20


@pytest.mark.slow
def test_another_bundle_gives_a_table(bundle: Path, tmp_path: Path, frames: list[Frame]) -> None:
    record(tmp_path / "rec", bundle, frames)
    tiny_bundle(tmp_path / "mild", bias=-2.0)
    report = replay(tmp_path / "rec", tmp_path / "mild")
    assert report.exact is None
    assert report.compared == report.decisions > 45
    assert sum(sum(row.values()) for row in report.classes.values()) == report.compared
    assert report.agreed < report.compared
    assert report.outlets["reject"]["pass"] > 0
    assert report.classes["defect"]["sound"] == report.outlets["reject"]["pass"]
    text = "\n".join(report.lines())
    assert "outlet then" in text
    assert "agreed on" in text


@pytest.mark.slow
def test_an_item_that_was_late_is_late_again(bundle: Path, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "rec", quota_bytes=ROOMY, patient=True)
    config = LineConfig(camera="simulated", paced=False, outlets_mm={"reject": 300.0}, lead_ms=100.0, defect_share=0.9)
    facts = run_standalone(config, bundle=bundle, seconds=4.0, recorder=recorder)
    assert facts["verdicts_late"] > 3
    report = replay(tmp_path / "rec", bundle)
    assert report.exact is True
    assert report.late > 0


@pytest.mark.slow
def test_a_changed_verdict_is_found_and_named(bundle: Path, tmp_path: Path, frames: list[Frame]) -> None:
    record(tmp_path / "rec", bundle, frames[:120])
    path = segment_files(tmp_path / "rec")[0][1]
    segment = read_segment(path)
    decisions = [entry for entry in segment.entries if type(entry.head).__name__ == "Decision"]
    changed = msgspec.structs.replace(decisions[3].head, item_mm=float(np.nextafter(decisions[3].head.item_mm, 1e9)))
    parts = [
        framed(changed if entry is decisions[3] else entry.head, entry.payload())
        for entry in segment.entries
        if entry is not decisions[5]
    ]
    path.write_bytes(opening() + b"".join(parts))
    report = replay(tmp_path / "rec", bundle)
    assert report.exact is False
    assert (report.differing, report.extra) == (1, 1)
    assert any("item_mm" in difference for difference in report.differences)


# -- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_queue_loses_frames_and_no_exactness(
    bundle: Path, tmp_path: Path, frames: list[Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    gate.set()

    def slow(image: np.ndarray) -> bytes:
        gate.wait(30.0)
        return encode_image(image)

    monkeypatch.setattr("edge_agent.recording.recorder.encode_image", slow)
    recorder = Recorder(tmp_path / "rec", quota_bytes=ROOMY, queue_frames=8)
    world = LineHardware(recorder, Judge(bundle))
    world.run(frames[:90])
    gate.clear()
    world.run(frames[90:130], drain=False)
    gate.set()
    drained(recorder)
    world.run(frames[130:])
    world.end()
    assert recorder.counters.frames_lost == 40 - 8
    assert recorder.counters.frames == len(frames) - 32
    report = replay(tmp_path / "rec", bundle)
    assert report.stretches == 2
    assert report.exact is True, report.differences
    assert recorder.counters.decisions_lost > 0, "what was decided on lost frames cannot be decided again"
    assert report.equal > 40


class SmallDisk(io.RawIOBase):
    """A file on a disk that is full after some bytes, in the middle of a record."""

    def __init__(self, path: Path, room: list[int]) -> None:
        self._file = path.open("xb", buffering=0)
        self._room = room

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        if self._room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._file.write(data[: self._room[0]])
        self._room[0] -= written
        return written

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


@pytest.mark.slow
def test_a_full_disk_pauses_the_recording_and_the_line_goes_on(
    bundle: Path, tmp_path: Path, frames: list[Frame]
) -> None:
    room, now = [25_000_000], [0.0]
    recorder = Recorder(
        tmp_path / "rec",
        quota_bytes=ROOMY,
        retry_s=10.0,
        clock=lambda: now[0],
        opener=lambda path: SmallDisk(path, room),  # type: ignore[arg-type, return-value]
    )
    world = LineHardware(recorder, Judge(bundle))
    world.run(frames[:120])
    assert recorder.counters.disk_errors == 1
    assert recorder.counters.frames_lost > 10
    assert world.core.counter.total["items"] > 20
    room[0], now[0] = 10**9, 11.0
    world.run(frames[120:])
    world.end()
    assert recorder.counters.frames + recorder.counters.frames_lost == len(frames)
    report = replay(tmp_path / "rec", bundle)
    assert len(report.torn) == 1
    assert report.stretches == 2
    assert report.exact is True, report.differences


@pytest.mark.slow
def test_the_quota_holds_and_the_oldest_go_first(bundle: Path, tmp_path: Path, frames: list[Frame]) -> None:
    folder, quota = tmp_path / "rec", 20_000_000
    recorder = Recorder(folder, quota_bytes=quota)
    world = LineHardware(recorder, Judge(bundle))
    for frame in frames:
        world.run([frame])
        assert sum(path.stat().st_size for path in folder.iterdir()) <= quota
    world.end()
    sequences = [sequence for sequence, _, _ in segment_files(folder)]
    assert sequences == list(range(sequences[0], sequences[-1] + 1))
    assert sequences[0] == recorder.counters.segments_evicted > 3
    assert recorder.counters.frames_lost == 0
    report = replay(folder, bundle)
    assert report.exact is True
    assert 0 < report.frames < len(frames)


@pytest.mark.slow
def test_kept_segments_go_last_and_only_when_nothing_else_is_left(
    bundle: Path, tmp_path: Path, frames: list[Frame]
) -> None:
    folder = tmp_path / "rec"
    recorder = Recorder(folder, quota_bytes=16_000_000)
    world = LineHardware(recorder, Judge(bundle))
    world.run(frames[:12])
    recorder.keep("camera.stalled")
    world.run(frames[12:])
    world.end()
    kept = [sequence for sequence, _, kept in segment_files(folder) if kept]
    assert kept
    assert kept[0] <= 1
    assert recorder.counters.kept_evicted == 0
    assert "camera.stalled" in Replay(folder).kept
    assert replay(folder, bundle).exact is True
    again = Recorder(folder, quota_bytes=4_000_000)
    again.close()
    left = segment_files(folder)
    assert all(flag for _, _, flag in left)
    assert sum(path.stat().st_size for _, path, _ in left) <= 4_000_000
    Recorder(folder, quota_bytes=1000).close()
    assert segment_files(folder) == []


def test_a_quota_too_small_for_a_frame_records_nothing_and_says_so(
    bundle: Path, tmp_path: Path, frames: list[Frame]
) -> None:
    recorder = record(tmp_path / "rec", bundle, frames[:10], quota_bytes=1000)
    assert (recorder.counters.frames, recorder.counters.frames_lost) == (0, 10)
    with pytest.raises(ConfigError) as caught:
        Recorder(tmp_path / "rec", quota_bytes=0)
    assert caught.value.code == "recording.bad_quota"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as refused:
        Recorder(tmp_path / "file", quota_bytes=1)
    assert refused.value.code == "recording.unwritable"


@pytest.mark.slow
def test_a_second_start_continues_the_folder_as_a_new_run(bundle: Path, tmp_path: Path, frames: list[Frame]) -> None:
    record(tmp_path / "rec", bundle, frames[:120])
    record(tmp_path / "rec", bundle, frames[:120])
    report = replay(tmp_path / "rec", bundle)
    assert report.stretches == 2
    assert report.exact is True
    assert report.equal == report.decisions


# -- command --------------------------------------------------------------------------------------------------------


def test_the_command_records_replays_and_compares(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "rec")
    simulated = ["--camera", "simulated", "--unpaced", "--seconds", "3"]
    recording = ["--record", folder, "--record-quota-mb", "200"]
    assert main(["run", "--bundle", str(bundle), *simulated, *recording, "--json"]) == 0
    facts = msgspec.json.decode(capsys.readouterr().out)["recording"]
    assert (facts["frames"], facts["frames_lost"]) == (91, 0)
    assert facts["used_bytes"] == sum(path.stat().st_size for path in Path(folder).iterdir())
    assert main(["replay", folder, "--json"]) == 0
    report = msgspec.json.decode(capsys.readouterr().out)
    assert report["exact"] is True
    tiny_bundle(tmp_path / "other", bias=9.0)
    assert main(["replay", folder, "--bundle", str(tmp_path / "other")]) == 0
    assert "class then" in capsys.readouterr().out
    assert main(["run", "--record", folder]) == 2
    assert main(["replay", str(tmp_path / "nothing")]) == 1
    assert "recording.absent" in capsys.readouterr().err


@pytest.mark.slow
def test_a_replay_that_is_not_exact_fails_the_command(bundle: Path, tmp_path: Path, frames: list[Frame]) -> None:
    record(tmp_path / "rec", bundle, frames[:90])
    path = segment_files(tmp_path / "rec")[0][1]
    parts = []
    for entry in read_segment(path).entries:
        head = entry.head
        if isinstance(head, FrameHead):
            head = msgspec.structs.replace(head, belt_mm=head.belt_mm + 0.25)
        parts.append(framed(head, entry.payload()))
    path.write_bytes(opening() + b"".join(parts))
    assert main(["replay", str(tmp_path / "rec"), "--bundle", str(bundle)]) == 1
    assert main(["replay", str(tmp_path / "rec")]) == 1
