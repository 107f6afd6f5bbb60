"""The commands of an installation that has only one side's libraries."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_without_its_libraries_sortline_explains_itself() -> None:
    """On a box from `agent.lock` the command names the right one, without traceback, with the set-up exit status."""
    code = "import sys; sys.modules['typer'] = None; from control_plane.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "sortline-agent" in done.stderr
    assert "typer is not installed" in done.stderr


def test_a_mistake_of_our_own_is_not_hidden() -> None:
    code = "import sys; sys.modules['control_plane.cli'] = None; from control_plane.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in done.stderr


def test_the_commands_are_declared_where_they_are() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {
        "sortline": "control_plane.__main__:main",
        "sortline-agent": "edge_agent.cli.commands:main",
    }
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert name in (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
