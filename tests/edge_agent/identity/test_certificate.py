"""The agent's side of identity over real HTTPS: pins, lost answers, power cuts, wrong clocks, rotation."""

import hashlib
import os
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from control_plane.identity.publication import refresh_site
from edge_agent.config import AgentConfig, BrokerConfig, IdentityConfig
from edge_agent.identity import enrolment as enrolling
from edge_agent.identity.certificate import FACTS, NEXT_KEY, PAIR, BrokerTls, IdentityUpkeep, read_facts, with_identity
from edge_agent.identity.enrolment import enrol, renew
from models.errors import ConfigError, ConflictError, InputError, SortlineError, UnavailableError
from tests.simulators.processes import free_port
from tests.simulators.site import Site, device_listener, https, make_site

DAY = 86400.0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = make_site(tmp_path, broker=("broker.plant", 8883))
    yield found
    found.engine.dispose()


@pytest.fixture
def url(site: Site) -> Iterator[str]:
    with https(site) as found:
        yield found


def invite(site: Site, agent: str = "line-1") -> str:
    return str(site.enrolment.invite(agent, actor="test", now=site.now))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tls(folder: Path, now_s: float | None = None) -> BrokerTls:
    config = BrokerConfig(tls_ca=str(folder / "ca.pem"), tls_cert=str(folder / PAIR))
    return BrokerTls(config, clock=time.time if now_s is None else lambda: now_s)


def age(site: Site, folder: Path, days: float) -> None:
    """Makes the agent's certificate older: as if it had been enrolled `days` ago."""
    facts = read_facts(folder)
    older = msgspec.structs.replace(facts, renew_after_s=int(facts.renew_after_s - days * DAY))
    (folder / FACTS).write_bytes(msgspec.json.encode(older))


def test_a_box_enrols_with_nothing_but_its_token(site: Site, url: str, tmp_path: Path) -> None:
    folder = tmp_path / "box" / "identity"
    facts = enrol(folder, invite(site), url)
    assert (facts.agent, facts.broker_host, facts.broker_port) == ("line-1", "broker.plant", 8883)
    assert (folder / PAIR).stat().st_mode & 0o077 == 0
    assert not (folder / NEXT_KEY).exists()
    config = with_identity(AgentConfig(state_dir=str(tmp_path / "box")))
    assert (config.id, config.broker.host, config.broker.port) == ("line-1", "broker.plant", 8883)
    own = with_identity(AgentConfig(state_dir=str(tmp_path / "box"), broker=BrokerConfig(host="10.1.1.1", port=1)))
    assert (own.broker.host, own.broker.port) == ("10.1.1.1", 1)
    with pytest.raises(ConfigError) as caught:
        with_identity(AgentConfig(id="line-2", state_dir=str(tmp_path / "box")))
    assert caught.value.code == "identity.other_agent"


def test_a_box_gets_the_root_of_signatures_with_its_first_certificate_and_keeps_it(
    site: Site, url: str, tmp_path: Path
) -> None:
    anchor = tmp_path / "box" / "trust" / "root.json"
    site.enrolment._trust_root = lambda: '{"root": 1}'
    enrol(tmp_path / "box" / "identity", invite(site), url, anchor=anchor)
    assert anchor.read_text() == '{"root": 1}'
    site.enrolment._trust_root = lambda: '{"root": 2}'
    site.enrolment.authority.rotate(site.now)
    site.publisher.publish()
    assert renew(tmp_path / "box" / "identity", time.time())
    assert anchor.read_text() == '{"root": 1}', "later roots come signed by the earlier ones, not by this way"


def test_a_server_of_another_site_never_gets_the_secret(site: Site, url: str, tmp_path: Path) -> None:
    (tmp_path / "evil").mkdir()
    evil = make_site(tmp_path / "evil", other=True)
    with https(evil) as false_url, pytest.raises(ConflictError) as caught:
        enrol(tmp_path / "id", invite(site), false_url)
    assert caught.value.code == "identity.wrong_pin"
    assert sum(evil.counters.values()) == 0, "no enrolment reached it"
    evil.engine.dispose()


def test_a_server_that_presents_a_foreign_chain_never_gets_the_secret(
    site: Site, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil").mkdir()
    evil = make_site(tmp_path / "evil", other=True)
    real = enrolling._pinned_root
    with https(evil) as false_url:
        # It relays the true, public roots; its own certificate is not signed by them.
        monkeypatch.setattr(enrolling, "_pinned_root", lambda _server, pin: real(url, pin))
        with pytest.raises(UnavailableError) as caught:
            enrol(tmp_path / "id", invite(site), false_url)
    assert "certificate verify failed" in str(caught.value)
    assert sum(evil.counters.values()) == 0
    evil.engine.dispose()


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:1", "https://", "ftp://x"])
def test_enrolment_goes_over_https_only(site: Site, tmp_path: Path, address: str) -> None:
    with pytest.raises(InputError) as caught:
        enrol(tmp_path / "id", invite(site), address)
    assert caught.value.code == "identity.not_https"


def test_an_absent_control_plane_is_said(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        enrol(tmp_path / "id", invite(site), f"https://127.0.0.1:{free_port()}")
    assert caught.value.code == "identity.unreachable"


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4])
def test_a_power_cut_while_the_answer_is_stored_is_made_good_by_asking_again(
    site: Site, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Writes: next.key, ca.pem, identity.pem, identity.json; then next.key goes."""
    folder, token = tmp_path / "id", invite(site)
    real, written = enrolling.write_atomically, Counter()

    def dying(path: Path, data: bytes, **options: int) -> None:
        if written["files"] == cut:
            raise KeyboardInterrupt
        written["files"] += 1
        real(path, data, **options)

    monkeypatch.setattr(enrolling, "write_atomically", dying)
    if cut < 4:
        with pytest.raises(KeyboardInterrupt):
            enrol(folder, token, url)
    else:
        enrol(folder, token, url)
    monkeypatch.setattr(enrolling, "write_atomically", real)
    assert enrol(folder, token, url).agent == "line-1" if cut < 4 else read_facts(folder) is not None
    tls(folder).follow()  # key and certificate belong together
    assert len(site.enrolment.admitted(site.now)[0]) == 1


def test_a_certificate_is_renewed_from_its_day_with_a_new_key(site: Site, url: str, tmp_path: Path) -> None:
    folder = tmp_path / "id"
    enrol(folder, invite(site), url)
    first = digest(folder / PAIR)
    assert not renew(folder, time.time())
    assert digest(folder / PAIR) == first
    with pytest.raises(ConflictError) as caught:
        renew(folder, time.time() + 10.5 * DAY)  # the box's clock is ahead: the control plane decides
    assert caught.value.code == "identity.too_early"
    assert digest(folder / PAIR) == first
    assert (folder / NEXT_KEY).stat().st_mode & 0o077 == 0


def test_a_rotated_authority_is_followed_at_the_next_look(site: Site, url: str, tmp_path: Path) -> None:
    folder = tmp_path / "id"
    enrol(folder, invite(site), url)
    old_trust, old_pair = (folder / "ca.pem").read_text(), digest(folder / PAIR)
    site.enrolment.authority.rotate(site.now)
    site.publisher.publish()
    assert renew(folder, time.time()), "another issuer: renewed before its day"
    assert (folder / "ca.pem").read_text().count("BEGIN") == 2
    assert old_trust in (folder / "ca.pem").read_text()
    assert digest(folder / PAIR) != old_pair
    assert not renew(folder, time.time())
    site.enrolment.authority.retire()
    assert not renew(folder, time.time())
    assert (folder / "ca.pem").read_text().count("BEGIN") == 1, "the retired root is not trusted any more"


def test_the_listener_shows_the_certificate_that_another_process_renewed(site: Site, tmp_path: Path) -> None:
    with device_listener(site) as (url, server):
        folder = tmp_path / "id"
        enrol(folder, invite(site), url)
        rotated = site.enrolment.authority.rotate(site.now)
        refresh_site(rotated, site.now)
        assert renew(folder, time.time())
        refresh_site(rotated.retire(), site.now)
        (folder / "ca.pem").write_bytes(site.enrolment.authority.anchors_pem)
        with pytest.raises(UnavailableError):
            renew(folder, time.time())
        server.follow()
        assert not renew(folder, time.time())


def test_a_revoked_box_reports_it_and_keeps_its_certificate(site: Site, url: str, tmp_path: Path) -> None:
    folder = tmp_path / "id"
    enrol(folder, invite(site), url)
    site.enrolment.revoke("line-1", reason="x", actor="x", now=site.now)
    age(site, folder, 11)
    before = digest(folder / PAIR)
    with pytest.raises(ConflictError) as caught:
        renew(folder, time.time())
    assert caught.value.code == "identity.revoked"
    assert digest(folder / PAIR) == before


@pytest.mark.slow
def test_the_upkeep_renews_in_a_child_and_counts_what_fails(site: Site, url: str, tmp_path: Path) -> None:
    folder, counters = tmp_path / "id", Counter()
    enrol(folder, invite(site), url)
    upkeep = IdentityUpkeep(folder, check_s=1.0, counters=counters)
    upkeep.look()
    assert (counters["identity_renewed"], counters["identity_days_left"]) == (0, 29)
    site.enrolment.authority.rotate(site.now)
    site.publisher.publish()
    upkeep.look()
    assert counters["identity_renewed"] == 1
    site.enrolment.revoke("line-1", reason="x", actor="x", now=site.now)
    age(site, folder, 11)
    upkeep.look()
    assert counters["identity_check_failed"] == 1


def test_a_clock_before_the_certificates_day_does_not_cut_a_box_off(site: Site, url: str, tmp_path: Path) -> None:
    folder = tmp_path / "id"
    enrol(folder, invite(site), url)
    wrong, right = tls(folder, 0.0), tls(folder, time.time())
    for one in (wrong, right):
        one.follow()
    assert wrong.context.verify_flags & 0x200000
    assert not right.context.verify_flags & 0x200000
    assert wrong.context.verify_mode is ssl.CERT_REQUIRED
    assert wrong.context.check_hostname
    assert not renew(folder, 0.0)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"token": 1}', b"\xff" * 100, b'{"token":"x","csr_pem":"y","z":1}']
)
def test_bodies_that_are_no_requests_are_refused_by_code(site: Site, url: str, body: bytes) -> None:
    status, answer = post(url, "/api/v1/enrolments", body)
    assert status == 422
    assert msgspec.json.decode(answer)["code"] == "api.malformed"


def test_an_oversize_body_is_refused_before_it_is_parsed(site: Site, url: str) -> None:
    status, answer = post(url, "/api/v1/renewals", b"x" * 40_000)
    assert status == 413
    assert msgspec.json.decode(answer)["code"] == "api.oversize"
    assert site.counters["identity_refused_api.oversize"] == 1


def post(url: str, path: str, body: bytes) -> tuple[int, bytes]:
    import http.client
    from urllib.parse import urlsplit

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    parts = urlsplit(url)
    connection = http.client.HTTPSConnection(parts.hostname, parts.port, context=context, timeout=300)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_broken_identity_files_are_named_not_guessed(site: Site, url: str, tmp_path: Path) -> None:
    folder = tmp_path / "id"
    with pytest.raises(ConfigError) as caught:
        renew(folder, time.time())
    assert caught.value.code == "identity.absent"
    enrol(folder, invite(site), url)
    (folder / FACTS).write_bytes(b"{")
    with pytest.raises(SortlineError) as broken:
        renew(folder, time.time())
    assert broken.value.code == "identity.unreadable"
    config = with_identity(
        AgentConfig(id="line-1", state_dir=str(tmp_path), identity=IdentityConfig(folder=str(folder)))
    )
    assert config.id == "line-1"
    assert config.broker.tls_cert, "the line runs; the broker is asked by certificate or not at all"
    (folder / PAIR).write_bytes(b"torn")
    with pytest.raises(ConfigError):
        tls(folder).follow()


def test_the_command_enrols_and_reads_the_token_from_its_input(site: Site, url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_agent", "enrol", "--token", "-", "--control-plane", url]
    done = subprocess.run(
        [*command, "--state-dir", str(tmp_path / "box"), "--json"],
        input=invite(site) + "\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert msgspec.json.decode(done.stdout)["agent"] == "line-1"
    assert (tmp_path / "box" / "identity" / PAIR).exists()
