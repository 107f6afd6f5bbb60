"""The fleet's rows, live: what did not change is not sent, what a page missed is, and many share one answer."""

import json
import re
import zlib
from pathlib import Path

import pytest

from control_plane.database.engine import writing
from control_plane.database.tables.agents import Agent
from control_plane.pages.live import _GZIP_HEADER, RowFeed
from control_plane.services import Services
from models.messages import Live, Phase, Presence, encode
from models.topics import Channel, agent_topic
from tests.control_plane.fleet.test_fleet import BOOT, A, batch, reported, say, window


@pytest.fixture
def feed(services: Services, monkeypatch: pytest.MonkeyPatch) -> RowFeed:
    snapshot = services.board.snapshot
    monkeypatch.setattr(services.board, "snapshot", lambda _age: snapshot(0.0))
    for agent in ("line-1", "line-2"):
        say(services, Channel.PRESENCE, encode(Presence(online=True, boot_id=BOOT)), agent)
        say(services, Channel.REPORTED, encode(reported(active=A, phase=Phase.COMMITTED)), agent)
    return RowFeed(services, "")


def events(chunk: bytes) -> dict[str, dict[str, object]]:
    text = chunk.decode()
    found = re.findall(r"event: (\w+)\ndata: (.*)\n", text)
    return {name: json.loads(data) for name, data in found}


def test_a_new_page_gets_every_row_and_one_that_is_up_to_date_none(feed: RowFeed) -> None:
    chunk, version = feed.news("", False)
    first = events(chunk)["rows"]
    assert [row["id"] for row in first["rows"]] == ["line-1", "line-2"]
    assert first["all"] is True
    assert set(events(feed.news(version, False)[0])) == {"tick"}
    assert feed.shown().version == version


def test_only_the_part_of_a_row_that_changed_is_sent(feed: RowFeed, services: Services) -> None:
    _, version = feed.news("", False)
    live = Live(boot_id=BOOT, at_ms=1, items_per_s=17.0)
    services.intake.put(agent_topic("line-2", Channel.LIVE), encode(live))
    chunk, later = feed.news(version, False)
    assert events(chunk)["rows"]["rows"] == [{"id": "line-2", "rate": "17.0"}]
    say(services, Channel.BATCH, batch(window()), "line-1")
    (row,) = events(feed.news(later, False)[0])["rows"]["rows"]
    assert set(row) == {"id", "figures", "times"}
    say(services, Channel.REPORTED, encode(reported(active=A, camera_fault="camera.frozen")), "line-1")
    missed = events(feed.news(version, False)[0])["rows"]["rows"]
    assert {row["id"]: set(row) for row in missed} == {
        "line-1": {"id", "state", "order", "who", "figures", "times"},
        "line-2": {"id", "rate"},
    }


def test_an_agent_that_was_forgotten_leaves_the_page(feed: RowFeed, services: Services) -> None:
    _, version = feed.news("", False)
    with writing(services.engine) as session:
        session.delete(session.get(Agent, "line-2"))
        session.commit()
    assert events(feed.news(version, False)[0])["rows"]["gone"] == ["line-2"]


def test_a_version_of_another_process_gets_everything(feed: RowFeed, services: Services) -> None:
    _, version = feed.news("", False)
    other = RowFeed(services, "")
    assert events(other.news(version, False)[0])["rows"]["all"] is True


def test_compressed_answers_are_shared_and_make_one_gzip_stream(
    feed: RowFeed, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, version = feed.news("", True)
    say(services, Channel.BATCH, batch(window()), "line-1")
    looked = services.board.snapshot(0.0)
    monkeypatch.setattr(services.board, "snapshot", lambda _age: looked)
    second, _ = feed.news(version, True)
    assert feed.news(version, True)[0] == second
    inflater = zlib.decompressobj(wbits=31)
    text = inflater.decompress(_GZIP_HEADER + first + second).decode()
    assert text.count("event: rows") == 2
    assert not inflater.eof


def test_a_page_shows_that_the_control_plane_is_behind(feed: RowFeed, services: Services) -> None:
    _, version = feed.news("", False)
    assert "waiting" not in events(feed.news(version, False)[0])["tick"]
    for number in range(20):
        services.intake.put(agent_topic("line-1", Channel.BATCH), batch(window(), first=number))
    tick = events(RowFeed(services, "").news(version, False)[0])["tick"]
    assert (tick["waiting"], tick["shed"]) == (8, 12)


def test_hostile_text_is_shown_and_never_markup(feed: RowFeed, services: Services, tmp_path: Path) -> None:
    del tmp_path
    labels = {"site": "<script>alert(1)</script>", "line": '"><img src=x>'}
    say(services, Channel.REPORTED, encode(reported(labels=labels)), "line-1")
    chunk, _ = feed.news("", False)
    who = events(chunk)["rows"]["rows"][0]["who"]
    assert "<script>" not in who
    assert "<img" not in who
    assert "&lt;script&gt;" in who
