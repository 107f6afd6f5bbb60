"""The systemd units: systemd reads them without complaint, they confine, and they name only what the product has."""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_agent.cli.commands import _parser
from edge_agent.config import load_agent_config

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
# From 0 (confined) to 10 (not at all); systemd calls up to 2 "safe", 5 "medium", 9.6 "unsafe". An agent needs devices
# and real-time priority, the others neither.
EXPOSURE = {"sortline-agent.service": 2.0}
EXPOSURE_OF_OTHERS = 1.7
NOTIFY = {"sortline-agent", "sortline-control-plane", "sortline-worker@", "sortline-broker"}

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def settings(unit: Path) -> dict[str, list[str]]:
    """Every setting of a unit's service section, in order; a key may come several times."""
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(unit.read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for line in unit.read_text(encoding="utf-8").splitlines():
        key, given, value = line.partition("=")
        if given and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def placed(unit: Path, folder: Path) -> Path:
    """A copy whose programs exist, under the name of an instance where the unit is a template."""
    for name in ("agent/bin/sortline-agent", "control-plane/bin/sortline"):
        program = folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n", encoding="utf-8")
        program.chmod(0o755)
    text = unit.read_text(encoding="utf-8").replace("/opt/sortline", str(folder))
    copy = folder / unit.name.replace("@.", "@1.")
    copy.write_text(text.replace("/usr/sbin/mosquitto", "/bin/true"), encoding="utf-8")
    return copy


def analyse(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SYSTEMD_COLORS": "0", "LC_ALL": "C"}
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False, env=environment, timeout=60
    )


def test_there_are_units_for_every_process() -> None:
    assert {unit.stem for unit in UNITS} == NOTIFY | {"sortline-mosquitto"}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_reads_the_unit(unit: Path, tmp_path: Path) -> None:
    done = analyse("verify", str(placed(unit, tmp_path)))
    said = [line for line in done.stderr.splitlines() if unit.stem.rstrip("@") in line]
    assert not said, said
    assert done.returncode == 0, done.stderr


def test_systemd_would_complain_of_a_mistake(tmp_path: Path) -> None:
    unit = placed(UNITS[0], tmp_path)
    unit.write_text(unit.read_text(encoding="utf-8").replace("ProtectSystem=", "ProtectSistem="), encoding="utf-8")
    assert "ProtectSistem" in analyse("verify", str(unit)).stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_service_is_confined(unit: Path, tmp_path: Path) -> None:
    done = analyse("security", "--offline=true", "--no-pager", str(placed(unit, tmp_path)))
    score = re.search(r"exposure level for .*: ([0-9.]+)", done.stdout)
    assert score is not None, done.stdout + done.stderr
    assert float(score[1]) <= EXPOSURE.get(unit.name, EXPOSURE_OF_OTHERS)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_hung_or_dead_service_comes_back_and_leaves_no_core(unit: Path) -> None:
    found = settings(unit)
    assert found["Restart"] == ["always"]
    assert found["StartLimitIntervalSec"] == ["0"], "it is started again for ever"
    assert found["LimitCORE"] == ["0"]
    assert found["User"][0].startswith("sortline")
    if unit.stem in NOTIFY:
        assert found["Type"] == ["notify"]
        assert int(found["WatchdogSec"][0]) >= 30
    if unit.name != "sortline-mosquitto.service" and unit.name != "sortline-broker.service":
        assert any("ORT_DISABLE_TELEMETRY=1" in line for line in found["Environment"])


def test_the_line_outlives_its_supervisor_and_may_use_its_priority() -> None:
    found = settings(ROOT / "deploy/systemd/sortline-agent.service")
    assert found["KillMode"] == ["process"]
    source = (ROOT / "edge_agent/ejection/queue.py").read_text(encoding="utf-8")
    needed = re.search(r"sched_param\((\d+)\)", source)
    assert needed is not None
    assert int(found["LimitRTPRIO"][0]) >= int(needed[1])
    assert "RestrictRealtime" not in found


def test_the_agent_restarts_its_line_before_the_old_one_ends() -> None:
    found = settings(ROOT / "deploy/systemd/sortline-agent.service")
    orphan_s = load_agent_config(None, {}, environment={}).line.orphan_s
    assert float(found["RestartSec"][0]) * 5 <= orphan_s


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_command_exists(unit: Path) -> None:
    program, *words = settings(unit)["ExecStart"][0].split()
    if program.endswith("/sortline-agent"):
        _parser().parse_args(words)
    elif program.endswith("/sortline"):
        check_sortline(words)
    else:
        assert program == "/usr/sbin/mosquitto"


def check_sortline(words: list[str]) -> None:
    """Parses a command line of `sortline` down to its last subcommand, without running it."""
    from typer.main import get_command

    from control_plane.cli import app

    command, context = get_command(app), None
    while True:
        context = command.make_context(command.name or "sortline", list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        _, command, words = command.resolve_command(context, rest)
