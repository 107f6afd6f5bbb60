"""Reads the version of a document that may be newer than this program.

Every format of the contract carries `schema_version`. A document of another version must be refused as such, by name,
and not for the first field that looks strange: its writer may simply be newer.
"""

from collections.abc import Callable
from typing import Any

import msgspec


class _Versioned(msgspec.Struct):
    schema_version: int | None = None


def version_in(data: bytes, *, absent: int, decode: Callable[..., Any] = msgspec.json.decode) -> int | None:
    """Returns the `schema_version` that a document claims.

    Args:
        data: The document.
        absent: What a document counts as that claims none.
        decode: `msgspec.json.decode` or `msgspec.msgpack.decode`.

    Returns:
        The version; None = this is no document at all, whatever its version.
    """
    try:
        version: int | None = decode(data, type=_Versioned).schema_version
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return absent if version is None else version
