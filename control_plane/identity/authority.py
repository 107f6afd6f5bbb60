"""The site's certificate authority: a folder with roots, issuing authorities and a small index.

Rules: the index is replaced last and atomically, so a power cut leaves the old authority or the new one; issuing needs
only the issuing key, the root key is used by `rotate` alone and may be kept elsewhere; a replaced root stays trusted
until it is retired, and the new one is cross-signed by it, so that an agent that was off follows without help.
`enrolment` decides who may have a certificate, and `publication` writes the files that others read.
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from control_plane.identity.certificates import (
    Signer,
    certificate_pem,
    cross_sign,
    fingerprint,
    issued_by,
    key_pem,
    make_issuing,
    make_root,
    revocation_list,
)
from models.errors import ConfigError, ConflictError, InputError
from models.files import write_atomically

INDEX: Final = "authority.json"
SITE: Final = "site"
MIN_PASSPHRASE: Final = 12
"""Characters of the passphrase of a root's key."""
_ROOT_KEY: Final = "root-{}.key"


ReplicaName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]{1,16}\Z")]


class Generation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One issuing authority and the root above it."""

    number: int
    root: int
    retired: bool = False


class Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The index of the folder, `authority.json`."""

    schema_version: Literal[1] = 1
    site: Annotated[str, msgspec.Meta(min_length=1, max_length=40)]
    names: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=32)]
    replicas: Annotated[tuple[ReplicaName, ...], msgspec.Meta(max_length=16)] = ()
    """Names of the replicas of the control plane beside the first."""
    generations: tuple[Generation, ...]


class Authority:
    """An authority on disk, as it was when it was read: issuer, chain and trust always belong together.

    Args:
        folder: Made by `create`. `follow` gives the newer state when another process has changed it.

    Raises:
        ConflictError: `ca.absent`.
        ConfigError: `ca.unreadable`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._certificates: dict[str, x509.Certificate] = {}
        self._stamp, self.index = _read_index(folder)

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        site: str,
        names: Iterable[str],
        now: datetime,
        root_key: Path | None = None,
        passphrase: str = "",
    ) -> "Authority":
        """Makes root, issuing authority and index.

        Args:
            folder: Folder of the authority; made when it does not exist.
            site: Name of the site, part of the names of the authorities.
            names: DNS names and addresses under which agents reach the broker and the control plane.
            now: Aware UTC.
            root_key: Path of the root's key, a new file; None = in the folder.
            passphrase: Encrypts the root's key; empty = in clear.

        Raises:
            ConflictError: `ca.exists`, `ca.key_exists`.
            ConfigError: `ca.weak_passphrase`, `ca.key_not_written`.
            InputError: `ca.bad_name`.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / SITE).mkdir(exist_ok=True, mode=0o700)
        index = Index(site=site, names=_checked_names(names), generations=(Generation(number=1, root=1),))
        with _locked(folder):
            if (folder / INDEX).exists():
                raise ConflictError(
                    "ca.exists", f"{folder} holds an authority; `sortline ca rotate` replaces it.", got=str(folder)
                )
            root = make_root(site, now)
            issuing = make_issuing(site, root, now)
            _write_root_key(root_key or folder / _ROOT_KEY.format(1), root.key, passphrase)
            _write_pair(folder, "issuing-1", issuing)
            write_atomically(folder / "root-1.pem", certificate_pem(root.certificate))
            write_atomically(folder / INDEX, msgspec.json.encode(index))
        return cls(folder)

    # -- facts ----------------------------------------------------------------------------------------

    def follow(self) -> "Authority":
        """Returns this authority, or its newer state."""
        return self if _stamp(self.folder / INDEX) == self._stamp else Authority(self.folder)

    @property
    def site(self) -> str:
        """The name of the site, part of the names of the authorities."""
        return self.index.site

    @property
    def names(self) -> tuple[str, ...]:
        """Names and addresses of the site's servers."""
        return self.index.names

    @property
    def current(self) -> Generation:
        """The issuing certificate of today."""
        return self.index.generations[-1]

    @property
    def trusted(self) -> tuple[Generation, ...]:
        """The generations whose certificates are accepted."""
        return tuple(one for one in self.index.generations if not one.retired)

    def certificate(self, name: str) -> x509.Certificate:
        """Returns a certificate of the folder by its stem, such as `root-1`.

        Raises:
            ConfigError: `ca.unreadable`.
        """
        if name not in self._certificates:
            path = self.folder / f"{name}.pem"
            try:
                self._certificates[name] = x509.load_pem_x509_certificate(path.read_bytes())
            except (OSError, ValueError) as error:
                raise ConfigError("ca.unreadable", f"{path} cannot be read.", expected="PEM", got=error) from error
        return self._certificates[name]

    @cached_property
    def issuer(self) -> Signer:
        """The current issuing authority with its key."""
        return self._signer(self.current)

    def _signer(self, generation: Generation) -> Signer:
        name = f"issuing-{generation.number}"
        return Signer(self.certificate(name), _read_key(self.folder / f"{name}.key"))

    @property
    def issuing(self) -> x509.Certificate:
        """The current issuing authority's certificate."""
        return self.certificate(f"issuing-{self.current.number}")

    @property
    def pin(self) -> str:
        """SHA-256 of the current root certificate, which tokens carry."""
        return fingerprint(self.certificate(f"root-{self.current.root}"))

    @property
    def anchors_pem(self) -> bytes:
        """The trusted roots, the newest first."""
        roots = sorted({one.root for one in self.trusted}, reverse=True)
        return certificate_pem(*(self.certificate(f"root-{number}") for number in roots))

    @property
    def chain_pem(self) -> bytes:
        """The issuing authority, and the new root cross-signed by the old one: what stands between leaf and root."""
        found = [self.issuing]
        others = {one.root for one in self.trusted} - {self.current.root}
        if others and (self.folder / f"cross-{self.current.root}.pem").exists():
            found.append(self.certificate(f"cross-{self.current.root}"))
        return certificate_pem(*found)

    def is_current(self, certificate: x509.Certificate) -> bool:
        """Returns whether the current issuing authority signed it: it stays good when the others are retired."""
        return issued_by(certificate, self.issuing)

    def issued(self, certificate: x509.Certificate) -> bool:
        """Returns whether a trusted generation signed it."""
        return any(issued_by(certificate, self.certificate(f"issuing-{one.number}")) for one in self.trusted)

    def revocations_pem(self, revoked: Iterable[tuple[str, datetime]], now: datetime) -> bytes:
        """Returns one revocation list for each trusted issuer; each names all serials, which are random and unique."""
        listed = list(revoked)
        return b"".join(
            revocation_list(self._signer(one), listed, now).public_bytes(serialization.Encoding.PEM)
            for one in self.trusted
        )

    # -- changes ----------------------------------------------------------------------------------------------

    def root_key_path(self, root_key: Path | None = None, *, following: bool = False) -> Path:
        """Returns where the key of the present root is, or where that of the following root goes: beside it."""
        path = root_key or self.folder / _ROOT_KEY.format(self.current.root)
        return path.with_name(_ROOT_KEY.format(self.current.root + 1)) if following else path

    def rotate(
        self,
        now: datetime,
        *,
        root_key: Path | None = None,
        keep_root: bool = False,
        passphrase: Callable[[Path], str] = lambda _path: "",
    ) -> "Authority":
        """Replaces the issuing authority, and the root unless `keep_root`; returns the new state.

        Args:
            now: Aware UTC.
            root_key: The key of the present root; None = in the folder. The new root's key is written beside it.
            keep_root: Only the issuing authority: needs no new trust anywhere.
            passphrase: Asked for the passphrase of the present root's key where that is encrypted; the new root's key
                gets the same one.

        Raises:
            ConfigError: `ca.no_root_key`, `ca.wrong_passphrase`, `ca.key_not_written`.
        """
        with _locked(self.folder):
            held = self.follow()
            old = held.current
            key_path = held.root_key_path(root_key)
            secret = passphrase(key_path) if is_encrypted(key_path) else ""
            root = Signer(held.certificate(f"root-{old.root}"), _read_root_key(key_path, secret))
            if root.key.public_key() != root.certificate.public_key():
                raise ConfigError("ca.no_root_key", f"{key_path} is the key of another root.", got=str(key_path))
            new = Generation(number=old.number + 1, root=old.root if keep_root else old.root + 1)
            if not keep_root:
                fresh = make_root(held.site, now)
                # What is there under this name is of a rotation that was cut off: no index names it.
                held.root_key_path(root_key, following=True).unlink(missing_ok=True)
                _write_root_key(held.root_key_path(root_key, following=True), fresh.key, secret)
                write_atomically(self.folder / f"root-{new.root}.pem", certificate_pem(fresh.certificate))
                crossed = cross_sign(fresh.certificate, root, now)
                write_atomically(self.folder / f"cross-{new.root}.pem", certificate_pem(crossed))
                root = fresh
            _write_pair(self.folder, f"issuing-{new.number}", make_issuing(held.site, root, now))
            return _save(self.folder, held.index, generations=(*held.index.generations, new))

    def retire(self) -> "Authority":
        """Ends the trust in every generation but the current one; returns the new state."""
        with _locked(self.folder):
            held = self.follow()
            kept = tuple(
                one if one is held.current else msgspec.structs.replace(one, retired=True)
                for one in held.index.generations
            )
            return _save(self.folder, held.index, generations=kept)

    def rename(self, names: Iterable[str]) -> "Authority":
        """Changes the names and addresses of the site's servers; returns the new state."""
        with _locked(self.folder):
            return _save(self.folder, self.follow().index, names=_checked_names(names))

    def add_replica(self, name: str) -> "Authority":
        """Lets another replica of the control plane have certificates; returns the new state.

        Raises:
            InputError: `ca.bad_name`.
        """
        try:
            replica = msgspec.convert(name, ReplicaName)
        except msgspec.ValidationError as error:
            raise InputError(
                "ca.bad_name",
                "This is no name of a replica.",
                expected="1-16 lower-case letters, digits",
                got=name[:40],
            ) from error
        with _locked(self.folder):
            held = self.follow()
            return _save(self.folder, held.index, replicas=tuple(dict.fromkeys((*held.index.replicas, replica))))

    def status(self, now: datetime) -> dict[str, Any]:
        """Returns facts for people: ages, places of the keys, the next step."""
        generations = []
        for one in self.index.generations:
            root, issuing = self.certificate(f"root-{one.root}"), self.certificate(f"issuing-{one.number}")
            generations.append(
                {
                    "number": one.number,
                    "state": "retired" if one.retired else "current" if one is self.current else "trusted",
                    "root_until": root.not_valid_after_utc.isoformat(),
                    "root_sha256": fingerprint(root),
                    "root_key_encrypted": is_encrypted(self.folder / _ROOT_KEY.format(one.root)),
                    "root_key_here": (self.folder / _ROOT_KEY.format(one.root)).exists(),
                    "issuing_until": issuing.not_valid_after_utc.isoformat(),
                }
            )
        return {
            "site": self.index.site,
            "names": list(self.index.names),
            "folder": str(self.folder),
            "rotate_due": self.issuing.not_valid_after_utc - now < timedelta(days=90),
            "generations": generations,
        }


def _save(folder: Path, index: Index, **changes: Any) -> Authority:
    write_atomically(folder / INDEX, msgspec.json.encode(msgspec.structs.replace(index, **changes)))
    return Authority(folder)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


def _read_index(folder: Path) -> tuple[tuple[int, int], Index]:
    path = folder / INDEX
    try:
        return _stamp(path), msgspec.json.decode(path.read_bytes(), type=Index)
    except FileNotFoundError as error:
        raise ConflictError(
            "ca.absent",
            f"{folder} holds no certificate authority; make one with `sortline ca init`.",
            expected=INDEX,
            got="nothing",
        ) from error
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError("ca.unreadable", f"{path} cannot be read.", expected="our JSON", got=error) from error


def _checked_names(names: Iterable[str]) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(name.strip() for name in names))
    if not found or any(not name or len(name) > 253 or not name.isascii() or " " in name for name in found):
        raise InputError("ca.bad_name", "A server needs names or addresses.", expected="DNS names, IPs", got=found)
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder, so that one process at a time changes an authority."""
    with (folder / "lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    write_atomically(path, key_pem(key), mode=0o600)


def _write_root_key(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: str) -> None:
    if path.exists():
        raise ConflictError("ca.key_exists", f"{path} exists; keys are never overwritten.", expected="a new file")
    if passphrase and len(passphrase) < MIN_PASSPHRASE:
        raise ConfigError(
            "ca.weak_passphrase",
            "The passphrase is too short.",
            expected=f">= {MIN_PASSPHRASE} characters",
            got=len(passphrase),
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, key_pem(key, passphrase), mode=0o600)
    except OSError as error:
        raise ConfigError("ca.key_not_written", f"{path} cannot be written.", got=error.strerror) from error


def _write_pair(folder: Path, name: str, signer: Signer) -> None:
    _write_key(folder / f"{name}.key", signer.key)
    write_atomically(folder / f"{name}.pem", certificate_pem(signer.certificate))


def is_encrypted(path: Path) -> bool:
    """Returns whether a key file asks for a passphrase; False for one that is not there."""
    try:
        return b"ENCRYPTED" in path.read_bytes()[:200]
    except OSError:
        return False


def _read_key(path: Path, passphrase: str = "") -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), passphrase.encode() or None)
    except (OSError, ValueError, TypeError) as error:
        if is_encrypted(path):
            raise ConfigError(
                "ca.wrong_passphrase",
                f"The passphrase does not open {path}.",
                expected="the passphrase of this key",
                got="another" if passphrase else "none",
            ) from error
        raise ConfigError("ca.unreadable", f"{path} cannot be read.", expected="a private key", got=error) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("ca.unreadable", f"{path} is no key of ours.", expected="P-256", got=type(key).__name__)
    return key


def _read_root_key(path: Path, passphrase: str) -> ec.EllipticCurvePrivateKey:
    if not path.exists():
        raise ConfigError(
            "ca.no_root_key",
            f"{path} is not here; bring the root's key and name it with --root-key.",
            expected="the key of the present root",
            got="nothing",
        )
    return _read_key(path, passphrase)
