"""Packs the payload of a window for the database: MessagePack as it came, compressed with a fixed dictionary.

A window of 2.1 KB takes about a third of that. A row written before compression is read as it is: MessagePack of a
window begins with a map, a compressed one with zlib's header. Law: `unpack_window(pack_window(data)) == data`.
"""

import zlib
from typing import Final

from models.errors import MessageError
from models.windows import MAX_WINDOW_BYTES

_MAX_BYTES: Final = 64 * MAX_WINDOW_BYTES
_ZLIB: Final = 0x78
_LEVEL: Final = 6
_DICTIONARY: Final = (
    bytes(256)
    + b"".join(bytes((n, 0, 0, 0)) for n in range(40, 0, -1))
    + b"\xa5stems\xa6bruise\xa4scab\xa3rot\xa4worm\xa7damaged\xa6defect\xa3bad\xa2ok\xa4good\xa6unsure\xa5sound"
    + b"\xa7recycle\xa5juice\xa6reject\xa4pass\xaasound>pass\xacsound>reject\xa8rot>pass\xaarot>reject\xa9pass>pass"
    + b"\xabpass>reject\xabreject>pass\xadreject>reject\xa7skipped\xa6failed\xa7overdue\xa7refused\xa5close\xa4late"
    + b"\xa5fired\xa7on_time\xa5wrong\xa3gap\xb00/reject/missed\xb00/reject/double\xb40/reject/unexpected"
    + b"\xae1/reject/fired\xae0/reject/fired\xb30/reject/confirmed\xa80/reject\xa81/reject\xa7blind_m"
    + b"\xadcamera.frozen\xa8blind_ms\xa8blind_mm\xabblind_shots"
    + b"\xde\x00\x1f\xaeschema_version\x01\xaastarted_ms\xcf\x00\x00\x01\x9a\xabduration_ms\xcd'\x10"
    + b"\xa6bundle\xd9@\xa3lot\xa0\xa7variety\xa0\xa9simulated\xc2\xa6frames\xcd\x01,\xaeframes_dropped\x00"
    + b"\xaaframes_bad\x00\xa5items\xccP\xaeitems_unjudged\x00\xadverdicts_late\x00\xa5lanes\x92((\xa7classes\x82"
    + b"\xa6grades\x82\xa7outlets\x82\xa5views\xcd\x02\x00\xaalatency_ms\x82\xa4zero\x00\xa7buckets\x8a"
    + b"\xacinference_ms\x82\xa4zero\x00\xa7buckets\x86\xa8features\xc5\x03\xc0\xa5nulls\x9f"
    + bytes(15)
    + b"\xa9ejections\x81\xa9ejectors\x81\xa5shots\x81\xa7lead_ms\x80\xa9jitter_ms\x82\xa4zero\x00\xa7buckets\x84"
    + b"\xa5truth\x84\xa6camera\x80\xa6shadow\x80\xadshadow_bundle\xa0\xaelifetime_items\xce\x00"
)
"""What windows have in common. It never changes: a row that was written with it needs these very bytes."""


def pack_window(data: bytes) -> bytes:
    """Returns the payload as it is stored."""
    packer = zlib.compressobj(_LEVEL, zdict=_DICTIONARY)
    return packer.compress(data) + packer.flush()


def unpack_window(stored: bytes) -> bytes:
    """Returns the payload as it came.

    Raises:
        MessageError: `message.malformed`: the row is damaged.
    """
    if not stored or stored[0] != _ZLIB:
        return stored
    inflater = zlib.decompressobj(zdict=_DICTIONARY)
    try:
        data, problem = inflater.decompress(stored, _MAX_BYTES), ""
    except zlib.error as error:
        data, problem = b"", str(error)
    if problem or not inflater.eof:
        raise MessageError(
            "message.malformed", "A stored window is damaged.", expected="a whole zlib stream", got=problem or "a part"
        )
    return data
