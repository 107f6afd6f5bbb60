"""The installation kit that the tests of deployment share, made once per run."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"
"""A Python that other accounts can run; the one of the tests may lie in somebody's home."""


@pytest.fixture(scope="session")
def kit() -> Iterator[Path]:
    """A folder that installs everything without network."""
    folder = Path(tempfile.mkdtemp(prefix="sortline-kit-"))
    try:
        done = subprocess.run(
            ["bash", ROOT / "deploy/kit.sh", folder, "agent", "control-plane", "devices", "--python", PYTHON],
            check=False,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)
