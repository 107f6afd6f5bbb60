"""Mutual TLS on both brokers: what an agent may publish and receive, and which certificates may connect at all."""

from collections.abc import Iterator

import pytest

from control_plane.identity.certificates import (
    AGENT_URI,
    PLANE_URI,
)
from models.topics import bin_of, bin_topic
from tests.simulators.broker_place import BROKERS, Place, open_place
from tests.simulators.mqtt_probe import Probe, close_probes, packet
from tests.simulators.site import make_site

AGENTS = "sortline/v1/agents"
BLOB = f"sortline/v1/blobs/{'ab' * 32}"
BIN = bin_topic(bin_of("line-1"))


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_probes()


@pytest.fixture(scope="module", params=BROKERS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One broker for the tests that change nothing."""
    with open_place(request.param, tmp_path_factory.mktemp("shared")) as found:
        yield found


PUBLISHED = ("presence", "reported", "batch", "live", "request", "response")
RECEIVED = ("desired", "ack", "blob", "command")
CHANNELS = (*PUBLISHED, *RECEIVED, "other")
TOPICS = (
    *(f"{AGENTS}/line-1/{channel}" for channel in CHANNELS),
    *(f"{AGENTS}/line-2/{channel}" for channel in CHANNELS),
    f"{AGENTS}/line-1",
    f"{AGENTS}/line-1/batch/deeper",
    f"{AGENTS}/batch",
    "sortline/v1/tuf",
    BIN,
    f"sortline/v1/tuf/{bin_of('line-2')}",
    f"{BIN}/deeper",
    "sortline/v1/sentinel",
    BLOB,
    f"{BLOB}/0",
    "sortline/v1/blobs",
    "sortline/v2/tuf",
    "other",
)
MAY_PUBLISH = {f"{AGENTS}/line-1/{channel}" for channel in PUBLISHED}
MAY_RECEIVE = {
    *(f"{AGENTS}/line-1/{channel}" for channel in RECEIVED),
    "sortline/v1/tuf",
    BIN,
    "sortline/v1/sentinel",
    BLOB,
}


def drain(probe: Probe, marker: bytes) -> set[tuple[str, bytes]]:
    """Everything that arrives up to the marker."""
    found: set[tuple[str, bytes]] = set()
    while True:
        (message,) = probe.messages(1, 5.0)
        if message[1] == marker:
            return found
        found.add(message[:2])


def test_an_agent_publishes_under_its_own_name_only(shared: Place) -> None:
    watcher = shared.plane()
    watcher.subscribe(("sortline/#", 1))
    watcher.messages(200, 0.3)
    agent = shared.agent()
    for topic in TOPICS:
        agent.publish(topic, b"said", 1)
        assert agent.wait_for(4), topic
    agent.publish(f"{AGENTS}/line-1/live", b"end", 1)
    assert {topic for topic, _ in drain(watcher, b"end")} == MAY_PUBLISH


def test_an_agents_will_is_published_under_its_own_name_only(shared: Place) -> None:
    watcher = shared.plane()
    watcher.subscribe(("sortline/#", 1))
    watcher.messages(200, 0.3)
    for topic in TOPICS:
        agent = shared.connect(shared.site.folder / "line-1.pair", "line-1", will=(topic, b"gone", 1, False))
        agent.close(clean=False)
        if topic in MAY_PUBLISH:
            assert watcher.messages(1, 5.0)[0][:2] == (topic, b"gone")
    shared.agent().publish(f"{AGENTS}/line-1/live", b"end", 1)
    assert drain(watcher, b"end") == set()


@pytest.mark.parametrize("how", ["live", "retained", "queued"])
def test_an_agent_receives_its_own_and_what_is_for_all(shared: Place, how: str) -> None:
    plane, agent = shared.plane("bulk"), shared.agent(clean=how != "queued")
    say = f"{how}".encode()

    def publish() -> None:
        for topic in TOPICS:
            plane.publish(topic, say, 1, retain=how == "retained")
            assert plane.wait_for(4)

    if how == "retained":
        publish()
    for topic in TOPICS:
        agent.subscribe((topic, 1))
    if how == "live":
        publish()
    if how == "queued":
        agent.close()
        publish()
        agent = shared.agent(clean=False)
    plane.publish(f"{AGENTS}/line-1/ack", b"end", 1)
    assert drain(agent, b"end") == {(topic, say) for topic in MAY_RECEIVE}
    agent.close()
    shared.agent(clean=True).close()
    if how == "retained":
        for topic in TOPICS:
            plane.publish(topic, b"", 1, retain=True)
            assert plane.wait_for(4)


@pytest.mark.parametrize(
    "wanted", ["#", "sortline/#", f"{AGENTS}/+/desired", f"{AGENTS}/#", "$SYS/#", "+/+/+/+/+", "sortline/v1/tuf/+"]
)
def test_a_wildcard_brings_an_agent_nothing_that_is_not_its_own(shared: Place, wanted: str) -> None:
    plane, agent = shared.plane("bulk"), shared.agent()
    codes = agent.subscribe((wanted, 1))
    if shared.embedded:
        assert codes == [0x80]
    agent.subscribe((f"{AGENTS}/line-1/ack", 1))
    for topic in TOPICS:
        plane.publish(topic, b"x", 1)
        assert plane.wait_for(4)
    plane.publish(f"{AGENTS}/line-1/ack", b"end", 1)
    assert {topic for topic, _ in drain(agent, b"end")} <= MAY_RECEIVE


# -- who may connect --------------------------------------------------------------------------------------------------


def test_a_client_without_a_certificate_is_refused(shared: Place) -> None:
    (shared.site.folder / "evil").mkdir(exist_ok=True)
    other = make_site(shared.site.folder / "evil", other=True)
    foreign = other.pair("line-1", shared.site.folder / "foreign.pair")
    other.engine.dispose()
    assert shared.connect(None).code is None, "no certificate"
    assert shared.connect(foreign, "line-1").code is None, "another authority's line-1"
    assert shared.connect(shared.forge("line-1", server=True), "line-1").code is None, "a server's certificate"
    assert shared.connect(shared.forge("line-1", days_ago=40), "line-1").code is None, "past its time"
    plain = Probe(shared.port, "line-1", {"user": "line-1", "password": "x"})
    assert plain.code is None, "no TLS at all"
    assert shared.agent("line-1")


def test_a_certificate_of_an_agent_that_never_enrolled_may_do_nothing(shared: Place) -> None:
    watcher = shared.plane()
    watcher.subscribe(("sortline/#", 1))
    watcher.messages(200, 0.3)
    ghost = shared.connect(shared.forge("ghost"), "ghost")
    if shared.embedded:
        assert ghost.code == 5
    else:
        ghost.subscribe((f"{AGENTS}/ghost/desired", 1), ("sortline/v1/tuf", 1))
        ghost.publish(f"{AGENTS}/ghost/batch", b"boo", 1)
        shared.plane("bulk").publish("sortline/v1/tuf", b"x", 1)
        assert ghost.messages(1, 0.5) == []
    shared.agent().publish(f"{AGENTS}/line-1/live", b"end", 1)
    assert {topic for topic, _ in drain(watcher, b"end")} <= {"sortline/v1/tuf"}


def test_a_certificate_that_claims_a_role_gets_none(shared: Place) -> None:
    for uri in (AGENT_URI, PLANE_URI):  # also a control plane that the site does not know
        sly = shared.connect(shared.forge("control-plane-x", uri=uri + "control-plane-x"), "x")
        assert sly.code == (5 if shared.embedded else 0)
        if sly.code == 0:
            sly.subscribe(("sortline/#", 1))
            shared.agent().publish(f"{AGENTS}/line-1/live", b"secret", 1)
            assert sly.messages(1, 0.5) == []


def test_another_agents_client_id_takes_nothing_over(shared: Place) -> None:
    victim = shared.agent("line-1", clean=False)
    victim.subscribe((f"{AGENTS}/line-1/desired", 1))
    for clean in (True, False):
        thief = shared.connect(shared.site.folder / "line-2.pair", "line-1", clean=clean, user="line-1", password="x")
        assert not thief.present
        thief.subscribe((f"{AGENTS}/line-1/desired", 1))
        shared.plane("bulk").publish(f"{AGENTS}/line-1/desired", b"yours", 1)
        assert victim.messages(1)[0][1] == b"yours"
        assert thief.messages(1, 0.3) == []
    victim.close()
    shared.agent("line-1", clean=True).close()


def test_the_same_agent_connecting_again_takes_its_old_connection_over(shared: Place) -> None:
    first = shared.agent("line-1", "one")
    second = shared.agent("line-1", "two")
    assert first.closed_by_peer(5)
    second.send(packet(12, 0, b""))
    assert second.wait_for(13)
