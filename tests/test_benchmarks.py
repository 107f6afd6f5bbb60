"""The benchmarks measure what they say: known identities, known misses, routing that can fail, plots that parse."""

import json
import math
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from rich.console import Console

from benchmarks import routing
from benchmarks.figures import Figures
from benchmarks.fleet import Line
from benchmarks.flood import Served, p99
from benchmarks.plots import Chart, render
from benchmarks.tracking import Identities
from edge_agent.simulation.line import SimulationConfig
from edge_agent.vision.judge import Judge
from models.messages import decode_batch, decode_packed
from models.windows import Window
from tests.simulators.processes import free_port, wait_until
from tests.simulators.tiny_bundle import tiny_bundle

TWO_LANES = SimulationConfig(apples=8, varieties=("golden",), seed=5)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return Judge(directory)


def test_identity_figures_of_a_case_counted_by_hand() -> None:
    found = Identities()
    # Two items over four frames; item 1 changes its id once, item 2 is missed once, one box belongs to nothing.
    found.add([(1, 0, 100.0), (2, 1, 100.0)], [(7, 0, 101.0), (8, 1, 99.0)])
    found.add([(1, 0, 200.0), (2, 1, 200.0)], [(7, 0, 201.0)])
    found.add([(1, 0, 300.0), (2, 1, 300.0)], [(9, 0, 301.0), (8, 1, 299.0), (5, 0, 600.0)])
    found.add([(1, 0, 400.0), (2, 1, 400.0)], [(9, 0, 401.0), (8, 1, 399.0)])
    figures = found.figures()
    assert figures["switches"] == 1
    assert figures["misses"] == 1
    assert figures["false_positives"] == 1
    assert figures["mota"] == pytest.approx(1.0 - 3 / 8)
    # Best pairing: item 1 with either id (2 frames), item 2 with id 8 (3 frames): 2 * 5 / (8 + 8).
    assert figures["idf1"] == pytest.approx(10 / 16)
    assert figures["items_with_several_ids"] == 1


def test_a_missed_bound_and_a_figure_that_is_no_number_fail_the_run(tmp_path: Path) -> None:
    figures = Figures(Console(quiet=True))
    rows = [("fine", 1.0, "ms"), ("slow", 3.0, "ms"), ("unknown", float("nan"), "ms")]
    figures.table("stage", rows, {"fine": ("<=", 2.0), "slow": ("<=", 2.0), "unknown": ("<=", 2.0)})
    assert [line.partition(" is ")[0] for line in figures.missed] == ["stage: slow", "stage: unknown"]
    figures.write(tmp_path / "figures.json", {})
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["figures"]["stage"] == {"fine": 1.0, "slow": 3.0, "unknown": None}
    with pytest.raises(ValueError, match="without a figure"):
        figures.table("stage", rows, {"misspelt": ("<=", 2.0)})


def test_a_missing_value_counts_as_later_than_any_other() -> None:
    came = [float(k) for k in range(1, 101)]
    assert p99(came) == 99.0
    assert p99(came[:99], 1) == 99.0
    assert math.isinf(p99(came[:98], 2))
    assert math.isnan(p99([]))


def test_a_loop_that_is_held_up_is_seen_to_be_late() -> None:
    async def busy(_scope: object, _receive: object, send: Callable[[dict[str, object]], Awaitable[None]]) -> None:
        time.sleep(0.3)  # noqa: ASYNC251  the defect that is looked for
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    port = free_port()
    with Served(busy, port, lifespan="off") as served:
        start_s = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=300) as answer:
            assert answer.status == 204
        wait_until(lambda: served.late_ms and served.late_ms[-1][0] > start_s + 0.35, "the next look")
        assert max(served.between(start_s, math.inf)) >= 250.0


def test_plots_are_whole_documents_even_of_odd_values() -> None:
    chart = Chart("a < b & c", "s", "ms", [("one", [(0.0, 1.0), (1.0, float("nan")), (2.0, 0.5)]), ("none", [])], 2.0)
    found = ET.fromstring(render([chart, chart], "5 % > 4 %"))
    assert found.tag.endswith("svg")
    assert "nan" not in ET.tostring(found, encoding="unicode")


@pytest.mark.slow
def test_routing_is_right_and_falls_when_the_valves_are_late(judge: Judge) -> None:
    good = routing.run(TWO_LANES, judge, 260)
    assert len(good.settled) > 90
    assert good.routed_right >= 0.99 * len(good.settled)
    assert good.strangers == 0
    # A valve that takes 60 ms is not compensated at 1 m/s: its items ride past, and the figure must show it.
    slow = routing.run(msgspec.structs.replace(TWO_LANES, valve_delay_ms=60.0), judge, 260)
    assert slow.routed_right < 0.95 * len(slow.settled)


@pytest.mark.slow
def test_a_second_pass_carries_the_same_items_rolled_otherwise(judge: Judge) -> None:
    first = routing.run(TWO_LANES, judge, 150)
    again = routing.run(msgspec.structs.replace(TWO_LANES, again=1, shifted_lanes=1), judge, 150)

    def items_of(found: routing.Passed, lane: int) -> list[tuple[str, float]]:
        order = sorted((i for i in found.items.values() if i.lane == lane), key=lambda i: i.item_mm)
        return [(item.apple.name, item.phase) for item in order]

    before, after = items_of(first, 0), items_of(again, 1)
    assert len(before) > 20
    assert [name for name, _ in before] == [name for name, _ in after][: len(before)]
    assert all(a[1] != b[1] for a, b in zip(before, after, strict=False))


def test_the_windows_of_the_fleet_benchmark_have_the_shape_of_a_real_lines() -> None:
    line = Line(3, seed=1)
    window = decode_packed(line.window(), Window)
    window.check()
    assert window.feature_counts().shape == (21, 16)
    assert 1800 < len(line.window()) < 2600, "bytes; those of a real line with two lanes were 2,138 to 2,183"
    first, second = (decode_batch(line.batch(2)) for _ in range(2))
    assert [record.seq for record in (*first.records, *second.records)] == [0, 1, 2, 3]
