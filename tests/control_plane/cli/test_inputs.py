"""Every input is checked before the first long step: one line with a code, the right exit status, no traceback."""

import errno
from pathlib import Path

import pytest

import control_plane.cli
from control_plane.cli import main
from control_plane.cli.output import new_directory, new_file
from models.errors import BundleError, InputError
from tests.simulators.tiny_bundle import tiny_bundle

NOWHERE = "/sys/sortline"
"""A folder that is read-only even for the superuser."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    tiny_bundle(folder / "b")
    return folder / "b"


def run(arguments: list[str], capsys) -> tuple[int, str]:
    status = main(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return status, lines[0].partition(":")[0]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--name", "../x", "--output", NOWHERE], "training.bad_option"),
        (["--name", "x", "--effort", "fast", "--output", NOWHERE], "training.bad_option"),
        (["--name", "x", "--precision", "fp16"], "training.bad_option"),
        (["--name", "x", "--seed", "-1"], "training.bad_option"),
        (["--name", "x", "--scalar", "Weight"], "training.bad_option"),
        (["--name", "x", "--scalar", "weight_g", "--no-scalars"], "training.bad_option"),
        (["--name", "x", "--output", NOWHERE], "output.not_writable"),
        (["--name", "x", "--output", "/"], "bundle.exists"),
    ],
)
def test_a_training_that_cannot_end_well_does_not_begin(options: list[str], code: str, tmp_path: Path, capsys) -> None:
    assert run(["train", "--data", str(tmp_path), *options], capsys) == (1, code)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--mean", "0.485;0.456"], "import.bad_settings"),
        (["--std", "a,b,c"], "import.bad_settings"),
        (["--scale", "nan"], "import.bad_settings"),
        (["--inputs", "sideways"], "import.bad_settings"),
        ([], "output.not_writable"),
    ],
)
def test_an_import_that_cannot_end_well_does_not_begin(options: list[str], code: str, bundle: Path, capsys) -> None:
    command = ["import-onnx", str(bundle / "model.onnx"), "--name", "x", "--classes", "a,b", "--data", str(bundle)]
    assert run([*command, "--output", NOWHERE, *options], capsys) == (1, code)


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["quantise", "--bundle", "BUNDLE", "--data", "BUNDLE", "--output", NOWHERE], 1, "output.not_writable"),
        (["recipe", "set", "--bundle", "BUNDLE", "--reason", "x", "--output", NOWHERE], 1, "output.not_writable"),
        (["recipe", "tune", "--bundle", "BUNDLE", "--plot", f"{NOWHERE}.svg"], 1, "output.not_writable"),
        (["bundle", "pack", "BUNDLE", f"{NOWHERE}.tar"], 1, "output.not_writable"),
        (["bundle", "pack", "BUNDLE", "/"], 1, "output.not_writable"),
        (["bundle", "unpack", "BUNDLE", "BUNDLE"], 1, "bundle.exists"),
        (["keys", "init", "--development", "--trust", NOWHERE], 2, "keys.not_written"),
        (["ca", "init", "--data-dir", NOWHERE], 1, "file.denied"),
        (["broker", "add", "a", "--credentials", f"{NOWHERE}.json", "--password-file", NOWHERE], 1, "file.denied"),
        (["config", "check", "--config", NOWHERE], 2, "config.unreadable"),
        (["rollouts", "create", "--model", "x", "--parameters", NOWHERE], 1, "rollout.bad_policy"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(
    arguments: list[str], status: int, code: str, bundle: Path, capsys
) -> None:
    assert run([str(bundle) if word == "BUNDLE" else word for word in arguments], capsys) == (status, code)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk.full"),
        (errno.EDQUOT, "disk.full"),
        (errno.EROFS, "file.denied"),
        (errno.EACCES, "file.denied"),
        (errno.EIO, "file.unusable"),
    ],
)
def test_an_error_of_the_operating_system_is_one_line(number: int, code: str, monkeypatch, capsys) -> None:
    def broken(**_options: object) -> None:
        raise OSError(number, "reason", "/some/[file]")

    monkeypatch.setattr(control_plane.cli, "app", broken)
    assert run([], capsys) == (1, code)


def test_trying_a_place_leaves_nothing_behind(tmp_path: Path) -> None:
    assert new_directory(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert new_file(tmp_path / "c.svg") == tmp_path / "c.svg"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to("/none")
    with pytest.raises(BundleError):
        new_directory(tmp_path / "link")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        new_directory(tmp_path / "file" / "inside")


def test_warnings_and_files_left_out_are_shown(capsys) -> None:
    from control_plane.cli.output import say
    from control_plane.cli.train import metrics_table

    facts = {
        "warnings": ["few [items]"],
        "left_out": {"it cannot be decoded": 5, "its ending is unknown": 1},
        "left_out_examples": {
            "it cannot be decoded": [f"a/{number}.jpg" for number in range(4)],
            "its ending is unknown": ["b.gif"],
        },
    }
    summary = {"bundle": "0" * 64, "dataset": facts}
    say(summary, as_json=False, table=metrics_table)
    out = capsys.readouterr().out
    assert "warning: few [items]" in out
    assert "left out: 5 files, it cannot be decoded: a/0.jpg, a/1.jpg, a/2.jpg, ..." in out
    assert "left out: 1 file, its ending is unknown: b.gif" in out
