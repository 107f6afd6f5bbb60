"""What a line counted over time, how far that can be trusted, and what held at a moment: API, page and command line."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from control_plane.cli import main
from control_plane.client import Client
from control_plane.fleet.intake import Message
from control_plane.services import Services
from models.bundle import pack
from models.messages import Event, Phase, RunningLot, encode
from models.topics import Channel
from tests.control_plane.fleet.test_fleet import A, batch, reported, window
from tests.simulators.plane import make_client, release
from tests.simulators.tiny_bundle import tiny_bundle

START = datetime(2026, 3, 14, 10, 0, tzinfo=UTC)
PATH = "/api/v1/agents/line-1"
NOW = [START]


@pytest.fixture(autouse=True)
def then(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is stored when it arrives, in 2026."""
    monkeypatch.setattr("control_plane.fleet.ingest.utc_now", lambda: NOW[0])


@pytest.fixture
def client(services: Services) -> TestClient:
    return make_client(services)


def send(services: Services, number: int, value: object) -> None:
    at = NOW[0] = START + timedelta(seconds=10 * number + 10.5)
    services.ingest.store([Message(0, at, "line-1", Channel.BATCH, batch(value, first=number), retained=False)])


def counted(number: int, **changes: object) -> object:
    started_ms = round((START + timedelta(seconds=10 * number)).timestamp() * 1000)
    return window(**({"items": number % 3 + 1, "started_ms": started_ms, "lot": f"lot {number // 90}"} | changes))


def fill(services: Services) -> None:
    """Forty minutes of windows, two of which are missing."""
    for number in range(240):
        if number not in {100, 101}:
            send(services, number, counted(number))


def pages(client: TestClient, path: str, **options: object) -> list[list[dict]]:
    found, after = [], ""
    while after is not None:
        answer = client.get(path, params=options | ({"after": after} if after else {}))
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["rows"])
        after = answer.json()["next"]
    return found


def test_statistics_come_page_by_page_without_repetition_or_gap(services: Services, client: TestClient) -> None:
    fill(services)
    whole = {"from": START.isoformat(), "until": (START + timedelta(days=30)).isoformat()}
    expected = sum(number % 3 + 1 for number in range(240) if number not in {100, 101})
    for span, rows, limits in (
        ("minute", 40, (1, 7, 500)),
        ("hour", 3, (1, 2, 500)),
        ("day", 3, (1, 500)),
        ("lot", 3, (1, 2)),
    ):
        for limit in limits:
            found = [
                row for page in pages(client, f"{PATH}/statistics", span=span, limit=limit, **whole) for row in page
            ]
            assert len(found) == rows, (span, limit)
            assert sum(row["items"] for row in found) == expected
            assert sum(row["windows"] for row in found) == 238
            assert [row["first_at"] for row in found] == sorted(row["first_at"] for row in found)
    (lot, *_) = pages(client, f"{PATH}/statistics", span="lot", **whole)[0]
    assert (lot["lot"], lot["windows"], lot["first_at"]) == ("lot 0", 90, START.isoformat())
    for bad in ({"span": "week"}, {"after": "rubbish"}, {"limit": 0}, {"until": "9999-12-31T23:59:59"}):
        assert client.get(f"{PATH}/statistics", params=bad).status_code in {200, 422}, bad
    assert client.get(f"{PATH}/statistics", params={"after": "x"}).json()["code"] == "windows.bad_cursor"
    assert client.get("/api/v1/agents/none/statistics").status_code == 404


def test_fidelity_says_what_is_missing(services: Services, client: TestClient) -> None:
    fill(services)
    until = (START + timedelta(hours=2)).isoformat()
    (hour,) = client.get(f"{PATH}/fidelity", params={"until": until}).json()
    assert (hour["windows"], hour["missing_records"], hour["state"]) == (238, 2, "amber")
    (day,) = client.get(f"{PATH}/fidelity", params={"until": until, "span": "day"}).json()
    assert day["missing_records"] == 2
    assert client.get("/api/v1/agents/none/fidelity").status_code == 404


def test_what_held_at_a_moment_is_put_together_from_what_was_kept(
    services: Services, client: TestClient, tmp_path: Path
) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    with client:
        made = client.post("/api/v1/versions?actor=ida", content=pack(tmp_path / "bundle"))
        assert made.status_code == 201, made.text
    release(services, bundle.digest)

    def report(minutes: float, **facts: object) -> None:
        at = START + timedelta(minutes=minutes)
        said = encode(reported(at_ms=round(at.timestamp() * 1000), **facts))
        services.ingest.store([Message(0, at, "line-1", Channel.REPORTED, said, retained=False)])

    report(0, active=A, phase=Phase.COMMITTED, camera="camera one")
    lot = RunningLot(lot="lot 0", variety="gala", source="operator")
    report(10, active=bundle.digest, phase=Phase.COMMITTED, camera="camera two", lot=lot)
    report(60, active=A, phase=Phase.COMMITTED, camera="camera one")
    for number in range(60, 90):
        send(services, number, counted(number, bundle=bundle.digest, variety="gala"))
    send(services, 90, Event(at_ms=round(START.timestamp() * 1000), code="camera.frozen"))

    found = client.get(f"{PATH}/as-of", params={"at": "2026-03-14T10:12:05", "lane": 0}).json()
    assert (found["bundle"], found["camera"], found["lot"], found["variety"]) == (
        bundle.digest,
        "camera two",
        "lot 0",
        "gala",
    )
    assert found["model"].endswith(":1")
    assert (found["seen_in"], found["seen"]["items"], found["lane_seen"]["items"]) == ("window", 1, 1)
    assert found["recipe"]["classes"] == list(bundle.recipe.classes)
    assert found["terms_of"] in {"lot", "variety", "recipe"}
    assert found["terms"]
    assert found["known_until"].startswith("2026-03-14T11:00")
    assert [entry["code"] for entry in found["events"]] == ["camera.frozen"]
    assert (
        client.get(f"{PATH}/as-of", params={"at": "2026-03-14T10:12:05", "lane": 9}).json()["code"] == "agent.no_lane"
    )

    before = client.get(f"{PATH}/as-of", params={"at": "2026-03-14T10:05:00Z"}).json()
    assert (before["bundle"], before["camera"], before["seen_in"], before["model"]) == (A, "camera one", "", "")
    never = client.get(f"{PATH}/as-of", params={"at": "2025-01-01T00:00:00Z"}).json()
    assert (never["bundle"], never["known_since"], never["approvals"]) == ("", None, [])
    assert client.get("/api/v1/agents/none/as-of", params={"at": "2025-01-01"}).status_code == 404

    page = client.get("/agents/line-1/as-of", params={"at": "2026-03-14T10:12"})
    assert page.status_code == 200
    for text in ("camera two", "lot 0", bundle.digest, "camera.frozen"):
        assert text in page.text
    assert client.get("/agents/line-1/as-of").status_code == 200
    assert client.get("/agents/line-1/as-of", params={"at": "yesterday"}).status_code == 422


def test_when_the_windows_are_gone_the_shortest_sum_that_is_left_is_shown(
    services: Services, client: TestClient
) -> None:
    from sqlmodel import delete

    from control_plane.database.engine import writing
    from control_plane.database.tables.agents import WindowRow
    from control_plane.database.tables.windows import Rollup

    fill(services)
    at = {"at": "2026-03-14T10:05:03Z"}
    for kind, gone in (("minute", WindowRow), ("hour", None)):
        with writing(services.engine) as session:
            session.exec(delete(WindowRow) if gone else delete(Rollup).where(Rollup.span_s == 60, Rollup.folded))
            session.commit()
        found = client.get(f"{PATH}/as-of", params=at).json()
        assert (found["seen_in"], found["seen"]["items"] > 0) == (kind, True)


def test_the_commands_print_what_the_api_says(
    services: Services, client: TestClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(services)
    monkeypatch.setattr(Client, "get", lambda _self, path: client.get(path).json())
    window_of_time = ["--from", "2026-03-14T10:00", "--until", "2026-03-14T12:00"]
    for command, texts in (
        (["statistics", "line-1", "--span", "lot", *window_of_time], ["lot 0", "lot 2", "2026-03-14 10:00:00"]),
        (["statistics", "line-1", "--span", "minute", "--limit", "2", *window_of_time], ["2026-03-14 10:02:00"]),
        (["fidelity", "line-1", *window_of_time], ["amber", "99.2%"]),
        (["as-of", "line-1", "--at", "2026-03-14T10:05"], ["seen.items"]),
    ):
        assert main(["agents", *command]) == 0
        said = capsys.readouterr().out
        assert all(text in said for text in texts), said
        assert main(["agents", *command, "--json"]) == 0
        json.loads(capsys.readouterr().out)
