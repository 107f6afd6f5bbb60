"""Pages of alarms: what they show, what hostile evidence cannot do, and which pictures they give out."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from control_plane.alarms.raising import Look
from control_plane.app import create_app
from control_plane.database.engine import writing
from control_plane.database.tables.agents import EventRow
from control_plane.database.tables.columns import utc_now
from control_plane.detection.finding import Cause, Severity
from control_plane.pages.evidence_charts import dirt_map, grid_of, histogram, other_facts
from control_plane.registry.versions import register
from control_plane.services import Services
from models.bundle import sha256
from models.messages import Phase, encode
from models.topics import Channel
from tests.control_plane.alarms.test_raising import finding
from tests.control_plane.fleet.test_fleet import BOOT, batch, reported, say, window
from tests.simulators.plane import make_services
from tests.simulators.tiny_bundle import tiny_bundle

GRID = [[0.9 if row < 3 and column > 12 else 0.0 for column in range(16)] for row in range(12)]


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    found = make_services(tmp_path / "plane")
    yield found
    found.engine.dispose()


@pytest.fixture
def client(services: Services) -> TestClient:
    return TestClient(create_app(services), base_url="http://127.0.0.1")


def rise(services: Services, **changes: Any) -> None:
    with writing(services.engine) as session:
        services.alarms.watcher.register.apply(session, Look([finding(**changes)], frozenset(), utc_now()))
        session.commit()


def test_the_page_of_a_dirty_lens_shows_where_and_what_to_do(client: TestClient, services: Services) -> None:
    rise(services, evidence={"dirt": GRID, "before": {"sharpness": 6.41}, "now": {"sharpness": 6.12}})
    text = client.get("/alarms/1").text
    assert "Wipe the lens of line-1." in text
    places = {(x, y) for x, y in re.findall(r'class="dirt" x="([\d.]+)" y="([\d.]+)"', text)}
    assert places == {(f"{20.0 * c:.1f}", f"{20.0 * r:.1f}") for r in range(3) for c in (13, 14, 15)}
    assert re.search(r"sharpness</td><td class=\"n\">6.41</td><td class=\"n\"><b>6.12", text)
    assert 'data-act="acknowledge"' in text


def test_histograms_show_the_hour_before_and_what_came_since(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    digest = tiny_bundle(tmp_path / "b").digest
    with writing(services.engine) as session:
        register(session, services.store, tmp_path / "b", actor="t", now=utc_now())
        session.commit()
    profile = services.board.profile(digest)
    assert profile is not None
    say(services, Channel.REPORTED, encode(reported(active=digest, phase=Phase.COMMITTED)))
    now_ms = round(utc_now().timestamp() * 1000)
    for number, (age_s, place) in enumerate(((1200, 2), (30, 12))):
        counts = np.zeros((len(profile.features), 16), "<u4")
        counts[:, place] = 50
        facts = {"features": counts.tobytes(), "nulls": (0,) * len(profile.features)}
        one = window(items=50, bundle=digest, started_ms=now_ms - age_s * 1000, **facts)
        say(services, Channel.BATCH, batch(one, first=number))
    name = profile.features[0]
    rise(services, delay_s=300.0, evidence={"features": {name: {"location": 2.0, "spread": 0.1}}})
    text = client.get("/alarms/1").text
    drawn = re.findall(r'<rect class="since" x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="84.0"', text)
    assert drawn == [f"{12 * 15 + 1:.1f}"]
    assert "M0 88L0.0 88.0H15.0L15.0 88.0H30.0L30.0 4.0H45.0" in text


def test_hostile_evidence_is_text_and_nothing_else(client: TestClient, services: Services) -> None:
    bad = "<script>alert(1)</script>"
    odd = {bad: bad, "dirt": [[1, 2], [3]], "features": {bad: bad}, "usual_shares": 3, "shares": {bad: "x"}}
    rise(services, line="line-1", action=bad, effect_unit=bad, evidence=odd | {"now": {bad: [bad]}, "explains": [1]})
    for path in ("/alarms", "/alarms/1"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert bad not in answer.text
        assert "script-src 'self'" in answer.headers["content-security-policy"]


def test_a_grid_that_is_none_draws_nothing() -> None:
    for odd in (None, 3, "x", [], [[]], [[1], [1, 2]], [["a"] * 100] * 100):
        assert dirt_map(odd) == ""
    assert grid_of([[2.0, -1.0], ["x", 0.5]]) == [[1.0, 0.0], [0.0, 0.5]]
    assert "NaN" not in histogram([0.0] * 16, [0.0] * 16, "f")
    assert other_facts({"cells": 3, "members": ["a", "b"], "dirt": 1}) == [("cells", "3"), ("members", "a, b")]


def test_only_pictures_that_an_agent_named_are_given_out(client: TestClient, services: Services) -> None:
    picture, secret, text = (services.store.put(data) for data in (b"\xff\xd8\xff\xe0jpeg", b"\xff\xd8\xffno", b"text"))
    with writing(services.engine) as session:
        for seq, digest in enumerate((picture, text)):
            facts = {"sha256": digest, "quantity": "dirt", "side": "after"}
            row = {"agent_id": "line-1", "boot_id": BOOT, "seq": seq, "at": utc_now(), "received_at": utc_now()}
            session.add(EventRow(**row, code="camera.evidence", facts=facts))
        session.commit()
    rise(services, evidence={"dirt": GRID})
    assert f"/alarms/pictures/{picture}" in client.get("/alarms/1").text
    answer = client.get(f"/alarms/pictures/{picture}")
    assert (answer.headers["content-type"], answer.content) == ("image/jpeg", b"\xff\xd8\xff\xe0jpeg")
    assert answer.headers["x-content-type-options"] == "nosniff"
    for digest in (secret, text, sha256(b"never")):
        assert client.get(f"/alarms/pictures/{digest}").json()["code"] == "picture.unknown"
    assert client.get("/alarms/pictures/x").status_code == 404


def test_the_fleet_names_the_worst_alarm_of_a_line_and_puts_it_up(client: TestClient, services: Services) -> None:
    for line in ("line-1", "line-2"):
        say(services, Channel.REPORTED, encode(reported(active="a" * 64, phase=Phase.COMMITTED)), line)
    assert services.alarms.worst() == {}
    services.alarms._known = (-1e9, {})
    rise(services, line="line-2", cause=Cause.WEAK_EJECTOR, severity=Severity.CRITICAL)
    found = {agent["id"]: agent["alarm"] for agent in client.get("/api/v1/agents").json()}
    assert found == {"line-1": None, "line-2": {"id": 1, "severity": "critical", "cause": "weak-ejector"}}
    assert client.get("/api/v1/agents/line-2").json()["alarm"]["cause"] == "weak-ejector"
    assert 'href="/alarms/1" title="critical alarm">weak-ejector</a>' in client.get("/").text


def test_an_alarm_that_is_not_there_is_said(client: TestClient) -> None:
    assert client.get("/alarms/7").json()["code"] == "alarm.unknown"
    assert "every line that is heard is as usual" in client.get("/alarms").text


def test_what_is_over_stands_below_and_offers_nothing(client: TestClient, services: Services) -> None:
    rise(services, line="line-1")
    client.post("/api/v1/alarms/1/resolve", json={"reason": "wiped", "actor": "ida"})
    rise(services, line="line-2")
    text = client.get("/alarms").text
    assert text.index('data-alarm="2" data-state="open"') < text.index('data-alarm="1" data-state="resolved"')
    over = client.get("/alarms/1").text
    assert "data-act" not in over
    assert "by ida: wiped" in over
