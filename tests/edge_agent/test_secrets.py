"""A password in a camera's address stands nowhere: not in log, spool, state files, report or screen."""

import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_agent.cli.commands import main
from edge_agent.supervisor.journal import Journal
from models.messages import Fault
from tests.simulators.tiny_bundle import tiny_bundle

SECRET = "geheim-4711"
CAMERA = f"rtsp://admin:{SECRET}@127.0.0.1:1/stream?password={SECRET}"


def test_events_and_faults_of_a_line_lose_their_secrets(caplog: pytest.LogCaptureFixture) -> None:
    kept: list[bytes] = []
    journal = Journal(queue.Queue(), lambda _kind, payload: kept.append(payload), lambda: None)
    with caplog.at_level("INFO"):
        journal.event("camera.absent", f"No camera at {CAMERA}.", source=CAMERA)
        journal.set_fault(Fault(code="camera.absent", message=f"No camera at {CAMERA}."))
    assert kept
    assert SECRET.encode() not in b"".join(kept)
    assert SECRET not in caplog.text
    assert journal.fault is not None
    assert SECRET not in journal.fault.message


@pytest.mark.parametrize("command", ["calibrate", "collect", "picture", "run"])
def test_a_camera_that_is_not_there_is_named_without_its_password(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    tiny_bundle(bundle, view_px=16)
    more = {
        "calibrate": ["--item-mm", "75", "--output", str(tmp_path / "geometry.toml")],
        "collect": ["--output", str(tmp_path / "views")],
        "picture": ["--bundle", str(bundle), "--output", str(tmp_path / "line.png")],
        "run": ["--bundle", str(bundle), "--seconds", "1"],
    }[command]
    status = main([command, "--camera", CAMERA, *more])
    said = capfd.readouterr()
    assert status == 4
    assert "127.0.0.1" in said.err
    assert SECRET not in said.out + said.err


@pytest.mark.slow
def test_an_agent_with_such_a_camera_writes_its_password_nowhere(tmp_path: Path) -> None:
    """The real processes: log, spool, state files, and what is published."""
    state = tmp_path / "state"
    command = ["-m", "edge_agent", "run", "--state-dir", str(state), "--broker", "127.0.0.1:1", "--camera", CAMERA]
    log = tmp_path / "log"
    with log.open("wb") as stream, subprocess.Popen([sys.executable, *command], stderr=stream, stdout=stream) as agent:
        try:
            until = time.monotonic() + 60.0
            while b"camera." not in log.read_bytes() and time.monotonic() < until:
                time.sleep(0.2)
        finally:
            agent.send_signal(signal.SIGTERM)
            agent.wait(60.0)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert b"camera." in written[log]
    assert [path.name for path, data in written.items() if SECRET.encode() in data] == []
    assert any(path.name.startswith("spool") for path in written)
