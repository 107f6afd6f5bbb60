"""Files for brokers and the site's own programs: trust, their certificates, admitted agents, revocations.

The folder `site/` of the authority: `ca.pem` (trusted roots), `server.pem` (of broker and HTTPS listener),
`control.pem` and `bulk.pem` (the control plane's two connections), `admission.json` (the embedded broker's list) and
`crl.pem` (mosquitto's). Every file is replaced atomically and only when its content changes; a key and its chain are
one file, so that a power cut cannot part them.
"""

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from cryptography import x509

from control_plane.identity.authority import SITE, Authority
from control_plane.identity.certificates import (
    PLANE_URI,
    RENEW_AFTER,
    REVOCATIONS_LIFE,
    certificate_pem,
    issue_client,
    issue_server,
    key_pem,
    new_key,
)
from models.files import write_atomically

SERVER: Final = "server"
_SERVER_RENEW_AFTER: Final = timedelta(days=30)
_REVOCATIONS_RENEW_AFTER: Final = timedelta(days=7)


def control_planes(authority: Authority) -> dict[str, str]:
    """File stem and common name of each of the control plane's connections.

    Brokers may force the client id to the common name, so two connections need two, and so does every replica.
    """
    found = {}
    for replica in ("", *authority.index.replicas):
        for kind in ("control", "bulk"):
            suffix = f"-{replica}" if replica else ""
            found[f"{kind}{suffix}"] = f"control-plane{suffix}-{kind}"
    return found


class Admission(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of `admission.json`: the agents that may connect, and the certificates that may not."""

    schema_version: Literal[1] = 1
    agents: tuple[Annotated[str, msgspec.Meta(max_length=63)], ...]
    revoked_serials: tuple[Annotated[str, msgspec.Meta(max_length=40)], ...] = ()
    control_planes: tuple[Annotated[str, msgspec.Meta(max_length=63)], ...] = ()
    """Common names of the control plane's own connections."""


def refresh_site(authority: Authority, now: datetime) -> list[str]:
    """Renews the site's own certificates where it is time, or where issuer or names changed.

    Returns:
        Names of the files that changed.
    """
    folder = authority.folder / SITE
    folder.mkdir(exist_ok=True, mode=0o700)
    issuer = authority.issuer
    changed = []
    if _replace(folder / "ca.pem", authority.anchors_pem, mode=0o644):
        changed.append("ca.pem")
    path = folder / f"{SERVER}.pem"
    held = _held(path)
    if held is None or _due(held, authority, now, _SERVER_RENEW_AFTER) or _names(held) != set(authority.names):
        key = new_key()
        leaf = issue_server(issuer, key.public_key(), authority.names, now)
        write_atomically(path, key_pem(key) + certificate_pem(leaf) + authority.chain_pem, mode=0o600)
        changed.append(path.name)
    for stem, name in control_planes(authority).items():
        path = folder / f"{stem}.pem"
        held = _held(path)
        if held is None or _due(held, authority, now, RENEW_AFTER):
            key = new_key()
            leaf = issue_client(issuer, key.public_key(), name, PLANE_URI + name, now)
            write_atomically(path, key_pem(key) + certificate_pem(leaf) + authority.chain_pem, mode=0o600)
            changed.append(path.name)
    if not (folder / "admission.json").exists():
        publish_admission(authority, [], [], now)
        changed += ["admission.json", "crl.pem"]
    return changed


def _due(held: x509.Certificate, authority: Authority, now: datetime, after: timedelta) -> bool:
    return held.issuer != authority.issuing.subject or now > held.not_valid_before_utc + after


def _names(held: x509.Certificate) -> set[str]:
    names = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    }


def _held(path: Path) -> x509.Certificate | None:
    """Returns the leaf in a file of key and chain; a broken file counts as none and is written again."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        return None


def publish_admission(
    authority: Authority, agents: list[str], revoked: list[tuple[str, datetime]], now: datetime
) -> bool:
    """Writes the admitted agents for the embedded broker and for mosquitto; returns whether anything changed."""
    folder = authority.folder / SITE
    admission = Admission(
        agents=tuple(agents),
        revoked_serials=tuple(serial for serial, _ in revoked),
        control_planes=tuple(control_planes(authority).values()),
    )
    changed = _replace(folder / "admission.json", msgspec.json.encode(admission), mode=0o644)
    lists = folder / "crl.pem"
    if changed or _revocations_due(lists, authority, now):
        write_atomically(lists, authority.revocations_pem(revoked, now))
        changed = True
    return changed


def _revocations_due(path: Path, authority: Authority, now: datetime) -> bool:
    """Returns whether the lists are older than a week, or one for an issuer is missing."""
    try:
        blocks = path.read_bytes().split(b"-----END X509 CRL-----\n")[:-1]
        lists = [x509.load_pem_x509_crl(block + b"-----END X509 CRL-----\n") for block in blocks]
    except (OSError, ValueError):
        return True
    issuers = {authority.certificate(f"issuing-{one.number}").subject for one in authority.trusted}
    if {one.issuer for one in lists} != issuers:
        return True
    left = min((one.next_update_utc or now) - now for one in lists)
    return left < REVOCATIONS_LIFE - _REVOCATIONS_RENEW_AFTER


def _replace(path: Path, data: bytes, *, mode: int) -> bool:
    """Writes the file unless it holds this content already."""
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        pass
    write_atomically(path, data, mode=mode)
    return True


class SiteFiles:
    """Keeps the site's files in step with the database.

    Args:
        authority: The authority that signs and holds the folder.
        admitted: Returns the agents admitted and revoked now (`Enrolment.admitted`).
        clock: Aware UTC.
        followers: Called after a change, such as a broker's profile writer.
    """

    def __init__(
        self,
        authority: Authority,
        admitted: Callable[[datetime], tuple[list[str], list[tuple[str, datetime]]]],
        *,
        clock: Callable[[], datetime],
        followers: tuple[Callable[[], object], ...] = (),
    ) -> None:
        self._authority, self._admitted, self._clock, self._followers = authority, admitted, clock, followers
        self._lock = threading.Lock()

    def publish(self) -> bool:
        """Brings every file up to date; returns whether one changed."""
        with self._lock:
            now = self._clock()
            self._authority = self._authority.follow()
            changed = bool(refresh_site(self._authority, now))
            agents, revoked = self._admitted(now)
            changed = publish_admission(self._authority, agents, revoked, now) or changed
            if changed:
                for follow in self._followers:
                    follow()
        return changed
