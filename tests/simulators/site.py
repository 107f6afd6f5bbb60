"""A site with a certificate authority: enrolment over a database of its own, a settable clock, real HTTPS."""

import atexit
import contextlib
import functools
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import Engine

from control_plane.api.enrolment import create_device_app
from control_plane.database.engine import open_database
from control_plane.database.migrate import migrate
from control_plane.identity.authority import SITE, Authority
from control_plane.identity.enrolment import Enrolment
from control_plane.identity.listener import DeviceListener
from control_plane.identity.mosquitto import update_profile, write_profile
from control_plane.identity.publication import SiteFiles, refresh_site
from edge_agent.identity.certificate import ANCHORS, FACTS, PAIR, Facts
from models.identity import Enrolled, RenewalRequest, renewal_statement
from tests.simulators.processes import MOSQUITTO, embedded_broker, free_port, listens, running, wait_until


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def request(key: ec.EllipticCurvePrivateKey, name: str = "x", *extensions: x509.ExtensionType) -> str:
    """Returns a certificate request, also for names and extensions that must be refused."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def key_text(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def leaf(answer: Enrolled) -> x509.Certificate:
    return x509.load_pem_x509_certificate(answer.certificate_pem.encode())


def renewal(answer: Enrolled, old: ec.EllipticCurvePrivateKey, new: ec.EllipticCurvePrivateKey) -> RenewalRequest:
    """A renewal as an honest agent asks for it."""
    end = "-----END CERTIFICATE-----\n"
    certificate, csr = answer.certificate_pem.partition(end)[0] + end, request(new)
    signature = old.sign(renewal_statement(certificate, csr), ec.ECDSA(hashes.SHA256()))
    return RenewalRequest(certificate_pem=certificate, csr_pem=csr, signature=signature)


@dataclass
class Site:
    """Everything the identity of a site needs, without a control plane around it."""

    folder: Path
    engine: Engine
    enrolment: Enrolment
    publisher: SiteFiles
    now: datetime
    counters: Counter[str] = field(default_factory=Counter)
    followers: list[Callable[[], object]] = field(default_factory=list)

    @property
    def files(self) -> Path:
        return self.folder / SITE

    def identity(self, agent: str, folder: Path) -> Path:
        """Enrols an agent and lays its identity down as its own command would."""
        folder.mkdir(parents=True)
        key = new_key()
        answer = self.enrol(agent, key)
        (folder / PAIR).write_bytes(key_text(key) + answer.certificate_pem.encode())
        (folder / ANCHORS).write_text(answer.ca_pem)
        (folder / FACTS).write_bytes(msgspec.json.encode(Facts.of(answer, "https://127.0.0.1:1")))
        return folder

    def tls(self, pair: Path | None) -> ssl.SSLContext:
        """A client's context: trusts the site, shows a pair of key and chain."""
        context = ssl.create_default_context(cafile=str(self.files / "ca.pem"))
        if pair is not None:
            context.load_cert_chain(pair)
        return context

    def forward(self, **time: float) -> datetime:
        self.now += timedelta(**time)
        return self.now

    def enrol(self, agent: str, key: ec.EllipticCurvePrivateKey | None = None) -> Enrolled:
        token = self.enrolment.invite(agent, actor="test", now=self.now)
        return self.enrolment.enrol(str(token), request(key or new_key()), now=self.now)

    def pair(self, agent: str, path: Path) -> Path:
        """Enrols an agent and writes its key and chain to one file."""
        key = new_key()
        answer = self.enrol(agent, key)
        path.write_bytes(key_text(key) + answer.certificate_pem.encode())
        return path


@functools.cache
def _migrated() -> Path:
    """Empty tables to copy: migrations take longer than most tests."""
    path = Path(tempfile.mkdtemp(prefix="sortline-test-")) / "empty.sqlite"
    atexit.register(shutil.rmtree, path.parent)
    migrate(f"sqlite:///{path}")
    open_database(f"sqlite:///{path}").dispose()
    return path


@functools.cache
def _authority() -> Path:
    """An authority to copy: its many durable writes take longer than most tests."""
    folder = Path(tempfile.mkdtemp(prefix="sortline-test-"))
    atexit.register(shutil.rmtree, folder)
    now = datetime.now(UTC)
    refresh_site(Authority.create(folder / "identity", site="Test", names=["localhost", "127.0.0.1"], now=now), now)
    return folder / "identity"


def make_site(
    root: Path, *, url: str = "", now: datetime | None = None, broker: tuple[str, int] = ("", 0), other: bool = False
) -> Site:
    """A site; `other` has an authority of its own, all the rest share one."""
    if url:
        migrate(url)
    else:
        shutil.copyfile(_migrated(), root / "site.sqlite")
        url = f"sqlite:///{root / 'site.sqlite'}"
    engine = open_database(url)
    if other:
        Authority.create(root / "identity", site="Test", names=["localhost", "127.0.0.1"], now=now or datetime.now(UTC))
    else:
        shutil.copytree(_authority(), root / "identity")
    now = now or datetime.now(UTC)
    authority = Authority(root / "identity")
    numbers = count(1)
    enrolment = Enrolment(engine, authority, new_secret=lambda: f"{next(numbers):032d}", broker=broker)
    followers: list[Callable[[], object]] = []

    def follow() -> None:
        for follower in followers:
            follower()

    publisher = SiteFiles(authority, enrolment.admitted, clock=lambda: site.now, followers=(follow,))
    site = Site(root / "identity", engine, enrolment, publisher, now, followers=followers)
    enrolment.publish = site.publisher.publish
    site.publisher.publish()
    return site


@contextlib.contextmanager
def https(site: Site) -> Iterator[str]:
    """The enrolment listener, really; yields its URL."""
    with device_listener(site) as (url, _):
        yield url


@contextlib.contextmanager
def device_listener(site: Site) -> Iterator[tuple[str, DeviceListener]]:
    """The enrolment listener with its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_device_app(site.enrolment, site.counters)
    server = DeviceListener(app, listener, site.files / "server.pem", site.publisher, lambda _name: None)
    server.start()
    try:
        wait_until(lambda: server.started, "the listener")
        yield f"https://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.stop()


@contextlib.contextmanager
def embedded_mtls(site: Site, folder: Path, *arguments: str) -> Iterator[int]:
    """The embedded broker under the site's certificates; yields its port."""
    with embedded_broker(folder, "--site", str(site.files), *arguments) as port:
        yield port


@contextlib.contextmanager
def mosquitto_mtls(site: Site, folder: Path) -> Iterator[int]:
    """mosquitto under the generated profile, which follows the site; yields its port."""
    if not Path(MOSQUITTO).exists():
        pytest.skip("the program mosquitto is not installed")
    profile, port = folder / "profile", free_port()
    write_profile(site.enrolment.authority, profile, host="127.0.0.1", port=port)
    if os.geteuid() == 0:  # it would give up root, and then not read our files again
        conf = profile / "mosquitto.conf"
        conf.write_text(conf.read_text() + "user root\n")
    follow = lambda: update_profile(site.files, profile)  # noqa: E731
    site.followers.append(follow)
    try:
        with running([MOSQUITTO, "-c", str(profile / "mosquitto.conf")], stderr=subprocess.DEVNULL):
            wait_until(lambda: listens(port), "mosquitto")
            yield port
    finally:
        site.followers.remove(follow)
