"""A safe state that was asked for: whatever the camera sees, everything is ejected, nothing is, or the belt stops."""

from collections import Counter
from itertools import pairwise

import pytest

from edge_agent.interfaces import Lane, LineGeometry
from edge_agent.line.fail_safe import ACTIONS, FailSafe
from edge_agent.line_config import FailSafeConfig
from models.messages import SafeState


class Belt:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def stop(self, reason: str) -> None:
        self.asked.append(reason)

    def run(self) -> None:
        self.asked.append("run")


class Queue:
    """Accepts every shot and keeps it in a list."""

    class rules:  # noqa: N801  stands for the queue's own
        close = "hold"
        pitch_mm = 0.0

    def __init__(self) -> None:
        self.shots: list[tuple[int, str, float]] = []

    def schedule(self, shot: object) -> bool:
        self.shots.append((shot.lane, shot.outlet, shot.target_mm))  # type: ignore[attr-defined]
        return True


class Counts:
    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def camera(self, name: str, more: int = 1) -> None:
        self.found[name] += more


def guarded(safe_state: SafeState) -> tuple[FailSafe, Queue, Belt, list[str]]:
    queue, belt, said = Queue(), Belt(), []
    geometry = LineGeometry(640, 340, 0.625, (Lane(0, 170), Lane(170, 340)), {"reject": 700.0})
    found = FailSafe(
        FailSafeConfig(default="pass"),
        geometry,
        queue,  # type: ignore[arg-type]
        Counts(),  # type: ignore[arg-type]
        belt,
        lambda action, fault: said.append(f"{action} {fault}"),
        requested=ACTIONS.get(safe_state),
    )
    for step in range(41):
        found.saw(step * 25.0)  # the camera sees well all the time
        found.step("", step * 0.025, step * 25.0)
    return found, queue, belt, said


def test_eject_all_hits_every_stretch_of_belt_on_every_lane_though_the_camera_is_good() -> None:
    _, queue, belt, said = guarded(SafeState.EJECT_ALL)
    for lane in (0, 1):
        places = [mm for found, outlet, mm in queue.shots if found == lane and outlet == "reject"]
        gaps = [b - a for a, b in pairwise(places)]
        assert len(places) > 20
        assert max(gaps) <= 30.0, "closer than the smallest item is long"
    assert belt.asked == []
    assert said == ["eject-all line.safe_state"]


def test_pass_all_ejects_nothing() -> None:
    found, queue, belt, _ = guarded(SafeState.PASS_ALL)
    assert (found.action, queue.shots, belt.asked) == ("pass", [], [])


def test_stop_stops_the_belt_once_and_a_camera_that_recovers_does_not_start_it() -> None:
    found, queue, belt, _ = guarded(SafeState.STOP)
    for fault in ("camera.frozen", "camera.frozen", ""):
        found.step(fault, 2.0, 1000.0)
    assert (queue.shots, belt.asked) == ([], ["line.safe_state"])


@pytest.mark.parametrize("fault", ["", "camera.black"])
def test_a_request_outweighs_what_is_configured_for_a_fault(fault: str) -> None:
    found, _, _, _ = guarded(SafeState.EJECT_ALL)
    found.step(fault, 2.0, 1025.0)
    assert found.action == "eject-all", "the configuration says pass"


def test_without_a_request_a_good_camera_costs_nothing() -> None:
    found, queue, belt, said = guarded(SafeState.NONE)
    assert (found.action, queue.shots, belt.asked, said) == ("", [], [], [])
