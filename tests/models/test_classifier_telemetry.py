"""ONNX Runtime sends nothing: no look-up, no connection, no file, whichever module of the product loads it first."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "onnxruntime"
DOOR = "models/classifier.py"
AFTER_THE_DOOR = {"control_plane/training/quantise.py"}
"""Modules that import a part of the library themselves, below an import of the door."""
SUPPRESSES = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")
"""The library keeps silent under continuous integration by itself: the test must not be such an environment."""
SESSION = """
import pathlib, {module}, onnxruntime, time
graph = pathlib.Path(onnxruntime.__file__).parent / "datasets" / "mul_1.onnx"
onnxruntime.InferenceSession(graph.read_bytes(), providers=["CPUExecutionProvider"])
time.sleep({wait_s})
"""

pytestmark = pytest.mark.skipif(
    shutil.which("unshare") is None or shutil.which("strace") is None, reason="unshare and strace are not installed"
)


def network_calls(module: str, home: Path, trace: Path, wait_s: float = 0.0) -> list[str]:
    """Every call that leads out of the process while it loads a graph, in a namespace with nothing but loopback."""
    environment = {name: value for name, value in os.environ.items() if name not in SUPPRESSES}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment.pop("XDG_CACHE_HOME", None)
    code = SESSION.format(module=module, wait_s=wait_s)
    trace_calls = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-e",
        "trace=socket,connect,sendto,sendmsg,sendmmsg",
        "-o",
        str(trace),
    ]
    command = ["unshare", "--map-root-user", "--net", *trace_calls, sys.executable, "-B", "-c", code]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return trace.read_text(encoding="utf-8", errors="replace").splitlines()


def leaves(calls: list[str]) -> list[str]:
    """Those calls that open a socket of an internet family, or ask the machine's name service."""
    return [call for call in calls if re.search(r"AF_INET|AF_NETLINK|nscd|resolve", call)]


@pytest.mark.parametrize(
    ("module", "wait_s"),
    [
        ("models.classifier", 0.0),
        pytest.param("edge_agent.line.process", 4.0, marks=pytest.mark.slow),
        pytest.param("control_plane.training.quantise", 4.0, marks=pytest.mark.slow),
    ],
)
def test_no_look_up_and_no_file_when_a_graph_is_loaded(module: str, wait_s: float, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert not leaves(network_calls(module, home, tmp_path / "trace", wait_s))
    assert not list(home.rglob("*")), "nothing is left under HOME"


def test_the_check_sees_what_the_library_does_by_itself(tmp_path: Path) -> None:
    """Without the door the library leaves files: if this fails, the tests above prove nothing on this version."""
    home = tmp_path / "home"
    home.mkdir()
    network_calls(LIBRARY, home, tmp_path / "trace")
    assert [path for path in home.rglob("*") if path.is_file()]


def test_only_the_door_imports_the_library() -> None:
    found = set()
    for package in ("models", "edge_agent", "control_plane"):
        for path in sorted((ROOT / package).rglob("*.py")):
            place = str(path.relative_to(ROOT))
            names = [
                name
                for node in ast.parse(path.read_text(encoding="utf-8")).body
                for name in (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
            ]
            loads = [i for i, name in enumerate(names) if name.partition(".")[0] == LIBRARY]
            if loads:
                found.add(place)
            if loads and place != DOOR:
                assert "models.classifier" in names[: loads[0]], (
                    f"{place} loads the library before its telemetry is off"
                )
    assert found == {DOOR} | AFTER_THE_DOOR
