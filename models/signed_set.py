"""Signed metadata as it travels and as it is kept: a document of parts, each byte for byte what was signed.

Reads and writes; verifies nothing (that is `models.trust`), so what only carries it needs no library of signatures.
"""

from typing import Final, Literal

import msgspec

from models.errors import TrustError
from models.versioning import version_in

MAX_SET_BYTES: Final = 120 * 1024
"""Largest set, and largest bin: it stays below 128 KiB, the payload limit of AWS IoT Core."""
MAX_TRUSTED_BYTES: Final = 4 * MAX_SET_BYTES
MAX_ROOTS: Final = 64
ASSIGN: Final = "assign"
"""The delegated role that spreads assignments over bins; terminating, paths `assign/*`."""
ROLES: Final = ("timestamp", "snapshot", "targets", ASSIGN)
"""What all agents get."""
BIN: Final = "bin"
"""What one agent gets beside: the role `models.messages.bin_of` of it."""
_ABSENT: Final = msgspec.Raw(b"null")


class TrustSet(msgspec.Struct, frozen=True, kw_only=True):
    """Signed metadata as it travels and as it is kept; each part exactly as it was signed, byte for byte."""

    schema_version: Literal[1] = 1
    roots: tuple[msgspec.Raw, ...] = ()
    """Root chain, oldest first."""
    timestamp: msgspec.Raw = _ABSENT
    snapshot: msgspec.Raw = _ABSENT
    targets: msgspec.Raw = _ABSENT
    assign: msgspec.Raw = _ABSENT
    bin: msgspec.Raw = _ABSENT
    """The bin of the agent that keeps the set; it travels apart from the rest."""

    def part(self, role: str) -> bytes:
        """Returns a role's metadata; empty when there is none."""
        data = bytes(getattr(self, role))
        return b"" if data == b"null" else data


def make_set(roots: list[bytes], parts: dict[str, bytes]) -> bytes:
    """Returns the document of these metadata files. Law: `parse_set(make_set(r, p))` gives the same bytes back.

    Raises:
        TrustError: `trust.oversize`: it would not fit through a broker.
    """
    data = msgspec.json.encode(set_of(roots, parts))
    check_size(data, "The set of signed metadata")
    return data


def set_of(roots: list[bytes], parts: dict[str, bytes]) -> TrustSet:
    """Returns what `make_set` encodes."""
    found = TrustSet(roots=tuple(msgspec.Raw(root) for root in roots))
    return msgspec.structs.replace(found, **{role: msgspec.Raw(data) for role, data in parts.items() if data})


def parse_set(data: bytes, limit: int = MAX_SET_BYTES) -> TrustSet:
    """Reads a set; verifies nothing.

    Args:
        data: As it came.
        limit: In bytes.

    Raises:
        TrustError: `trust.oversize`, `trust.malformed`, `trust.wrong_version`.
    """
    check_size(data, "The set of signed metadata", limit)
    try:
        found = msgspec.json.decode(data, type=TrustSet)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _explain(data, error) from error
    if len(found.roots) > MAX_ROOTS:
        raise TrustError("trust.malformed", "Too many roots.", expected=f"<= {MAX_ROOTS}", got=len(found.roots))
    return found


class _Claims(msgspec.Struct):
    version: int
    development: bool = False


class _Signed(msgspec.Struct):
    signed: _Claims


def _claims(data: bytes) -> _Claims:
    try:
        return msgspec.json.decode(data, type=_Signed).signed
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Claims(0)


def version_of(data: bytes) -> int:
    """Returns the version a metadata file claims; 0 when it is none."""
    return _claims(data).version


def is_development(root: bytes) -> bool:
    """Returns whether a root says that its keys were made for development: all on one machine, threshold 1."""
    return _claims(root).development


def check_size(data: bytes, what: str, limit: int = MAX_SET_BYTES) -> None:
    """Whether it fits through a broker.

    Raises:
        TrustError: `trust.oversize`.
    """
    if len(data) > limit:
        raise TrustError("trust.oversize", f"{what} is too large.", expected=f"<= {limit} bytes", got=len(data))


def _explain(data: bytes, error: Exception) -> TrustError:
    version = version_in(data, absent=1)
    if version is not None and version != 1:
        return TrustError(
            "trust.wrong_version", "The set has a schema version this program does not know.", expected=1, got=version
        )
    return TrustError("trust.malformed", "This is no set of signed metadata.", got=str(error)[:200])
