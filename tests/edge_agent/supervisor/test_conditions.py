"""Conditions stand until they recover: a weak ejector stays weak in the report after its event has passed."""

import socket
from pathlib import Path

import msgspec
import pytest

from edge_agent.cli.commands import main
from edge_agent.supervisor.conditions import Conditions
from edge_agent.supervisor.connection_file import Connection, connection_file
from edge_agent.supervisor.report import box_facts
from models.messages import MAX_CONDITIONS, Fault, Reported, decode, encode


def fault(code: str, message: str = "") -> Fault:
    return Fault(code=code, message=message, at_ms=1)


def codes(conditions: Conditions) -> list[str]:
    return [found.code for found in conditions.standing]


def test_a_weak_ejector_stands_until_that_ejector_recovers() -> None:
    conditions = Conditions()
    assert conditions.note(fault("ejector.weak"), "reject 0")
    assert conditions.note(fault("ejector.slow"), "reject 1")
    assert conditions.note(fault("ejector.recovered"), "reject 1")
    assert codes(conditions) == ["ejector.weak"]
    assert conditions.note(fault("ejector.recovered"), "reject 0")
    assert conditions.standing == ()


def test_only_the_newest_fault_of_a_camera_stands() -> None:
    conditions = Conditions()
    for code in ("camera.stalled", "camera.absent"):
        conditions.note(fault(code))
    conditions.note(fault("line.fail_safe"))
    assert codes(conditions) == ["camera.absent", "line.fail_safe"]
    conditions.note(fault("camera.recovered"))
    conditions.note(fault("line.fail_safe_over"))
    assert conditions.standing == ()


def test_events_without_an_end_never_stand_and_an_end_without_a_beginning_is_ignored() -> None:
    conditions = Conditions()
    assert not conditions.note(fault("bundle.swapped"))
    assert not conditions.note(fault("camera.recovered"))
    assert conditions.standing == ()


def test_a_new_line_process_clears_its_own_conditions_but_not_the_identitys() -> None:
    conditions = Conditions()
    for code in ("camera.absent", "ejector.weak", "recipe.over_budget", "identity.shared"):
        conditions.note(fault(code))
    conditions.line_gone()
    assert codes(conditions) == ["identity.shared"]
    conditions.note(fault("identity.alone"))
    assert conditions.standing == ()


def test_a_report_with_every_condition_stays_small() -> None:
    conditions = Conditions()
    for lane in range(40):
        conditions.note(fault("ejector.weak", "x" * 600), f"reject {lane}")
    assert len(conditions.standing) == MAX_CONDITIONS
    report = Reported(boot_id="0" * 16, at_ms=1, conditions=conditions.standing)
    assert len(encode(report)) < 8 * 1024


def test_a_report_says_which_box_it_comes_from() -> None:
    facts = box_facts("10.0.0.7")
    assert (facts["host"], facts["address"]) == (socket.gethostname(), "10.0.0.7")
    assert "address" not in box_facts("")
    report = Reported(boot_id="0" * 16, at_ms=1, hardware=facts)
    assert decode(encode(report), Reported) == report


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (None, "not known"),
        (Connection(connected=True, at_ms=1_790_000_000_000, broker="b:1883"), "b:1883, connected since 2026-"),
        (
            Connection(at_ms=1_790_000_000_000, broker="b:1883", code="broker.refused", message="b:1883: refused"),
            "broker.refused: b:1883: refused",
        ),
    ],
)
def test_status_says_whether_there_is_a_broker_and_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: Connection | None, said: str
) -> None:
    (tmp_path / "lock").touch()  # an agent that never had a bundle has no other file
    if kept is not None:
        connection_file(tmp_path).save(kept)
    assert main(["status", "--state-dir", str(tmp_path), "--json"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out)
    assert said in found["broker"]
    assert found["running"] is False
