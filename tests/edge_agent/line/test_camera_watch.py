"""The line process watches its camera: windows carry the looks, and a dirty lens is named with a picture."""

import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest

from edge_agent.devices.hardware import open_hardware
from edge_agent.line.process import Line
from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import Faulted, FromLine, Pictured, Pipe, WindowClosed
from models.messages import MAX_PICTURE_BYTES
from models.windows import CameraCounts

DEADLINE_S = 240.0


class Supervisor:
    """The other end of the line's pipe: it reads until it has what it waits for."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe, self.seen = pipe, CameraCounts()
        self.pictures: list[Pictured] = []
        self.until_s = time.monotonic() + DEADLINE_S

    def wait_for(self, code: str) -> str:
        while time.monotonic() < self.until_s:
            message = self.pipe.receive(FromLine, 1.0)
            if isinstance(message, WindowClosed):
                message.window.check()
                self.seen = self.seen.merged(message.window.camera_health)
                if code == "levels" and self.seen.levels:
                    return ""
            elif isinstance(message, Pictured):
                self.pictures.append(message)
            elif isinstance(message, Faulted) and message.fault.code == code:
                return message.fault.message
        raise AssertionError(f"{code} was not reported")


@pytest.mark.slow
def test_a_lens_that_gets_dirty_while_the_line_runs_is_named_and_wiped(tmp_path: Path) -> None:
    config = LineConfig(
        threads=1,
        opencv_threads=1,
        window_s=0.5,
        belt_mm_s=937.0,
        camera_levels=str(tmp_path / "levels"),
        trouble_file=str(tmp_path / "trouble"),
    )
    ours, theirs = socket.socketpair()
    line = Line(config, Pipe(ours), open_hardware(config, virtual=True))
    thread = threading.Thread(target=line.run, name="line", daemon=True)
    thread.start()
    supervisor = Supervisor(Pipe(theirs))
    try:
        supervisor.wait_for("levels")
        assert (tmp_path / "levels").exists(), "the levels are kept before they are used"
        (tmp_path / "trouble").write_text("dirt=0.8 dirt_x=0.8 dirt_y=0.2")
        said = supervisor.wait_for("optics.dirty")
        assert said == "Wipe the lens; the dirt is at the upper right of the picture."
        (tmp_path / "trouble").write_text("clear")
        supervisor.wait_for("optics.recovered")
    finally:
        line.stop()
        thread.join(10.0)
        supervisor.pipe.close()
    assert supervisor.pictures[0].evidence.quantity == "dirt"
    assert len(msgspec.msgpack.encode(supervisor.pictures[0].evidence)) < MAX_PICTURE_BYTES + 200
    assert supervisor.seen.outside["dirt"] > 0
    assert supervisor.seen.dirt_counts()[:6, 10:].sum() > 0
