"""Certificates are given once, to the right key, in the right name; what is stolen, late or replayed gets nothing."""

import sqlite3
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlmodel import select

from control_plane.database.audit import broken_audit_entry
from control_plane.database.engine import reading
from control_plane.database.tables.audit import Audit
from control_plane.identity.authority import Authority
from control_plane.identity.mosquitto import access_list, update_profile, write_profile
from control_plane.identity.publication import Admission, refresh_site
from models.errors import ConfigError, ConflictError, InputError
from models.identity import Token, parse_token, renewal_statement
from tests.simulators.postgres import empty
from tests.simulators.site import Site, leaf, make_site, new_key, renewal, request


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=[pytest.mark.postgresql, pytest.mark.slow])])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    url = request.getfixturevalue("postgres") if request.param == "postgresql" else ""
    if url:
        empty(url)
    found = make_site(tmp_path, url=url)
    yield found
    found.engine.dispose()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    found = make_site(tmp_path)
    yield found
    found.engine.dispose()


def code_of(caught: pytest.ExceptionInfo) -> str:
    return caught.value.code


def admission(site: Site) -> Admission:
    return msgspec.json.decode((site.files / "admission.json").read_bytes(), type=Admission)


SECRETS = st.text("abcXYZ019-_", min_size=32, max_size=32)


@settings(max_examples=40)
@given(SECRETS, st.text("0123456789abcdef", min_size=64, max_size=64))
def test_a_token_reads_back(secret: str, pin: str) -> None:
    token = Token("line-1", secret, pin)
    assert parse_token(f" {token}\n") == token


@settings(max_examples=40)
@given(st.text(max_size=300))
def test_text_that_is_no_token_is_refused_by_code(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_token(text)
    assert code_of(caught) in {"identity.bad_token", "agent.bad_id"}


def test_a_token_gives_one_certificate_for_the_agent_it_names(site: Site) -> None:
    token = site.enrolment.invite("line-1", actor="anna", now=site.now)
    answer = site.enrolment.enrol(str(token), request(new_key(), "control-plane-control"), now=site.now)
    certificate = leaf(answer)
    assert certificate.subject.rfc4514_string() == "CN=line-1", "the name comes from the token"
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc < timedelta(days=30, hours=1)
    assert answer.renew_after_s - answer.not_before_s == 10 * 86400
    with pytest.raises(ConflictError) as caught:
        site.enrolment.enrol(str(token), request(new_key()), now=site.now)
    assert code_of(caught) == "identity.token_refused"
    assert admission(site).agents == ("line-1",)


def test_a_lost_answer_is_given_again_to_the_same_key_only(site: Site) -> None:
    token, key = site.enrolment.invite("line-1", actor="anna", now=site.now), new_key()
    first = site.enrolment.enrol(str(token), request(key), now=site.now)
    assert site.enrolment.enrol(str(token), request(key), now=site.forward(minutes=5)) == first
    with pytest.raises(ConflictError):
        site.enrolment.enrol(str(token), request(key), now=site.forward(hours=1))


@pytest.mark.parametrize("trick", ["expired", "other agent", "wrong secret", "newer token", "revoked"])
def test_a_token_that_is_not_good_any_more_gives_nothing(here: Site, trick: str) -> None:
    token = here.enrolment.invite("line-1", actor="anna", now=here.now)
    here.enrolment.invite("line-2", actor="anna", now=here.now)
    if trick == "expired":
        here.forward(hours=1, seconds=1)
    elif trick == "other agent":
        token = Token("line-2", token.secret, token.pin)
    elif trick == "wrong secret":
        token = Token("line-1", "A" * 32, token.pin)
    elif trick == "newer token":
        here.enrolment.invite("line-1", actor="anna", now=here.now)
    else:
        here.enrolment.revoke("line-1", reason="lost", actor="anna", now=here.now)
    with pytest.raises(ConflictError) as caught:
        here.enrolment.enrol(str(token), request(new_key()), now=here.now)
    assert code_of(caught) == "identity.token_refused"
    assert admission(here).agents == ()


def test_a_request_for_an_authority_gets_a_leaf_and_a_bad_one_does_not_use_up_the_token(here: Site) -> None:
    token = here.enrolment.invite("line-1", actor="anna", now=here.now)
    p384 = request(ec.generate_private_key(ec.SECP384R1()))  # type: ignore[arg-type]
    for bad in ("", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", p384):
        with pytest.raises(InputError) as caught:
            here.enrolment.enrol(str(token), bad, now=here.now)
        assert code_of(caught) == "identity.bad_request"
    greedy = request(
        new_key(),
        "root",
        x509.BasicConstraints(ca=True, path_length=None),
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:sortline:control-plane:x")]),
    )
    certificate = leaf(here.enrolment.enrol(str(token), greedy, now=here.now))
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:sortline:agent:line-1"]


@pytest.mark.parametrize("name", ["control-plane", "control-plane-bulk", "broker", "../x", "Line", "", "a" * 64])
def test_names_of_the_sites_own_programs_and_bad_ones_cannot_be_enrolled(here: Site, name: str) -> None:
    with pytest.raises(InputError) as caught:
        here.enrolment.invite(name, actor="anna", now=here.now)
    assert code_of(caught) in {"identity.reserved_name", "agent.bad_id"}


def test_two_boxes_with_one_token_at_once_give_one_certificate(site: Site) -> None:
    token = str(site.enrolment.invite("line-1", actor="anna", now=site.now))
    results: list[str] = []
    barrier = threading.Barrier(6)

    def race() -> None:
        csr = request(new_key())
        barrier.wait()
        try:
            site.enrolment.enrol(token, csr, now=site.now)
            results.append("enrolled")
        except ConflictError as error:
            results.append(error.code)

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["enrolled"] + ["identity.token_refused"] * 5


def test_only_the_hash_of_a_token_is_kept(here: Site) -> None:
    token = here.enrolment.invite("line-1", actor="anna", now=here.now)
    here.engine.dispose()
    connection = sqlite3.connect(str(here.engine.url.database))
    dump = "\n".join(connection.iterdump())
    connection.close()
    assert token.secret not in dump
    assert token.secret_sha256 in dump


# -- renewal ----------------------------------------------------------------------------------------------------------


def test_a_renewal_proves_the_old_key_and_brings_a_new_one(site: Site) -> None:
    old, new = new_key(), new_key()
    answer = site.enrol("line-1", old)
    with pytest.raises(ConflictError) as caught:
        site.enrolment.renew(renewal(answer, old, new), now=site.forward(days=9))
    assert code_of(caught) == "identity.too_early"
    renewed = site.enrolment.renew(renewal(answer, old, new), now=site.forward(days=1, hours=1))
    assert leaf(renewed).public_key() == new.public_key()
    assert leaf(renewed).serial_number != leaf(answer).serial_number
    again = site.enrolment.renew(renewal(answer, old, new), now=site.forward(minutes=1))
    assert again == renewed, "a replay, or a lost answer, changes nothing"


def test_a_renewal_without_the_old_key_or_of_a_foreign_certificate_is_refused(here: Site, tmp_path: Path) -> None:
    old, new = new_key(), new_key()
    answer = here.enrol("line-1", old)
    here.forward(days=11)
    (tmp_path / "other").mkdir()
    other = make_site(tmp_path / "other", now=here.now - timedelta(days=11), other=True)
    foreign_key = new_key()
    foreign = other.enrol("line-1", foreign_key)
    other.engine.dispose()
    good = renewal(answer, old, new)
    tricks = [
        renewal(answer, new, new),  # signed by the new key
        renewal(foreign, foreign_key, new),  # another site's line-1
        msgspec.structs.replace(good, signature=b""),
        msgspec.structs.replace(good, csr_pem=request(new_key())),  # the signature is for another request
    ]
    for trick in tricks:
        with pytest.raises(ConflictError) as caught:
            here.enrolment.renew(trick, now=here.now)
        assert code_of(caught) == "identity.proof_refused"
    with pytest.raises(InputError):
        here.enrolment.renew(msgspec.structs.replace(good, certificate_pem="x"), now=here.now)
    assert here.enrolment.renew(good, now=here.now)


def test_the_sites_own_certificates_cannot_be_renewed_as_an_agents(here: Site) -> None:
    from cryptography.hazmat.primitives import hashes, serialization

    from models.identity import RenewalRequest

    data = (here.files / "bulk.pem").read_bytes()
    key = serialization.load_pem_private_key(data, None)
    pem = data[data.index(b"-----BEGIN CERTIFICATE-----") :].decode()
    csr = request(new_key())
    signature = key.sign(renewal_statement(pem, csr), ec.ECDSA(hashes.SHA256()))  # type: ignore[union-attr, call-arg, arg-type]
    with pytest.raises(ConflictError) as caught:
        here.enrolment.renew(
            RenewalRequest(certificate_pem=pem, csr_pem=csr, signature=signature), now=here.forward(days=11)
        )
    assert code_of(caught) == "identity.proof_refused"


def test_a_key_is_certified_once(here: Site) -> None:
    key = new_key()
    here.enrol("line-1", key)
    with pytest.raises(ConflictError) as caught:
        here.enrol("line-2", key)
    assert code_of(caught) == "identity.key_reused"


def test_an_expired_box_needs_its_old_key_and_a_persons_approval(site: Site) -> None:
    old, new = new_key(), new_key()
    answer = site.enrol("line-1", old)
    late = renewal(answer, old, new)
    with pytest.raises(ConflictError) as caught:
        site.enrolment.renew(late, now=site.forward(days=40))
    assert code_of(caught) == "identity.approval_needed"
    (facts,) = site.enrolment.identities(site.now)
    assert (facts["state"], facts["approval_asked_at"] is not None) == ("expired", True)
    site.enrolment.approve_renewal("line-1", actor="anna", now=site.now)
    with pytest.raises(ConflictError):
        site.enrolment.renew(renewal(answer, new, new), now=site.now)
    fresh = site.enrolment.renew(late, now=site.forward(hours=1))
    assert leaf(fresh).not_valid_after_utc > site.now + timedelta(days=29)
    with pytest.raises(ConflictError) as caught:
        site.enrolment.renew(renewal(answer, old, new_key()), now=site.now)
    assert code_of(caught) == "identity.approval_needed", "an approval works once"


def test_a_revoked_certificate_stays_revoked(site: Site) -> None:
    old = new_key()
    answer = site.enrol("line-1", old)
    site.enrol("line-2")
    assert site.enrolment.revoke("line-1", reason="stolen", actor="anna", now=site.now) == 1
    with pytest.raises(ConflictError) as caught:
        site.enrolment.renew(renewal(answer, old, new_key()), now=site.forward(days=11))
    assert code_of(caught) == "identity.revoked"
    with pytest.raises(ConflictError):
        site.enrolment.approve_renewal("line-1", actor="anna", now=site.now)
    found = admission(site)
    assert found.agents == ("line-2",)
    assert [int(serial, 16) for serial in found.revoked_serials] == [leaf(answer).serial_number]
    again = site.enrol("line-1")
    assert "line-1" in admission(site).agents
    with pytest.raises(ConflictError):
        site.enrolment.renew(renewal(answer, old, new_key()), now=site.forward(days=11))
    assert leaf(again).serial_number not in {int(s, 16) for s in admission(site).revoked_serials}


def test_a_replaced_box_loses_its_certificate_to_the_new_one(here: Site) -> None:
    first = here.enrol("line-1")
    second = here.enrol("line-1")
    revoked = {int(serial, 16) for serial in admission(here).revoked_serials}
    assert revoked == {leaf(first).serial_number}
    assert leaf(second).serial_number not in revoked


def test_every_step_is_in_the_audit_trail(here: Site) -> None:
    key = new_key()
    answer = here.enrol("line-1", key)
    here.enrolment.renew(renewal(answer, key, new_key()), now=here.forward(days=11))
    here.enrolment.revoke("line-1", reason="sold", actor="anna", now=here.now)
    with reading(here.engine) as session:
        actions = [entry.action for entry in session.exec(select(Audit).order_by(Audit.id))]  # type: ignore[arg-type]
        assert broken_audit_entry(session) is None
    assert actions == ["identity.invite", "identity.enrol", "identity.renew", "identity.revoke"]


def test_messages_of_a_revoked_agent_are_not_stored(tmp_path: Path) -> None:
    """A broker with an older revocation list delivers it; nothing is stored and nothing acknowledged."""
    from control_plane.database.tables.agents import Agent
    from models.errors import MessageError
    from models.messages import Presence, encode
    from models.topics import Channel, agent_topic
    from tests.control_plane.fleet.test_fleet import BOOT, batch, window
    from tests.simulators.plane import make_services

    services = make_services(tmp_path / "plane")
    site = make_site(tmp_path, url=str(services.engine.url))
    site.enrol("line-1")
    presence = encode(Presence(online=True, boot_id=BOOT))
    services.ingest.take(agent_topic("line-1", Channel.PRESENCE), presence)
    site.enrolment.revoke("line-1", reason="stolen", actor="anna", now=site.now)
    for channel, payload in ((Channel.PRESENCE, presence), (Channel.BATCH, batch(window()))):
        with pytest.raises(MessageError) as caught:
            services.ingest.take(agent_topic("line-1", channel), payload)
        assert code_of(caught) == "identity.revoked"
    with reading(services.engine) as session:
        agent = session.get(Agent, "line-1")
        assert agent is not None
        assert not agent.online
    site.engine.dispose()
    services.engine.dispose()


# -- the authority ----------------------------------------------------------------------------------------------------


def verify(certificates_pem: str, anchors_pem: bytes, site: Site) -> None:
    """Verifies a chain with an independent verifier, cryptography's path building of RFC 5280."""
    from cryptography.x509.verification import PolicyBuilder, Store

    chain = x509.load_pem_x509_certificates(certificates_pem.encode())
    store = Store(x509.load_pem_x509_certificates(anchors_pem))
    verifier = PolicyBuilder().store(store).time(site.now).build_client_verifier()
    verifier.verify(chain[0], chain[1:])


def test_an_enrolled_certificate_verifies_against_the_root(here: Site) -> None:
    answer = here.enrol("line-1")
    verify(answer.certificate_pem, answer.ca_pem.encode(), here)


def test_a_new_root_is_followed_by_agents_that_were_away(here: Site) -> None:
    key = new_key()
    before = here.enrol("line-1", key)
    old_roots = here.enrolment.authority.anchors_pem
    here.enrolment.authority.rotate(here.forward(days=1))
    here.publisher.publish()
    server = (here.files / "server.pem").read_text()
    after = here.enrol("line-2")
    verify(after.certificate_pem, old_roots, here)  # a verifier that has only the old root
    roots = here.enrolment.authority.anchors_pem
    verify(before.certificate_pem, roots, here)
    assert len(x509.load_pem_x509_certificates(roots)) == 2
    renewed = here.enrolment.renew(renewal(before, key, new_key()), now=here.now)
    new_root = x509.load_pem_x509_certificates(roots)[0]
    assert new_root.fingerprint(_sha()).hex() == here.enrolment.authority.pin
    here.enrolment.authority.retire()
    only_new = here.enrolment.authority.anchors_pem
    verify(renewed.certificate_pem, only_new, here)
    with pytest.raises(x509.verification.VerificationError):
        verify(before.certificate_pem, only_new, here)
    assert server.count("BEGIN CERTIFICATE") == 3, "leaf, issuing authority, cross certificate"
    token = here.enrolment.invite("line-3", actor="x", now=here.now)
    assert token.pin == here.enrolment.authority.pin


def _sha() -> object:
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()


def test_the_root_key_may_be_elsewhere_and_only_rotation_asks_for_it(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    stick = tmp_path / "stick" / "root.key"
    stick.parent.mkdir()
    held = Authority.create(tmp_path / "ca", site="S", names=["b"], now=now, root_key=stick)
    refresh_site(held, now)
    assert not list((tmp_path / "ca").glob("root-*.key"))
    assert stick.stat().st_mode & 0o077 == 0
    for path in (tmp_path / "ca").rglob("*.key"):
        assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError) as caught:
        held.rotate(now)
    assert code_of(caught) == "ca.no_root_key"
    assert held.rotate(now, root_key=stick, keep_root=True).current.root == 1
    assert held.rotate(now, root_key=stick).current.root == 2
    with pytest.raises(ConfigError) as caught:
        Authority(tmp_path / "ca").rotate(now, root_key=stick)
    assert code_of(caught) == "ca.no_root_key", "the old root's key is not the new one's"
    with pytest.raises(ConflictError) as other:
        Authority.create(tmp_path / "ca", site="S", names=["b"], now=now)
    assert code_of(other) == "ca.exists"
    with pytest.raises(ConflictError) as other:
        Authority(tmp_path / "none")
    assert code_of(other) == "ca.absent"


def test_the_sites_certificates_are_renewed_in_time_and_only_then(here: Site) -> None:
    authority = here.enrolment.authority
    assert refresh_site(authority, here.now) == []
    assert refresh_site(authority, here.forward(days=11)) == ["control.pem", "bulk.pem"]
    assert refresh_site(authority, here.forward(days=20)) == ["server.pem", "control.pem", "bulk.pem"]
    (here.files / "server.pem").write_bytes(b"torn")
    assert refresh_site(authority, here.now) == ["server.pem"]
    renamed = authority.rename(["broker.plant", "10.0.0.5"])
    assert refresh_site(renamed, here.now) == ["server.pem"]
    for name in ("server.pem", "control.pem", "bulk.pem"):
        assert (here.files / name).stat().st_mode & 0o077 == 0


def test_a_replica_of_the_control_plane_gets_a_pair_and_a_name_of_its_own(here: Site, tmp_path: Path) -> None:
    replicated = here.enrolment.authority.add_replica("b")
    assert refresh_site(replicated, here.now) == ["control-b.pem", "bulk-b.pem"]
    here.publisher.publish()
    assert "control-plane-b-bulk" in admission(here).control_planes
    write_profile(replicated, tmp_path / "mosquitto")
    assert "user control-plane-b-control" in (tmp_path / "mosquitto" / "acl").read_text()
    with pytest.raises(InputError) as caught:
        replicated.add_replica("../b")
    assert code_of(caught) == "ca.bad_name"


def test_revocation_lists_last_a_year_and_are_renewed_each_week(here: Site) -> None:
    here.enrol("line-1")
    here.enrolment.revoke("line-1", reason="x", actor="x", now=here.now)
    path = here.files / "crl.pem"
    found = x509.load_pem_x509_crl(path.read_bytes())
    assert len(list(found)) == 1
    assert found.next_update_utc - here.now > timedelta(days=365)
    before = path.read_bytes()
    here.forward(days=6)
    here.publisher.publish()
    assert path.read_bytes() == before
    here.forward(days=2)
    here.publisher.publish()
    assert path.read_bytes() != before


# -- mosquitto's profile ----------------------------------------------------------------------------------------------


def test_the_profile_follows_enrolment_and_revocation_and_leaves_the_configuration_alone(
    here: Site, tmp_path: Path
) -> None:
    here.enrol("line-1")
    folder = tmp_path / "mosquitto"
    write_profile(here.enrolment.authority, folder, host="127.0.0.1", port=8883)
    text = (folder / "mosquitto.conf").read_text()
    for line in ("require_certificate true", "use_username_as_clientid true", "max_packet_size 1048576"):
        assert line in text.splitlines()
    assert "user line-1" in (folder / "acl").read_text()
    (folder / "mosquitto.conf").write_text(text + "# mine\n")
    here.enrolment.revoke("line-1", reason="x", actor="x", now=here.now)
    assert update_profile(here.files, folder)
    assert "user line-1" not in (folder / "acl").read_text()
    assert not update_profile(here.files, folder)
    write_profile(here.enrolment.authority, folder)
    assert (folder / "mosquitto.conf").read_text().endswith("# mine\n")


def test_no_agent_is_named_in_another_agents_block() -> None:
    for block in access_list(["line-1", "line-2"], ["control-plane-control", "control-plane-bulk"]).split("\n\n")[3:]:
        name = block.splitlines()[0].removeprefix("user ")
        assert all(f"/agents/{name}/" in line for line in block.splitlines() if "/agents/" in line)
