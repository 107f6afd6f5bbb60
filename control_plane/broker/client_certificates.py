"""The identity of a client by its certificate.

Follows the site's files: trust, the server's own pair, admission, revocations.

Role and name are in the certificate's URI; the common name and the names in CONNECT are ignored. Every name must also
be on the admission list, whatever issuer signed its certificate; a revoked serial is refused; a client whose
certificate expires is disconnected also in the middle of a session. The list has no end date: an old one still admits
its clients. TLS itself (signatures, chains, purposes, dates) is OpenSSL's.
"""

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from control_plane.broker.access import Identity, Role
from models.errors import ConfigError

_ROLES: Final = {"urn:sortline:agent": Role.AGENT, "urn:sortline:control-plane": Role.CONTROL_PLANE}
TRUST: Final = "ca.pem"
PAIR: Final = "server.pem"
ADMISSION: Final = "admission.json"


class _Admission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema_version: Literal[1]
    agents: frozenset[Annotated[str, msgspec.Meta(max_length=63)]]
    revoked_serials: frozenset[Annotated[str, msgspec.Meta(max_length=40)]] = frozenset()
    control_planes: frozenset[Annotated[str, msgspec.Meta(max_length=63)]] = frozenset()


class Certificates:
    """The identities of a running broker.

    Args:
        site: Folder with `ca.pem`, `server.pem`, `admission.json`.
        clock: Seconds since 1970.

    Raises:
        ConfigError: `broker.bad_tls`, `broker.bad_admission`.
    """

    def __init__(self, site: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._site, self._clock = site, clock
        self._stamps: dict[str, tuple[int, int]] = {}
        self._trust: frozenset[str] = frozenset()
        self._admission: _Admission
        self.context: ssl.SSLContext
        """The TLS context of later connections."""
        self.withdrawn_trust = False
        """Whether a root is no longer trusted, so that every connection must authenticate again."""
        self.reload()

    def reload(self) -> bool:
        """Reads changed files again; returns whether anything changed.

        Raises:
            ConfigError: `broker.bad_tls`, `broker.bad_admission`; the former state stays.
        """
        stamps = {name: self._stamp(name) for name in (TRUST, PAIR, ADMISSION)}
        if stamps == self._stamps:
            return False
        if stamps[ADMISSION] != self._stamps.get(ADMISSION):
            self._admission = self._read_admission()
        if any(stamps[name] != self._stamps.get(name) for name in (TRUST, PAIR)):
            self._read_context()
        self._stamps = stamps
        return True

    def _stamp(self, name: str) -> tuple[int, int]:
        try:
            status = (self._site / name).stat()
        except OSError as error:
            raise ConfigError(
                "broker.bad_tls",
                f"{self._site / name} cannot be read; `sortline ca init` makes the site's certificates.",
                expected="site files",
                got=error.strerror,
            ) from error
        return status.st_mtime_ns, status.st_ino

    def _read_admission(self) -> _Admission:
        path = self._site / ADMISSION
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Admission)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(
                "broker.bad_admission", f"{path} is no admission list.", expected="our JSON", got=str(error)[:200]
            ) from error

    def _read_context(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        # No resumption: every connection is checked in full.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
        try:
            trust = (self._site / TRUST).read_text(encoding="ascii")
            context.load_verify_locations(cadata=trust)
            context.load_cert_chain(self._site / PAIR)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "broker.bad_tls",
                "The site's certificates cannot be used.",
                expected=f"{TRUST}, {PAIR} in {self._site}",
                got=error,
            ) from error
        roots = frozenset(trust.split("-----END CERTIFICATE-----\n")[:-1])
        self.withdrawn_trust = self.withdrawn_trust or not self._trust <= roots
        self.context, self._trust = context, roots

    def identify(self, peer: Any) -> Identity | None:
        """Returns the identity of a verified certificate; None = this client may not connect.

        Args:
            peer: `SSLObject.getpeercert()`.
        """
        uris = [value for kind, value in (peer or {}).get("subjectAltName", ()) if kind == "URI"]
        if len(uris) != 1:
            return None
        prefix, _, name = uris[0].rpartition(":")
        role = _ROLES.get(prefix)
        if role is None or not name:
            return None
        identity = Identity(
            name, role, serial=peer["serialNumber"], not_after_s=ssl.cert_time_to_seconds(peer["notAfter"])
        )
        if not self.known(identity):
            # The agent may have enrolled a moment ago, so the list is read now, not at the next turn.
            self.reload()
        return identity if self.known(identity) else None

    def known(self, identity: Identity) -> bool:
        """Returns whether the identity may (still) be connected."""
        admission = self._admission
        return (
            identity.serial not in admission.revoked_serials
            and self._clock() < identity.not_after_s
            and identity.name in (admission.agents if identity.role is Role.AGENT else admission.control_planes)
        )
