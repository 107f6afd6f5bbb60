"""A standby as a real process: it opens no camera before the command, then it is the line; an orphan ends."""

import queue
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge_agent.line_config import LineConfig
from edge_agent.line_protocol import Beat, FromLine, Go, LoadFailed, Pipe, Ready, Swapped, Waiting, WindowClosed
from edge_agent.supervisor.line_process import LineGone, LineProcess
from tests.simulators.processes import wait_until
from tests.simulators.tiny_bundle import tiny_bundle


@pytest.fixture
def config(tmp_path: Path) -> LineConfig:
    bundle = tiny_bundle(tmp_path / "bundle")
    return LineConfig(
        bundle=str(tmp_path / "bundle"), digest=bundle.digest, threads=1, window_s=0.5, lanes=1, lifetime_items=3
    )


@pytest.fixture
def said() -> "queue.Queue[object]":
    return queue.Queue()


@pytest.fixture
def child(config: LineConfig, tmp_path: Path, said: "queue.Queue[object]") -> Iterator[LineProcess]:
    found = LineProcess(config, lambda event: said.put(event) or True, standby=True)
    yield found
    found.stop(5.0)


def heard(said: "queue.Queue[object]", kind: type) -> object:
    """The next message of this kind."""
    while True:
        event = said.get(timeout=300)
        assert not isinstance(event, LineGone), event
        message = event[1]
        assert not isinstance(message, LoadFailed), message
        if isinstance(message, kind):
            return message


@pytest.mark.slow
def test_a_standby_reports_only_that_it_waits_and_takes_over_on_command(
    child: LineProcess, config: LineConfig, said: "queue.Queue[object]", tmp_path: Path
) -> None:
    wait_until(lambda: child.waiting, "the standby")
    assert said.empty()
    assert not child.ready
    child.go(Go(lifetime_items=41, lot="L7", variety="gala"))
    assert not child.waiting
    heard(said, Ready)
    beat = next(beat for beat in iter(lambda: heard(said, Beat), None) if beat.items_on_bundle)
    assert (beat.digest, beat.lot, beat.variety) == (config.digest, "L7", "gala")
    assert heard(said, WindowClosed).window.lifetime_items > 41
    wait_until(lambda: child.ready, "what it said")
    other = tiny_bundle(tmp_path / "other", bias=1.0)
    child.load(other.digest, tmp_path / "other")
    assert heard(said, Swapped).digest == other.digest


@pytest.mark.slow
def test_a_standby_that_cannot_load_its_bundle_ends(
    config: LineConfig, tmp_path: Path, said: "queue.Queue[object]"
) -> None:
    wrong = msgspec.structs.replace(config, digest="11" * 32)
    child = LineProcess(wrong, lambda event: said.put(event) or True, standby=True)
    gone = said.get(timeout=300)
    assert isinstance(gone, LineGone)
    assert "exit status 1" in gone.reason
    assert not child.waiting


@pytest.mark.slow
def test_a_standby_opens_neither_camera_nor_plc_before_the_command(
    config: LineConfig, tmp_path: Path, said: "queue.Queue[object]"
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as camera, socket.create_server(("127.0.0.1", 0)) as plc:
        camera.setblocking(False)
        plc.setblocking(False)
        real = msgspec.structs.replace(
            config,
            camera=f"http://127.0.0.1:{camera.getsockname()[1]}/stream",
            encoder=f"modbus://127.0.0.1:{plc.getsockname()[1]}/input/100?mm_per_pulse=0.1",
        )
        child = LineProcess(real, lambda event: said.put(event) or True, standby=True)
        try:
            wait_until(lambda: child.waiting, "the standby")
            for device in (camera, plc):
                with pytest.raises(BlockingIOError):
                    device.accept()
            child.go(Go(lifetime_items=0, lot="", variety=""))
            wait_until(lambda: accepted(camera), "the camera")
            wait_until(lambda: accepted(plc), "the PLC")
        finally:
            child.kill()


def accepted(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.mark.slow
def test_one_whose_supervisor_is_gone_ends(config: LineConfig, tmp_path: Path) -> None:
    (tmp_path / "standby.json").write_bytes(msgspec.json.encode(config))
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "edge_agent.line.standby", "--config", str(tmp_path / "standby.json")]
    with subprocess.Popen([*command, "--pipe-fd", str(theirs.fileno())], pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        pipe = Pipe(ours)
        try:
            assert isinstance(pipe.receive(FromLine, 60.0), Waiting)
            pipe.close()
            assert process.wait(300.0) == 0
        finally:
            process.kill()
