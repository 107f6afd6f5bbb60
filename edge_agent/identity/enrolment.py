"""Gets and renews the agent's certificate. Runs in the command line or as a short child, never beside the line.

Rules: the key is made here and never leaves; first contact trusts nothing but the pin in the token, and the token's
secret is sent only after the server has proved itself against it; the new key is on disk before it is asked for, so
that a lost answer or a power cut is made good by asking again; what comes back must be for our key and our name.
"""

import hashlib
import http.client
import ssl
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edge_agent.identity.certificate import ANCHORS, FACTS, NEXT_KEY, PAIR, Facts, check_dates, read_facts
from models.errors import ConfigError, ConflictError, InputError, SortlineError, UnavailableError
from models.files import write_atomically
from models.identity import (
    ANCHORS_PATH,
    ENROLMENTS_PATH,
    MAX_ANSWER_BYTES,
    RENEWALS_PATH,
    Anchors,
    Enrolled,
    EnrolmentRequest,
    RenewalRequest,
    parse_token,
    renewal_statement,
)

_TIMEOUT_S = 15.0
_END = "-----END CERTIFICATE-----\n"


def enrol(folder: Path, token_text: str, control_plane: str, *, anchor: Path | None = None) -> Facts:
    """Gets the first certificate for a one-time token, and with it the root of what is signed here.

    Args:
        folder: Folder of the identity; made when it does not exist.
        token_text: From `sortline agents enrol NAME`.
        control_plane: `https://host:port` of the enrolment listener.
        anchor: Where the trust anchor goes when there is none yet; later roots come signed by the earlier ones.

    Raises:
        InputError: `identity.bad_token`, `identity.not_https`, or what the control plane refused.
        ConflictError: `identity.wrong_pin`: this is not the site the token is for; nothing secret was sent.
        UnavailableError: `identity.unreachable`.
    """
    token = parse_token(token_text)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    root = _pinned_root(control_plane, token.pin)
    context = ssl.create_default_context(cadata=root)
    key = _next_key(folder)
    body = EnrolmentRequest(token=token_text.strip(), csr_pem=_request(key, token.agent))
    answer = _call(control_plane, context, "POST", ENROLMENTS_PATH, Enrolled, body)
    return _keep(folder, key, answer, token.agent, control_plane, anchor=anchor)


def _pinned_root(control_plane: str, pin: str) -> str:
    """Returns the root whose digest the token carries, from a server that is not authenticated yet."""
    open_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    open_context.check_hostname = False
    open_context.verify_mode = ssl.CERT_NONE  # only public certificates are read, and compared with the pin
    anchors = _call(control_plane, open_context, "GET", ANCHORS_PATH, Anchors)
    for pem in _blocks(anchors.ca_pem):
        if hashlib.sha256(_der(pem)).hexdigest() == pin:
            return pem
    raise ConflictError(
        "identity.wrong_pin",
        "The server does not show the certificate authority that the token names; nothing secret was sent.",
        expected=pin,
        got=control_plane,
    )


def _blocks(pem: str) -> list[str]:
    return [part + _END for part in pem.split(_END)[:-1]]


def _der(pem: str) -> bytes:
    try:
        return ssl.PEM_cert_to_DER_cert(pem.strip())
    except ValueError as error:
        raise UnavailableError("identity.unreachable", "The server shows no certificate.", got=error) from error


def renew(folder: Path, now_s: float) -> bool:
    """Renews the certificate when it is due, or when the site's issuer was replaced; follows the site's trust.

    Returns:
        Whether there is a new certificate.

    Raises:
        ConfigError: `identity.absent`, `identity.unreadable`.
        UnavailableError: `identity.unreachable`.
        ConflictError: What the control plane refused, such as `identity.approval_needed`, `identity.revoked`.
    """
    facts = read_facts(folder)
    if facts is None:
        raise ConfigError("identity.absent", f"{folder} holds no identity; enrol first.", expected=FACTS, got="nothing")
    try:
        context = ssl.create_default_context(cafile=str(folder / ANCHORS))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError("identity.unreadable", f"{folder / ANCHORS} cannot be used.", got=error) from error
    check_dates(context, facts.not_before_s, now_s)
    anchors = _call(facts.control_plane, context, "GET", ANCHORS_PATH, Anchors)
    chain = _blocks(_chain(folder))
    issuer = hashlib.sha256(_der(chain[1])).hexdigest() if len(chain) > 1 else ""
    if now_s < facts.renew_after_s and anchors.issuer == issuer:
        if anchors.ca_pem != (folder / ANCHORS).read_text(encoding="ascii"):
            write_atomically(folder / ANCHORS, anchors.ca_pem.encode())
        return False
    old_key, new_key = _read_key(folder / PAIR), _next_key(folder)
    csr_pem = _request(new_key, facts.agent)
    signature = old_key.sign(renewal_statement(chain[0], csr_pem), ec.ECDSA(hashes.SHA256()))
    body = RenewalRequest(certificate_pem=chain[0], csr_pem=csr_pem, signature=signature)
    answer = _call(facts.control_plane, context, "POST", RENEWALS_PATH, Enrolled, body)
    _keep(folder, new_key, answer, facts.agent, facts.control_plane)
    return True


def _keep(
    folder: Path,
    key: ec.EllipticCurvePrivateKey,
    answer: Enrolled,
    agent: str,
    control_plane: str,
    *,
    anchor: Path | None = None,
) -> Facts:
    """Writes trust, then key and certificate in one file, then the facts; power may fail after each step."""
    leaf = x509.load_pem_x509_certificate(_blocks(answer.certificate_pem)[0].encode())
    if leaf.public_key() != key.public_key() or answer.agent != agent:
        raise ConflictError(
            "identity.foreign_answer", "The certificate is not for us.", expected=agent, got=answer.agent
        )
    facts = Facts.of(answer, control_plane)
    write_atomically(folder / ANCHORS, answer.ca_pem.encode())
    write_atomically(folder / PAIR, _key_pem(key) + answer.certificate_pem.encode(), mode=0o600)
    if anchor is not None and answer.trust_root and not anchor.exists():
        anchor.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(anchor, answer.trust_root.encode())
    write_atomically(folder / FACTS, msgspec.json.encode(facts))
    (folder / NEXT_KEY).unlink(missing_ok=True)
    return facts


def _next_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """Returns the key to certify, on disk before use: that of an interrupted attempt, or a new one."""
    path = folder / NEXT_KEY
    if path.exists():
        try:
            return _read_key(path)
        except ConfigError:
            path.unlink()  # torn: it never got a certificate
    key = ec.generate_private_key(ec.SECP256R1())
    write_atomically(path, _key_pem(key), mode=0o600)
    return key


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError("identity.unreadable", f"{path} holds no key; enrol the agent again.", got=error) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("identity.unreadable", f"{path} holds no key of ours.", got=type(key).__name__)
    return key


def _chain(folder: Path) -> str:
    text = (folder / PAIR).read_text(encoding="ascii")
    return text[text.index("-----BEGIN CERTIFICATE-----") :]


def _request(key: ec.EllipticCurvePrivateKey, agent: str) -> str:
    """Returns a request that proves the key; its name is informative, the control plane uses its own."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, agent)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _call(
    control_plane: str, context: ssl.SSLContext, method: str, path: str, kind: Any, body: msgspec.Struct | None = None
) -> Any:
    """Sends one request over TLS; it follows no redirect and reads no more than the limit."""
    parts = urlsplit(control_plane)
    if parts.scheme != "https" or not parts.hostname:
        raise InputError(
            "identity.not_https", "Enrolment goes over HTTPS.", expected="https://host:port", got=control_plane[:200]
        )
    connection = http.client.HTTPSConnection(parts.hostname, parts.port or 443, timeout=_TIMEOUT_S, context=context)
    try:
        connection.request(
            method,
            path,
            body=None if body is None else msgspec.json.encode(body),
            headers={"content-type": "application/json"},
        )
        response = connection.getresponse()
        data = response.read(MAX_ANSWER_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(
            "identity.unreachable",
            f"{control_plane} does not answer as it should; check the address, the network and the clock.",
            expected="TLS by the site's own authority",
            got=str(error)[:300],
        ) from error
    finally:
        connection.close()
    return _answer(response.status, data, kind)


def _answer(status: int, data: bytes, kind: Any) -> Any:
    try:
        if len(data) > MAX_ANSWER_BYTES:
            raise ValueError(f"{len(data)} bytes")
        if status == 200:
            return msgspec.json.decode(data, type=kind)
        refusal = msgspec.json.decode(data, type=dict[str, Any])
        code, message = str(refusal["code"]), str(refusal["message"])
    except (msgspec.MsgspecError, ValueError, KeyError) as error:
        raise UnavailableError(
            "identity.unreachable", f"An answer of HTTP {status} that cannot be read.", got=str(error)[:200]
        ) from error
    family = {409: ConflictError, 422: InputError, 404: InputError}.get(status, UnavailableError)
    raise family(code, message, expected=refusal.get("expected"), got=refusal.get("got"))


def main(argv: list[str] | None = None) -> int:
    """Runs the child, `python -m edge_agent.identity.enrolment FOLDER`; prints on standard output what it did."""
    (folder,) = sys.argv[1:] if argv is None else argv
    try:
        done = renew(Path(folder), time.time())
    except SortlineError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    sys.stdout.write("renewed\n" if done else "kept\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
