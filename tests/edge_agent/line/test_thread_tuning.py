"""Thread counts are measured, chosen by a rule, and said."""

import queue
from pathlib import Path

import cv2
import pytest

from edge_agent.line.loader import Loader
from edge_agent.line.thread_tuning import ThreadTiming, choose, facts, measure, thread_counts, tune_model, tune_opencv
from edge_agent.line_protocol import FromLine, Load, LoadFailed, Tuned
from tests.simulators.tiny_bundle import tiny_bundle


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        ([(1, 4.0, 4.0), (2, 2.2, 4.1)], 2),  # shorter for free
        ([(1, 4.0, 4.0), (2, 2.2, 5.0)], 1),  # shorter, but dear
        ([(1, 4.0, 4.0), (2, 3.5, 4.0)], 1),  # hardly shorter
        ([(1, 9.0, 4.4), (2, 5.0, 4.0), (4, 3.0, 4.39)], 4),
        ([(1, 4.0, 4.0), (2, 4.0, 4.0)], 1),  # a tie goes to fewer
    ],
)
def test_the_shortest_tail_among_the_thrifty_is_taken(trials: list[tuple[int, float, float]], chosen: int) -> None:
    assert choose([ThreadTiming(threads, p99, cpu, 10) for threads, p99, cpu in trials]).threads == chosen


def test_counts_follow_the_processors() -> None:
    assert [thread_counts(cores) for cores in (1, 2, 3, 6, 64)] == [[1], [1, 2], [1, 2], [1, 2, 4], [1, 2, 4, 8]]
    assert 1 in thread_counts()


class Machine:
    """A machine whose time passes with the work that is done on it."""

    def __init__(self, wall_s: dict[int, float], cpu_s: dict[int, float]) -> None:
        self.wall_s, self.cpu_s = wall_s, cpu_s
        self.wall = self.cpu = 0.0
        self.runs: list[int] = []

    def work_for(self, count: int):
        def work() -> None:
            self.wall += self.wall_s[count]
            self.cpu += self.cpu_s[count]
            self.runs.append(count)

        return work


def test_counts_are_measured_in_turns_until_the_budget_is_spent() -> None:
    machine = Machine({1: 0.004, 2: 0.002}, {1: 0.004, 2: 0.0042})
    trials = measure(machine.work_for, [1, 2], 0.1, wall=lambda: machine.wall, cpu=lambda: machine.cpu)
    assert [(t.threads, round(t.p99_ms, 6), round(t.cpu_ms, 6)) for t in trials] == [(1, 4.0, 4.0), (2, 2.0, 4.2)]
    assert machine.runs == [1, 2] * (len(machine.runs) // 2)
    assert 0.1 <= machine.wall < 0.11
    assert choose(trials).threads == 2


def test_a_slow_machine_is_measured_three_times_at_least() -> None:
    machine = Machine({1: 5.0}, {1: 5.0})
    (trial,) = measure(machine.work_for, [1], 0.1, wall=lambda: machine.wall, cpu=lambda: machine.cpu)
    assert trial.runs == 3


def test_on_this_machine_both_libraries_are_measured(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "b")
    trials = tune_model(tmp_path / "b", None)
    assert [trial.threads for trial in trials] == thread_counts()
    assert all(trial.p99_ms > 0.0 and trial.runs >= 3 for trial in trials)
    before = cv2.getNumThreads()
    try:
        said = facts("opencv", tune_opencv())
        assert said["opencv_threads"] == str(cv2.getNumThreads())
        assert said["opencv_trials"].startswith("1: p99 ")
    finally:
        cv2.setNumThreads(before)


def test_a_line_measures_with_its_first_bundle_and_says_so_once(tmp_path: Path) -> None:
    bundles = [tiny_bundle(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    said: queue.Queue[FromLine] = queue.Queue()
    loader = Loader(0, said.put, lambda: None)
    for name, bundle in zip("ab", bundles, strict=True):
        loader.load(Load(digest=bundle.digest, directory=str(tmp_path / name)))
    tuned = said.get_nowait()
    assert isinstance(tuned, Tuned)
    assert tuned.facts["onnx_threads"] == str(loader.threads)
    assert said.empty()
    assert loader.judge[0].judge.digest == bundles[1].digest


def test_a_bundle_that_is_broken_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    said: queue.Queue[FromLine] = queue.Queue()
    Loader(0, said.put, lambda: None).load(Load(digest="00" * 32, directory=str(tmp_path / "nothing")))
    assert isinstance(said.get_nowait(), LoadFailed)


def test_a_configured_count_is_not_measured(tmp_path: Path) -> None:
    said: queue.Queue[FromLine] = queue.Queue()
    assert Loader(3, said.put, lambda: None).threads_for(tmp_path / "nothing", None) == 3
    assert said.empty()
