"""A line process whose camera hangs in its driver, for real: named, made safe, reopened, and back."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge_agent.line_config import FailSafeConfig, LineConfig
from edge_agent.line_protocol import Beat, Faulted, FromLine, Pipe, Ready, Stop, WindowClosed
from models.errors import UnavailableError
from tests.simulators.processes import wait_until
from tests.simulators.tiny_bundle import tiny_bundle

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


class Watched:
    """The supervisor's end of the pipe to a real line process."""

    def __init__(self, root: Path, action: str) -> None:
        self.state = root / "camera.state"
        self.say("good")
        tiny_bundle(root / "bundle")
        config = LineConfig(
            lanes=1,
            bundle=str(root / "bundle"),
            window_s=1.0,
            fail_safe=FailSafeConfig(default=action),
            items_per_s=6.0,
        )
        (root / "line.json").write_bytes(msgspec.json.encode(config))
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.simulators.hanging_camera", "--config", str(root / "line.json")]
        self.process = subprocess.Popen(
            [*command, "--pipe-fd", str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT, env=os.environ
        )
        theirs.close()
        self.pipe = Pipe(ours)
        self.faults: list[Faulted] = []
        self.windows: list[WindowClosed] = []
        self.beat: Beat | None = None
        self.ready = False
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        while True:
            try:
                message = self.pipe.receive(FromLine, 0.5)
            except UnavailableError:
                return
            match message:
                case Faulted() as faulted:
                    self.faults.append(faulted)
                case WindowClosed() as closed:
                    self.windows.append(closed)
                case Beat() as beat:
                    self.beat = beat
                case Ready():
                    self.ready = True

    def say(self, state: str) -> None:
        """Atomically: the other process reads it all the time."""
        fresh = self.state.with_suffix(".new")
        fresh.write_text(state)
        fresh.rename(self.state)

    @property
    def codes(self) -> list[str]:
        return [faulted.fault.code for faulted in self.faults]


@pytest.fixture(params=["eject-all", "stop-line"])
def line(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Watched]:
    found = Watched(tmp_path, request.param)
    try:
        yield found
    finally:
        found.pipe.send(Stop())
        found.process.wait(300)
        found.thread.join(5)
        found.pipe.close()


def test_a_camera_that_hangs_is_named_made_safe_and_back(line: Watched, request: pytest.FixtureRequest) -> None:
    action = request.node.callspec.params["line"]
    wait_until(lambda: line.beat is not None and line.beat.items_on_bundle > 5, "items")
    line.say("hang")
    wait_until(lambda: "camera.stalled" in line.codes, "the fault")
    wait_until(lambda: line.beat.camera_fault == "camera.stalled" == line.beat.live.camera_fault, "the beat")
    assert not line.beat.belt_running
    line.say("good")
    wait_until(lambda: "camera.recovered" in line.codes, "the return")
    wait_until(lambda: "line.fail_safe_over" in line.codes, "the end of the fail-safe")
    items = line.beat.items_on_bundle
    wait_until(lambda: line.beat.items_on_bundle > items + 5 and line.beat.belt_running, "items again")
    said = {faulted.fault.code: faulted.fault.message for faulted in line.faults}
    assert said["line.fail_safe"] == f"{action} because of camera.stalled."
    wait_until(lambda: any("camera.stalled" in w.window.camera for w in line.windows), "a window with the fault")
    shots = sum(w.window.camera.get("blind_shots", 0) for w in line.windows)
    assert (shots > 0) == (action == "eject-all")
