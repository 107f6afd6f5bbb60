"""Cuts files into chunks at places their content chooses, so that equal stretches give equal chunks wherever they lie.

A chunk is what travels: at most `CHUNK_BYTES`, named by its sha256. A place is a cut when a rolling hash of the 32
bytes before it is small (a gear hash: Xia et al., "FastCDC", USENIX ATC 2016), so an insertion moves the cuts after it
along and only the chunks around it are new. Writers use exactly these rules, because equal content must have an equal
manifest; readers take the sizes the manifest lists.

Laws: the chunks joined are the data; every chunk but the last has `SHORTEST` to `CHUNK_BYTES` bytes; cutting is a
function of the data alone.
"""

import hashlib
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.topics import MAX_BLOB_BYTES

CHUNK_BYTES: Final = MAX_BLOB_BYTES
"""Most bytes of a chunk: it travels as one blob."""
SHORTEST: Final = 40 * 1024
_SPACING: Final = 32 * 1024
"""Mean distance of candidate places: chunks of random data have 70 KiB on average."""
_REACH: Final = 32
"""Bytes the hash depends on."""
_BLOCK: Final = 1 << 20
_GEAR: Final[NDArray[np.uint32]] = np.array(
    [int.from_bytes(hashlib.sha256(bytes([value])).digest()[:4], "little") for value in range(256)], np.uint32
)


def cut(data: bytes) -> Iterator[bytes]:
    """Returns the chunks of a file in order; an empty file has none."""
    view, start = memoryview(data), 0
    candidates = _candidates(data)
    while start < len(data):
        end = min(start + CHUNK_BYTES, len(data))
        at = int(np.searchsorted(candidates, start + SHORTEST))
        if at < len(candidates) and candidates[at] < end:
            end = int(candidates[at])
        yield bytes(view[start:end])
        start = end


def _candidates(data: bytes) -> NDArray[np.int64]:
    """Places whose 32 bytes before hash below the threshold, ascending."""
    limit = np.uint32(2**32 // _SPACING)
    raw = np.frombuffer(data, np.uint8)
    found = []
    for start in range(0, len(raw), _BLOCK):
        lead = min(start, _REACH - 1)
        hashed = _rolling(raw[start - lead : start + _BLOCK])[lead:]
        found.append(np.flatnonzero(hashed < limit) + (start + 1))
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _rolling(raw: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """`sum(gear[raw[i - k]] << k for k in 0..31)` at every i, by doubling the reach five times."""
    hashed = _GEAR[raw]
    reach = 1
    while reach < _REACH:
        further = hashed.copy()
        further[reach:] += hashed[:-reach] << np.uint32(reach)
        hashed, reach = further, reach * 2
    return hashed
