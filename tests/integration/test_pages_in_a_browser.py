"""A real browser on the real server: rows change by themselves, the policy holds, nothing is loaded from elsewhere."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import paho.mqtt.client as mqtt
import pytest
import uvicorn
from paho.mqtt.enums import CallbackAPIVersion
from playwright.sync_api import Browser, Page, sync_playwright

from control_plane.app import create_app
from control_plane.database.engine import writing
from control_plane.database.tables.columns import utc_now
from control_plane.registry.versions import register
from control_plane.services import Services
from models.bundle import LINEAGE, write_bundle
from models.messages import Command, Fault, Live, LotSource, Phase, Presence, Response, RunningLot, decode, encode
from models.topics import Channel, agent_topic
from tests.control_plane.evaluation.test_operating_point import held
from tests.control_plane.fleet.test_fleet import BOOT, batch, reported, window
from tests.simulators.plane import make_services, release
from tests.simulators.processes import embedded_broker, free_port, wait_until
from tests.simulators.tiny_bundle import tiny_bundle, tiny_files

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.chromium,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="the program chromium is not installed"),
    # The browser's driver closes its own sockets late.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Site(NamedTuple):
    services: Services
    url: str
    server: uvicorn.Server


def say(services: Services, agent: str, **facts: object) -> None:
    values = {"active": "a" * 64, "phase": Phase.COMMITTED, "labels": {"site": "north", "line": "1"}}
    services.ingest.take(agent_topic(agent, Channel.PRESENCE), encode(Presence(online=True, boot_id=BOOT)))
    services.ingest.take(agent_topic(agent, Channel.REPORTED), encode(reported(**(values | facts))))
    services.intake.put(agent_topic(agent, Channel.LIVE), encode(Live(boot_id=BOOT, at_ms=1, items_per_s=17.5)))


def released(services: Services, folder: Path, bias: float = 0.0) -> str:
    """A bundle that is registered and released."""
    digest = tiny_bundle(folder, bias=bias).digest
    with writing(services.engine) as session:
        register(session, services.store, folder, actor="t", now=utc_now())
        session.commit()
    return release(services, digest)


@contextlib.contextmanager
def serving(services: Services) -> Iterator[Site]:
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(create_app(services), port=port, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, "the server")
    try:
        yield Site(services, f"http://127.0.0.1:{port}", server)
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    services = make_services(tmp_path / "plane")
    runs = released(services, tmp_path / "runs", bias=0.1)
    say(services, "line-1", active=runs)
    services.ingest.take(agent_topic("line-1", Channel.BATCH), batch(window(bundle=runs), window(8, bundle=runs)))
    with serving(services) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        found = play.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield found
        found.close()


@pytest.fixture
def page(site: Site, browser: Browser) -> Iterator[Page]:
    """A page of a browser that remembers nothing of the tests before."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    found = context.new_page()
    found.set_default_timeout(10_000)
    yield found
    context.close()


def test_the_fleet_page_is_live_keyboard_friendly_and_loads_nothing_from_elsewhere(site: Site, page: Page) -> None:
    services, url, _ = site
    problems: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url, wait_until="load")
    page.wait_for_selector('tr[data-agent="line-1"][data-state="good"]')
    say(services, "line-2", camera_fault="camera.frozen")
    page.wait_for_selector('tr[data-agent="line-2"][data-state="failure"]')
    assert page.locator("#rows tr").first.get_attribute("data-agent") == "line-2"
    assert page.locator('.tile[data-state="failure"] b').inner_text() == "1"
    page.keyboard.press("/")
    page.keyboard.type("line-1")
    assert page.locator("#rows tr:visible").count() == 1
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") in {"dark", "light"}
    assert problems == []
    assert all(request.startswith(url) for request in asked)


@pytest.mark.slow
def test_a_page_whose_server_is_gone_says_so(site: Site, page: Page) -> None:
    page.goto(site.url, wait_until="load")
    page.wait_for_selector('tr[data-agent="line-1"]')
    site.server.should_exit = True
    page.wait_for_selector("#stale:not([hidden])", timeout=30_000)


def test_terms_can_be_tried_on_the_page_of_a_version(site: Site, page: Page, tmp_path: Path) -> None:
    files = tiny_files()
    lineage = {"held_out": msgspec.to_builtins(held(60))}
    write_bundle(tmp_path / "b", "apples", files | {LINEAGE: msgspec.json.encode(lineage)})
    with writing(site.services.engine) as session:
        register(session, site.services.store, tmp_path / "b", actor="ida", now=utc_now())
        session.commit()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(site.url + "/models", wait_until="load")
    page.get_by_role("link", name="apples 1").click()
    assert "threshold 50.0%" in (page.locator("svg.costs").text_content() or "")
    page.fill("input[name=escaped]", "3")
    page.get_by_role("button", name="Show what it costs").click()
    page.wait_for_selector("pre")
    assert "threshold 25.0%" in (page.locator("svg.costs").text_content() or "")
    assert "--escape-cost 3" in page.locator("pre").inner_text()
    assert problems == []


def test_every_page_opens_without_an_error(site: Site, page: Page) -> None:
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    for path in ("/agents/line-1", "/alarms", "/models", "/rollouts", "/training", "/docs"):
        answer = page.goto(site.url + path, wait_until="load")
        assert answer is not None
        assert (path, answer.status, problems) == (path, 200, [])


@pytest.mark.slow
def test_a_lot_is_named_on_the_page_of_an_agent(page: Page, tmp_path: Path) -> None:
    with embedded_broker(tmp_path) as broker, serving(make_services(tmp_path / "plane", port=broker)) as site:
        services, url, _ = site
        wait_until(lambda: services.connection.connected, "the connection")
        say(services, "line-1", lot=RunningLot(lot="A-1", source=LotSource.OPERATOR, begun=True, terms="recipe"))
        answers: list[Fault | None] = [Fault(code="command.from_future", message="The clock is behind."), None]
        heard: list[Command] = []
        agent = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="line-1", protocol=mqtt.MQTTv311)
        agent.username_pw_set("line-1", "x")

        def respond(_client: object, _data: object, message: mqtt.MQTTMessage) -> None:
            heard.append(decode(message.payload, Command))
            answer = Response(request_id=heard[-1].request_id, at_ms=1, fault=answers.pop(0))
            agent.publish(agent_topic("line-1", Channel.RESPONSE), encode(answer), 1)

        subscribed = threading.Event()
        agent.on_message, agent.on_subscribe = respond, lambda *_: subscribed.set()
        agent.on_connect = lambda *_: agent.subscribe(agent_topic("line-1", Channel.COMMAND), 1)
        agent.connect("127.0.0.1", broker)
        agent.loop_start()
        try:
            assert subscribed.wait(300.0)
            problems: list[str] = []
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(f"{url}/agents/line-1", wait_until="load")
            facts = page.locator("dl.facts").inner_text()
            assert "A-1 · set by the operator at the line" in facts
            assert "no terms for this lot" in facts
            page.fill("#actor", "maria")
            for name, value in (("lot", "B-<b>2</b>"), ("variety", "gala"), ("reason", "truck 7")):
                page.fill(f"[name={name}]", value)
            page.click("#lot button")
            page.wait_for_selector("#refused:not([hidden])")
            assert "The clock is behind. (command.from_future)" in page.locator("#refused").inner_text()
            page.click("#lot button")
            page.get_by_text("Accepted").wait_for()
        finally:
            agent.disconnect()
            agent.loop_stop()
        assert [(c.lot, c.variety) for c in heard] == [("B-<b>2</b>", "gala")] * 2
        asked = services.board.one("line-1").lot_asked
        assert (asked["actor"], asked["reason"], asked["state"]) == ("maria", "truck 7", "accepted")
        assert problems == []


@pytest.mark.slow
def test_a_rollout_is_previewed_started_watched_and_stopped_on_its_page(site: Site, page: Page, tmp_path: Path) -> None:
    services, url, _ = site
    digest = released(services, tmp_path / "b")
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{url}/rollouts", wait_until="load")
    page.fill("#actor", "maria")
    page.fill("[name=waves]", "100%")
    assert not page.locator("#start").is_visible(), "nothing starts unseen"
    page.click("#look")
    page.wait_for_selector("#radius td")
    assert "worst case" in page.locator("#radius").inner_text().lower()
    page.click("#start")
    page.wait_for_selector('[data-rollout="1"][data-state="running"]')
    services.rollouts.step(utc_now())
    page.locator('[data-rollout="1"] summary').click()
    page.fill('[data-rollout="1"] .reason', "half typ")
    page.focus('[data-rollout="1"] .reason')
    facts = {"generation": 1, "phase": Phase.ROLLED_BACK, "blocked": (digest,), "line_running": True}
    say(services, "line-1", **facts)
    page.wait_for_selector('[data-rollout="1"] .chip.o-broken')
    assert page.locator('[data-rollout="1"] details').get_attribute("open") is not None
    page.keyboard.type("ed")
    assert page.locator('[data-rollout="1"] .reason').input_value() == "half typed"
    services.rollouts.step(utc_now())
    page.wait_for_selector('[data-rollout="1"][data-state="aborted"]')
    assert "1 of 1" in page.locator('[data-rollout="1"] .why').inner_text()
    page.click('[data-rollout="1"] [data-act=rollback]')
    page.wait_for_selector('[data-rollout="1"][data-state="rolling-back"]')
    assert "rollback by maria: half typed" in page.locator('[data-rollout="1"] .why').inner_text()
    assert problems == []
