"""Charts are SVG that says what the figures say."""

import math
import re
from datetime import UTC, datetime, timedelta

import pytest

from control_plane.pages.charts import lines, shares

START = datetime(2026, 10, 1, 6, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def test_shares_stack_from_nothing_to_all() -> None:
    picture = str(
        shares([(at(0), {}), (at(10), {"sound": 3, "rot": 1}), (at(20), {"rot": 2})], ["sound", "rot"], marks=[])
    )
    bars = [tuple(map(float, bar)) for bar in re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', picture)]
    full = 200 - 22 - 6
    assert [height for _, height in bars] == pytest.approx([0.75 * full, 0.25 * full, full], abs=0.1)
    assert bars[0][0] == pytest.approx(6 + 0.25 * full, abs=0.1), "the good class is at the bottom"
    assert bars[1][0] == pytest.approx(6, abs=0.1)


def test_a_window_without_items_leaves_a_gap() -> None:
    points = [(at(0), {"sound": 1}), (at(10), {"sound": 1}), (at(20), {}), (at(30), {"sound": 1})]
    assert str(shares(points, ["sound"], marks=[])).count("<rect") == 2


def test_both_charts_of_a_page_share_their_time_axis() -> None:
    values = [(at(0), math.nan), (at(50), 3.0), (at(100), 4.0)]
    counts = [(when, {"sound": 1}) for when, _ in values]
    mark = [(at(50), "lot")]
    places = [
        re.findall(r'class="mark" x1="([\d.]+)"', str(chart))
        for chart in (lines([("p50", values)], budget=10.0, marks=mark), shares(counts, ["sound"], marks=mark))
    ]
    assert places[0] == places[1] != []


def test_foreign_text_is_escaped_and_missing_data_is_stated() -> None:
    points = [(at(0), 1.0), (at(10), 2.0)]
    assert "<b>" not in str(lines([("p50", points)], budget=1.0, marks=[(at(5), "<b>")]))
    assert "Not enough" in str(lines([("p50", points[:1])], budget=1.0, marks=[]))
    assert "Not enough" in str(shares([(at(0), {"a": 1})], ["a"], marks=[]))
