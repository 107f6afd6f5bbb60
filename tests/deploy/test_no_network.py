"""The whole product in a network namespace with nothing but loopback: it works, and asks for nothing outside."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.test_classifier_telemetry import SUPPRESSES

ROOT = Path(__file__).parents[2]
CALLS = "trace=connect,sendto,sendmsg,sendmmsg"
DEMO = (
    "ip link set lo up && exec strace -f --seccomp-bpf -qq -e {calls} -o {trace} {python} -m control_plane demo {flags}"
)
FLAGS = "--seconds 10 --agents 1 --items 120 --port 0"


@pytest.mark.slow
@pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("unshare", "strace", "ip")), reason="unshare, strace and ip"
)
def test_training_delivery_and_sorting_ask_for_nothing_outside(tmp_path: Path) -> None:
    home, trace = tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in SUPPRESSES}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    environment.pop("XDG_CACHE_HOME", None)
    script = DEMO.format(calls=CALLS, trace=trace, python=sys.executable, flags=FLAGS)
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", "sh", "-c", script],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    calls = [line for line in trace.read_text(encoding="utf-8", errors="replace").splitlines() if "AF_INET" in line]
    assert calls, "the parts of the product speak to each other over loopback"
    outside = [
        line
        for line in calls
        if not re.search(r'inet_addr\("127\.|inet_pton\(AF_INET6, "::1"', line) or "htons(53)" in line
    ]
    assert not outside, outside[:5]
    assert not list(home.rglob("*")), "nothing is left under HOME"
