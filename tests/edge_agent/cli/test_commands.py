"""The command line refuses before it works: one line with a code, the right exit status, never a traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.cli import options
from edge_agent.cli.commands import main


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which a long step begins before the inputs were checked."""

    def too_late(*_: object, **__: object) -> None:
        pytest.fail("a long step began before the inputs were checked")

    monkeypatch.setattr("edge_agent.devices.hardware.open_hardware", too_late)
    monkeypatch.setattr("edge_agent.offline.collect.collect", too_late)
    monkeypatch.setattr("edge_agent.calibration.calibrate.calibrate", too_late)
    monkeypatch.setattr("edge_agent.offline.contact_sheet.write_sheet", too_late)
    monkeypatch.setattr("edge_agent.identity.enrolment.enrol", too_late)
    monkeypatch.setattr("edge_agent.trust.verifier.verify_now", too_late)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    return status, said.err.partition(": ")[0]


def test_an_output_that_is_in_the_way_is_refused_before_the_line_is_watched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "x"
    for arguments in (
        ("calibrate", "--item-mm", 75, "--output", below),
        ("calibrate", "--item-mm", 75, "--output", tmp_path / "a.toml", "--overlay", below),
        ("collect", "--output", below),
        ("picture", "--bundle", tmp_path, "--output", below),
        ("picture", "--bundle", tmp_path, "--output", tmp_path / "none" / "line.png"),
        ("picture", "--bundle", tmp_path, "--output", tmp_path),
        ("enrol", "--token", "t", "--control-plane", "https://h", "--state-dir", below),
    ):
        assert refused(capsys, *arguments) == (1, "output.not_writable"), arguments


@pytest.mark.parametrize("fault", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_read_only_or_full_place_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    class Refusing:
        def __init__(self, **_: object) -> None:
            raise OSError(fault, os.strerror(fault), str(tmp_path))

    monkeypatch.setattr("edge_agent.cli.options.tempfile.TemporaryFile", Refusing)
    codes = {errno.EROFS: "output.not_writable", errno.ENOSPC: "disk.full", errno.EACCES: "output.not_writable"}
    for arguments in (
        ("calibrate", "--item-mm", 75, "--output", tmp_path / "geometry.toml"),
        ("collect", "--output", tmp_path / "views"),
        ("picture", "--bundle", tmp_path, "--output", tmp_path / "line.png"),
        ("enrol", "--token", "t", "--control-plane", "https://h", "--state-dir", tmp_path / "state"),
    ):
        assert refused(capsys, *arguments) == (1, codes[fault])


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--broker", "http://h"),
        ("run", "--broker", "h:99999"),
        ("run", "--record", "DIR"),
        ("run", "--verdicts", "FILE"),
        ("run", "--lanes", "99"),
        ("run", "--broker", "mqtts://h"),
        ("run", "--config", "no-such-file.toml"),
        ("collect", "--output", "x", "--defect-share", "2"),
    ],
)
def test_wrong_usage_is_exit_status_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, code = refused(capsys, *arguments)
    assert (status, code.partition(".")[0]) == (2, "config")
    assert list(tmp_path.iterdir()) == [], "what is refused leaves nothing behind"


@pytest.mark.parametrize(
    "arguments",
    [
        ("collect", "--output", "x", "--items", "0"),
        ("calibrate", "--frames", "-1"),
        ("run", "--seconds", "nan"),
        ("run", "--record-quota-mb", "0"),
        ("picture", "--bundle", "b", "--seconds", "inf"),
        ("selftest", "b", "--budget-ms", "0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_the_parser(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "is not a number of at least" in capsys.readouterr().err


def test_a_bundle_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts, recording = tmp_path / "verdicts", tmp_path / "recording"
    status, code = refused(capsys, "run", "--bundle", tmp_path, "--verdicts", verdicts, "--record", recording)
    assert (status, code.partition(".")[0]) == (1, "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("import", tmp_path, "--state-dir", tmp_path / "state")
    assert refused(capsys, *arguments) == (1, "import.not_an_export")


def test_status_of_a_read_only_folder_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.json").write_text("rubbish")
    assert refused(capsys, "status", "--state-dir", tmp_path) == (1, "state.unreadable")
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_checks_leave_nothing_behind(tmp_path: Path) -> None:
    options.check_file(tmp_path / "new.txt")
    options.check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_agent", "config", "show"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
