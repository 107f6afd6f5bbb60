"""Certificates of a site as pure functions: keys and times in, certificates out. Touches no file and no database.

All keys are P-256. The content of a certificate comes from its template here; only the public key of a request is used.
The role is a URI of the subject's alternative names, so that no name can be mistaken for a role:
`urn:sortline:agent:<id>`, `urn:sortline:control-plane:<id>`. RFC 5280 for the fields.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from models.errors import InputError

ROOT_LIFE: Final = timedelta(days=3652)
ISSUING_LIFE: Final = timedelta(days=731)
CLIENT_LIFE: Final = timedelta(days=30)
RENEW_AFTER: Final = timedelta(days=10)
SERVER_LIFE: Final = timedelta(days=90)
REVOCATIONS_LIFE: Final = timedelta(days=400)
"""Life of a revocation list. An expired one would lock out every valid client; it is written again each week."""
_CLOCK_SKEW: Final = timedelta(minutes=10)
AGENT_URI: Final = "urn:sortline:agent:"
PLANE_URI: Final = "urn:sortline:control-plane:"


@dataclass(frozen=True, slots=True)
class Signer:
    """An authority's certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    """Returns a fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey, passphrase: str = "") -> bytes:
    """Returns PKCS 8; without a passphrase it is not encrypted, and the file's mode protects it."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def certificate_pem(*certificates: x509.Certificate) -> bytes:
    """Returns certificates as PEM, in the given order."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def fingerprint(certificate: x509.Certificate) -> str:
    """Returns the SHA-256 of the certificate (DER), hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def key_fingerprint(public_key: ec.EllipticCurvePublicKey) -> str:
    """Returns the SHA-256 of the public key, hexadecimal."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def serial_text(certificate: x509.Certificate) -> str:
    """Returns the serial number as it is kept and as TLS libraries print it: hexadecimal, upper case, whole bytes."""
    text = f"{certificate.serial_number:X}"
    return text if len(text) % 2 == 0 else f"0{text}"


def make_root(site: str, now: datetime, *, key: ec.EllipticCurvePrivateKey | None = None) -> Signer:
    """Returns a self-signed root for ten years."""
    key = key or new_key()
    name = _authority_name(site, "root", key)
    return Signer(_authority(name, key.public_key(), name, key, now, ROOT_LIFE, path_length=2), key)


def cross_sign(new: x509.Certificate, old: Signer, now: datetime) -> x509.Certificate:
    """Returns the new root's key and name, cross-signed by the old root for clients that trust only that."""
    key = new.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError("identity.bad_key", "The root's key is not P-256.", expected="P-256", got=type(key).__name__)
    life = min(ROOT_LIFE, old.certificate.not_valid_after_utc - now)
    return _authority(new.subject, key, old.certificate.subject, old.key, now, life, path_length=1)


def make_issuing(site: str, root: Signer, now: datetime) -> Signer:
    """Returns an intermediate authority for two years, which may sign leaves only."""
    key = new_key()
    name = _authority_name(site, "issuing", key)
    life = min(ISSUING_LIFE, root.certificate.not_valid_after_utc - now)
    return Signer(_authority(name, key.public_key(), root.certificate.subject, root.key, now, life, path_length=0), key)


def issue_client(
    issuer: Signer, public_key: ec.EllipticCurvePublicKey, name: str, uri: str, now: datetime
) -> x509.Certificate:
    """Returns a client's certificate for thirty days.

    Args:
        issuer: The authority that signs.
        public_key: Public key of the client.
        name: Common name; brokers take it as the user name.
        uri: Role and name, `AGENT_URI` or `PLANE_URI` with the name.
        now: Aware UTC.
    """
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    return _leaf(issuer, public_key, name, names, ExtendedKeyUsageOID.CLIENT_AUTH, now, CLIENT_LIFE)


def issue_server(
    issuer: Signer, public_key: ec.EllipticCurvePublicKey, names: Iterable[str], now: datetime
) -> x509.Certificate:
    """Returns a server's certificate for these DNS names and addresses, for ninety days."""
    listed = list(names)
    found = x509.SubjectAlternativeName([_general_name(name) for name in listed])
    return _leaf(issuer, public_key, listed[0], found, ExtendedKeyUsageOID.SERVER_AUTH, now, SERVER_LIFE)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _authority_name(site: str, kind: str, key: ec.EllipticCurvePrivateKey) -> x509.Name:
    """Returns a name that no other authority has, because verifiers find the issuer by it."""
    return _name(f"{site} {kind} {key_fingerprint(key.public_key())[:8]}")


def _authority(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    life: timedelta,
    *,
    path_length: int,
) -> x509.Certificate:
    usage = _usage(key_cert_sign=True, crl_sign=True)
    return (
        _builder(subject, public_key, issuer, issuer_key, now, life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
        .sign(issuer_key, hashes.SHA256())
    )


def _leaf(
    issuer: Signer,
    public_key: ec.EllipticCurvePublicKey,
    name: str,
    names: x509.SubjectAlternativeName,
    purpose: x509.ObjectIdentifier,
    now: datetime,
    life: timedelta,
) -> x509.Certificate:
    life = min(life, issuer.certificate.not_valid_after_utc - now)
    return (
        _builder(_name(name), public_key, issuer.certificate.subject, issuer.key, now, life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(names, critical=False)
        .sign(issuer.key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    life: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def revocation_list(
    issuer: Signer, revoked: Iterable[tuple[str, datetime]], now: datetime
) -> x509.CertificateRevocationList:
    """Returns the list of one issuer.

    Args:
        issuer: The issuer of the revoked certificates.
        revoked: Serial (`serial_text`) and time of each.
        now: Aware UTC.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(now - _CLOCK_SKEW)
        .next_update(now + REVOCATIONS_LIFE)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
    )
    for serial, at in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(at).build()
        )
    return builder.sign(issuer.key, hashes.SHA256())


def read_request(pem: str) -> ec.EllipticCurvePublicKey:
    """Returns the public key of a certificate request whose signature proves that the sender holds its private half.

    Whatever else the request asks for (subject, names, authority, lifetime) is ignored.

    Raises:
        InputError: `identity.bad_request`.
    """
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise InputError(
            "identity.bad_request", "The certificate request cannot be read.", expected="PEM", got=str(error)[:200]
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InputError(
            "identity.bad_request", "The key is of another kind.", expected="P-256", got=type(key).__name__
        )
    if not valid:
        raise InputError("identity.bad_request", "The request is not signed by its own key.", expected="a signature")
    return key


def read_certificate(pem: str) -> tuple[x509.Certificate, ec.EllipticCurvePublicKey]:
    """Returns a client's certificate (the first in the text) and its key.

    Raises:
        InputError: `identity.bad_certificate`.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            "identity.bad_certificate", "The certificate cannot be read.", expected="PEM", got=str(error)[:200]
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError("identity.bad_certificate", "Its key is of another kind.", expected="P-256", got=type(key))
    return certificate, key


def agent_of(certificate: x509.Certificate) -> str:
    """Returns the agent a certificate names; empty when it is no agent's."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ""
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return uris[0].removeprefix(AGENT_URI) if len(uris) == 1 and uris[0].startswith(AGENT_URI) else ""


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Returns whether this issuer's key signed it."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def signed(key: ec.EllipticCurvePublicKey, signature: bytes, statement: bytes) -> bool:
    """Returns whether the key signed the statement (ECDSA, SHA-256)."""
    try:
        key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True
