"""Ed25519 keys in PEM files. Private parts are encrypted unless they are online keys; they are never logged."""

from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey

from models.errors import ConfigError, ConflictError
from models.files import write_atomically

MIN_PASSPHRASE: Final = 12
BANNER: Final = (
    "DEVELOPMENT KEYS: all on this machine, in clear; anyone who can read it can release any model. Not for a plant."
)
"""The warning wherever development keys are made or used."""
Signer = CryptoSigner
PublicKey = SSlibKey


def new_key(path: Path, passphrase: str | None) -> CryptoSigner:
    """Makes a key and writes it; the file is readable by its owner alone.

    Args:
        path: New file, `.pem`.
        passphrase: Encrypts it; None = in clear, for online and development keys only.

    Raises:
        ConflictError: `keys.exists`: keys are never overwritten.
        ConfigError: `keys.weak_passphrase`, `keys.not_written`.
    """
    if path.exists():
        raise ConflictError("keys.exists", f"{path} exists; keys are never overwritten.", expected="a new file")
    encryption: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        if len(passphrase) < MIN_PASSPHRASE:
            raise ConfigError(
                "keys.weak_passphrase",
                "The passphrase is too short.",
                expected=f">= {MIN_PASSPHRASE} characters",
                got=f"{len(passphrase)}",
            )
        encryption = BestAvailableEncryption(passphrase.encode())
    key = Ed25519PrivateKey.generate()
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, data, mode=0o600)
    except OSError as error:
        raise ConfigError("keys.not_written", f"{path} cannot be written.", got=error.strerror) from error
    return CryptoSigner(key)


def load_key(path: Path, passphrase: str | None) -> CryptoSigner:
    """Reads a key file.

    Raises:
        ConfigError: `keys.unreadable`, `keys.wrong_passphrase`.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), passphrase.encode() if passphrase else None)
    except OSError as error:
        raise ConfigError("keys.unreadable", f"{path} cannot be read.", got=error.strerror) from error
    except TypeError as error:
        raise _wrong_passphrase(path, passphrase) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        if passphrase:
            raise _wrong_passphrase(path, passphrase) from error
        raise ConfigError("keys.unreadable", f"{path} is no private key.", expected="PEM, Ed25519") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("keys.unreadable", f"{path} holds another kind of key.", expected="Ed25519")
    return CryptoSigner(key)


def is_encrypted(path: Path) -> bool:
    """Returns whether a key file asks for a passphrase."""
    try:
        return b"ENCRYPTED" in path.read_bytes()[:200]
    except OSError as error:
        raise ConfigError("keys.unreadable", f"{path} cannot be read.", got=error.strerror) from error


def _wrong_passphrase(path: Path, passphrase: str | None) -> ConfigError:
    return ConfigError(
        "keys.wrong_passphrase",
        f"The passphrase does not open {path}.",
        expected="the passphrase of this key" if passphrase is not None else "a passphrase",
        got="another" if passphrase else "none",
    )
