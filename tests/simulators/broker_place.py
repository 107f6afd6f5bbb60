"""A site with a running broker of either kind, two enrolled agents, and ways to connect to it with any certificate."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

from control_plane.identity.certificates import (
    AGENT_URI,
    certificate_pem,
    issue_client,
    issue_server,
)
from tests.simulators.mqtt_probe import Probe
from tests.simulators.site import Site, embedded_mtls, key_text, make_site, mosquitto_mtls, new_key

BROKERS = [
    pytest.param(embedded_mtls, id="embedded"),
    pytest.param(mosquitto_mtls, id="mosquitto", marks=pytest.mark.mosquitto),
]


class Place(NamedTuple):
    site: Site
    port: int
    embedded: bool

    def connect(self, pair: Path | None, client_id: str = "x", **options: object) -> Probe:
        return Probe(self.port, client_id, options, tls=self.site.tls(pair))

    def agent(self, name: str = "line-1", client_id: str = "", **options: object) -> Probe:
        found = self.connect(self.site.folder / f"{name}.pair", client_id or name, **options)
        assert found.code == 0, f"{name} was refused: {found.code}"
        return found

    def plane(self, stem: str = "control", **options: object) -> Probe:
        found = self.connect(self.site.files / f"{stem}.pem", stem, **options)
        assert found.code == 0
        return found

    def forge(self, name: str, **how: object) -> Path:
        """Returns a pair that the site's own issuer signed although no agent enrolled."""
        key, path = new_key(), self.site.folder / f"{name}.forged"
        now = self.site.now - timedelta(days=float(how.pop("days_ago", 0)))  # type: ignore[arg-type]
        issuer = self.site.enrolment.authority.issuer
        if how.pop("server", False):
            leaf = issue_server(issuer, key.public_key(), [name], now)
        else:
            leaf = issue_client(issuer, key.public_key(), name, str(how.pop("uri", AGENT_URI + name)), now)
        path.write_bytes(key_text(key) + certificate_pem(leaf) + self.site.enrolment.authority.chain_pem)
        return path


@contextlib.contextmanager
def open_place(opened: Callable, root: Path) -> Iterator[Place]:
    site = make_site(root)
    for name in ("line-1", "line-2"):
        site.pair(name, site.folder / f"{name}.pair")
    with opened(site, root) as port:
        yield Place(site, port, opened is embedded_mtls)
    site.engine.dispose()
