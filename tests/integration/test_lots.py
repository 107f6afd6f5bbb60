"""A lot on its way: a command over a real broker to a line at work, which a rollout waits for; and said at the line."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
import uvicorn

from control_plane.app import create_app
from control_plane.cli import main
from control_plane.services import Services
from models.messages import Command, CommandKind, LotSource, Phase, Response, Swap, decode, encode
from models.topics import Channel, agent_topic
from tests.integration.test_whole_system import ROOT, Plane, agent, end, events, plane
from tests.simulators.plane import make_services
from tests.simulators.processes import embedded_broker, free_port, running, wait_until
from tests.simulators.tiny_bundle import tiny_bundle

__all__ = ["plane"]  # the fixture of the whole-system tests: enrolled, signed, both brokers
COMMANDS, ANSWERS = agent_topic("line-1", Channel.COMMAND), agent_topic("line-1", Channel.RESPONSE)


def command(number: int, lot: str, *, late_s: float = 0.0) -> Command:
    issued_ms = time.time_ns() // 1_000_000 - round(late_s * 1000)
    return Command(
        request_id=f"{number:032x}",
        issued_at_ms=issued_ms,
        expires_at_ms=issued_ms + 60_000,
        kind=CommandKind.SET_LOT,
        lot=lot,
        variety="gala",
    )


def at_the_line(*words: str) -> dict[str, object]:
    command = [sys.executable, "-m", "edge_agent", "lot", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_rollout_waits_for_the_lot_that_a_command_names_and_windows_show_it(plane: Plane, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "a", bias=-2.5)
    tiny_bundle(tmp_path / "b", bias=0.5)
    answers: dict[str, Response] = {}

    def heard(_client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        found = decode(message.payload, Response)
        answers[found.request_id] = found

    plane.client.message_callback_add(ANSWERS, heard)

    def say(sent: Command, *copies: bytes) -> Response:
        for payload in (encode(sent), *copies):
            plane.client.publish(COMMANDS, payload, 1)
        wait_until(lambda: sent.request_id in answers, "the answer")
        return answers.pop(sent.request_id)

    process = agent(plane, tmp_path / "state")
    try:
        first, second = plane.offer(tmp_path / "a"), plane.offer(tmp_path / "b")
        plane.desire(first, 1)
        wait_until(lambda: plane.phase(Phase.COMMITTED, first), "the first commit")
        plane.desire(second, 2, swap=Swap.LOT_CHANGE)
        wait_until(lambda: plane.phase(Phase.TRIAL, second), "the bundle that waits")
        late = say(command(1, "too-late", late_s=120.0))
        assert late.fault.code == "command.expired"
        assert not any(w.bundle == second for w in plane.windows())
        taken = command(2, "B-1182")
        # A malformed command and a repetition change nothing and disturb no other agent.
        assert say(taken, b"{", b"x" * 9000, encode(taken)).fault is None
        wait_until(lambda: plane.phase(Phase.COMMITTED, second), "the commit in the new lot")
        wait_until(lambda: any(w.lot == "B-1182" and w.items for w in plane.windows()), "a window of the new lot")
        assert {(w.lot, w.variety) for w in plane.windows()} == {("", ""), ("B-1182", "gala")}
        assert {w.lot for w in plane.windows() if w.bundle == second} == {"B-1182"}
        wait_until(lambda: plane.reported.lot.begun, "the report")
        shown = plane.reported.lot
        assert (shown.lot, shown.source, shown.terms) == ("B-1182", LotSource.CONTROL_PLANE, "recipe")
        assert plane.reported.counters["refused_command.expired"] == 1
        assert plane.reported.counters["refused_message.malformed"] == 1
        assert plane.reported.counters["refused_message.oversize"] == 1

        process.kill()
        process.wait()
        process = agent(plane, tmp_path / "state")
        boots = {w.lot for w in plane.windows()}
        plane.reported = None
        wait_until(lambda: plane.reported and plane.reported.lot.begun, "the lot after a power cut")
        assert plane.reported.lot.lot == "B-1182"
        assert {w.lot for w in plane.windows()} == boots

        words = ["lot", "--lot", "C-9", "--variety", "fuji", "--state-dir", str(tmp_path / "state"), "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "edge_agent", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        said = json.loads(done.stdout)
        assert (said["taken_up"], said["lot"], said["variety"]) == (True, "C-9", "fuji")
        assert "the recipe's own" in said["terms"]
        wait_until(lambda: any(w.lot == "C-9" for w in plane.windows()), "a window of the operator's lot")
        assert plane.reported.lot.source is LotSource.OPERATOR
        # A delayed command that was issued before one that was applied.
        assert say(command(3, "old", late_s=55.0)).fault.code == "command.overtaken"
    finally:
        end(process)
    changes = [(e.facts["lot"], e.facts["source"]) for e in events(plane) if e.code == "lot.changed"]
    assert changes == [("B-1182", "control-plane"), ("C-9", "operator")]


@contextmanager
def control_plane(root: Path, broker: int) -> Iterator[tuple[Services, str]]:
    """The whole control plane, connected, with its URL."""
    services, port = make_services(root, port=broker), free_port()
    config = uvicorn.Config(create_app(services), port=port, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started and services.connection.connected, "the control plane")
        yield services, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.mark.slow
def test_the_command_names_a_lot_and_shows_the_agents_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real control plane, a real agent, an agent that takes no commands."""
    with embedded_broker(tmp_path) as broker, control_plane(tmp_path / "plane", broker) as (services, url):
        monkeypatch.setenv("SORTLINE_URL", url)
        words = ["--id", "line-1", "--broker", f"127.0.0.1:{broker}", "--state-dir", str(tmp_path / "state")]
        start = [sys.executable, "-m", "edge_agent", "run", *words, "--lanes", "1", "--items-per-s", "2"]
        named = [
            "agents",
            "lot",
            "line-1",
            "--lot",
            "B-1182",
            "--variety",
            "gala",
            "--reason",
            "truck 7",
            "--actor",
            "ida",
        ]
        assert main(named) == 1
        assert "agent.unknown" in capsys.readouterr().err
        for allowed in ("true", "false"):
            environment = os.environ | {"SORTLINE_AGENT__LOT_COMMANDS": allowed}
            with running(start, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL):
                wait_until(lambda: (found := services.board.one("line-1")) and found.lot, "the agent")
                if allowed == "true":
                    assert main([*named, "--json"]) == 0
                    answer = json.loads(capsys.readouterr().out)
                    assert (answer["state"], answer["lot"], answer["actor"]) == ("accepted", "B-1182", "ida")
                    wait_until(lambda: services.board.one("line-1").lot["begun"], "the lot to begin")
                else:
                    wait_until(lambda: services.board.one("line-1").link.connection == "live", "its second life")
                    assert main(named) == 3
                    assert "command.not_allowed" in capsys.readouterr().err
                    assert services.board.one("line-1").lot["lot"] == "B-1182"
            wait_until(lambda: services.board.one("line-1").link.connection == "offline", "its end")
        assert main(named) == 3
        assert "agent.not_connected" in capsys.readouterr().err
