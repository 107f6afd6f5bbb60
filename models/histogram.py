"""Counts that add exactly: histograms with logarithmic buckets, and counts in fixed bins packed into few bytes."""

import math
from typing import Annotated, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import MessageError

LATENCY_SCALE: Final = 16
"""Buckets per doubling."""
MAX_BUCKETS: Final = 480
LEAST_BUCKET: Final = -240
LAST_BUCKET: Final = 239
"""The buckets cover 2**-15 to 2**15 of the unit; values beyond are counted in the last bucket."""
MOST_COUNTED: Final = 2**32 - 1
"""Largest count in a packed bin."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Histogram(msgspec.Struct, kw_only=True, forbid_unknown_fields=False):
    """Base-2 exponential histogram of positive values; zero and below are counted apart.

    Law: `a.merged(b)` has the counts of all values of `a` and `b`, in any order.
    """

    zero: Count = 0
    buckets: dict[int, Count] = {}
    """Bucket index -> count; bucket i holds values in (2**(i/16), 2**((i+1)/16)]."""

    def add(self, value: float, count: int = 1) -> None:
        """Counts one value, in the unit that the name of the field states."""
        if value <= 0.0 or not math.isfinite(value):
            self.zero += count
            return
        index = min(max(math.ceil(math.log2(value) * LATENCY_SCALE) - 1, LEAST_BUCKET), LAST_BUCKET)
        self.buckets[index] = self.buckets.get(index, 0) + count

    def merged(self, other: "Histogram") -> "Histogram":
        """Returns the histogram of the values of both."""
        buckets = dict(self.buckets)
        for index, count in other.buckets.items():
            buckets[index] = buckets.get(index, 0) + count
        return Histogram(zero=self.zero + other.zero, buckets=buckets)

    @property
    def count(self) -> int:
        """Number of values counted."""
        return self.zero + sum(self.buckets.values())

    def quantile(self, q: float) -> float:
        """Returns the value below which a share `q` of the values lies; NaN when nothing was counted."""
        total = self.count
        if total == 0:
            return math.nan
        rank = q * (total - 1)
        seen = self.zero
        if rank < seen:
            return 0.0
        for index in sorted(self.buckets):
            seen += self.buckets[index]
            if rank < seen:
                return float(2.0 ** ((index + 0.5) / LATENCY_SCALE))
        return float(2.0 ** ((max(self.buckets) + 1) / LATENCY_SCALE))

    def share_above(self, value: float) -> float:
        """Returns the share of the values in buckets that lie wholly above this one; NaN when nothing was counted."""
        total = self.count
        over = sum(n for index, n in self.buckets.items() if 2.0 ** (index / LATENCY_SCALE) >= value)
        return over / total if total else math.nan


def pack_counts(counts: NDArray[np.integer]) -> bytes:
    """Packs counts in the smallest of uint8, uint16 and uint32 (little-endian) that holds the largest of them.

    The width follows from the number of bytes. Law: `unpack_counts(pack_counts(c), c.size) == c`, flattened.

    Args:
        counts: Integers of any shape, 0 to 2**32 - 1.
    """
    most = int(counts.max(initial=0))
    return counts.astype("u1" if most < 2**8 else "<u2" if most < 2**16 else "<u4").tobytes()


def unpack_counts(packed: bytes, size: int) -> NDArray[np.int64]:
    """Reads packed counts.

    Args:
        packed: Bytes of `pack_counts`, whatever the width.
        size: Number of counts.

    Returns:
        int64 (size,).

    Raises:
        MessageError: `window.inconsistent`: the number of bytes fits no width.
    """
    width, rest = divmod(len(packed), size) if size else (1, len(packed))
    if rest or width not in {1, 2, 4}:
        raise MessageError(
            "window.inconsistent",
            "Packed counts have a strange length.",
            expected=f"1, 2 or 4 times {size} bytes",
            got=len(packed),
        )
    return np.frombuffer(packed, f"<u{width}").astype(np.int64)
