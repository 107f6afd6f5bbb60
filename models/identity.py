"""Enrolment of an agent: the one-time token, and the requests and answers of the two sides over HTTPS.

Keys and certificates travel as PEM text and are not parsed here. The token pins the site's certificate
authority, so that the first contact is safe without any trust installed before; the secret in it is sent only over a
connection whose certificate that authority has signed. Names, lifetimes and roles come from the control plane, never
from the agent's request.
"""

import hashlib
import re
from typing import Annotated, Final, Literal

import msgspec

from models.errors import InputError
from models.messages import AgentId
from models.topics import check_agent_id

TOKEN_SCHEME: Final = "sortline1"  # noqa: S105  a version, no secret
ANCHORS_PATH: Final = "/api/v1/ca"
ENROLMENTS_PATH: Final = "/api/v1/enrolments"
RENEWALS_PATH: Final = "/api/v1/renewals"
MAX_REQUEST_BYTES: Final = 32 * 1024
MAX_ANSWER_BYTES: Final = 256 * 1024
_SECRET = re.compile(r"^[A-Za-z0-9_-]{32}\Z")
_PIN = re.compile(r"^[0-9a-f]{64}\Z")

Pem = Annotated[str, msgspec.Meta(min_length=1, max_length=8192)]


class Token(msgspec.Struct, frozen=True):
    """A one-time permission to enrol: `sortline1.<agent>.<secret>.<pin>`."""

    agent: str
    secret: str
    """192 random bits, base64url."""
    pin: str
    """SHA-256 of the root certificate (DER), hexadecimal."""

    def __str__(self) -> str:
        return f"{TOKEN_SCHEME}.{self.agent}.{self.secret}.{self.pin}"

    @property
    def secret_sha256(self) -> str:
        """What is kept of the secret: 192 random bits need no slow hash."""
        return hashlib.sha256(self.secret.encode()).hexdigest()


def parse_token(text: str) -> Token:
    """Reads a token; `parse_token(str(token)) == token`.

    Raises:
        InputError: `identity.bad_token`, `agent.bad_id`.
    """
    parts = text.strip().split(".")
    if len(parts) != 4 or parts[0] != TOKEN_SCHEME or not _SECRET.match(parts[2]) or not _PIN.match(parts[3]):
        raise InputError(
            "identity.bad_token",
            "This is no enrolment token; copy it whole from `sortline agents enrol NAME`.",
            expected=f"{TOKEN_SCHEME}.<agent>.<secret>.<pin>",
            got=f"{len(parts)} parts, {len(text)} characters",
        )
    return Token(check_agent_id(parts[1]), parts[2], parts[3])


class Anchors(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `GET /api/v1/ca`: which authorities the site trusts now. Public."""

    schema_version: Literal[1] = 1
    ca_pem: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ANSWER_BYTES)]
    """Root certificates, one or (while one replaces the other) two."""
    issuer: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """SHA-256 of the issuing certificate (DER); a certificate of another issuer is renewed early."""


class EnrolmentRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /api/v1/enrolments`."""

    token: Annotated[str, msgspec.Meta(max_length=256)]
    csr_pem: Pem
    """Only its public key is used."""


class RenewalRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /api/v1/renewals`."""

    certificate_pem: Pem
    """The certificate that is renewed."""
    csr_pem: Pem
    """For a new key."""
    signature: Annotated[bytes, msgspec.Meta(max_length=256)]
    """ECDSA-SHA256 by the old key over `renewal_statement`: proof that the asker holds it."""


def renewal_statement(certificate_pem: str, csr_pem: str) -> bytes:
    """The bytes that the old key signs. A replay asks for the same new key again, and gets the same certificate."""
    digests = (hashlib.sha256(part.strip().encode()).digest() for part in (certificate_pem, csr_pem))
    return b"\0".join((b"sortline-renewal-v1", *digests))


class Enrolled(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to an enrolment or a renewal."""

    schema_version: Literal[1] = 1
    agent: AgentId
    certificate_pem: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ANSWER_BYTES)]
    """The agent's certificate and the ones between it and the root."""
    ca_pem: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ANSWER_BYTES)]
    """Replaces the agent's trust."""
    not_before_s: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    """Seconds since 1970, UTC: a clock that is earlier than this is wrong."""
    not_after_s: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    renew_after_s: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    broker_host: Annotated[str, msgspec.Meta(max_length=255)] = ""
    """Where the MQTT broker is; empty = the agent's configuration says it."""
    broker_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    trust_root: Annotated[str, msgspec.Meta(max_length=MAX_ANSWER_BYTES)] = ""
    """Root metadata for the signatures of bundles, where the control plane has one."""
