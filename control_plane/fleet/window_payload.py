"""Packs the payload of a window for the database: MessagePack as it came, compressed with a fixed dictionary.

A window of one lane takes about a third of its 2.1 KB, one of four lanes with the camera's figures two fifths of its
4.2 KB. A row names the dictionary it was written with (zlib's DICTID), so a new dictionary leaves old rows readable. A
row written before compression is read as it is: MessagePack of a window begins with a map, a compressed one with zlib's
header. Law: `unpack_window(pack_window(data)) == data`.
"""

import zlib
from typing import Final

from models.errors import MessageError
from models.windows import MAX_WINDOW_BYTES

_MAX_BYTES: Final = 64 * MAX_WINDOW_BYTES
_ZLIB: Final = 0x78
_LEVEL: Final = 6
_FIRST: Final = (
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
"""What windows without lanes have in common. It never changes: rows that were written with it need these very bytes."""
_DICTIONARY: Final = (
    b"\xa6levels\x88\xa9sharpness\xcd\xa8exposure\xcd\xacred_to_green\xcd\xadblue_to_green\xcd\xa7flicker\xaashift_x_px"
    b"\xaashift_y_px\xa4dirt\xa7outside\xaacorrected_wb\xaecorrected_gain\xa8repeated"
    + _FIRST
    + bytes(range(16))
    + b"\xa7by_lane\x94\x87\xa5items\xccZ\xa7classes\x83\xa5sound\xccP\xa3rot\x05\xa6defect\x05\xa6grades\x83\xa4good"
    + b"\xccP\xa6unsure\x05\xa3bad\x05\xa7outlets\x82\xa4pass\xccP\xa6reject\x05\xa8features\xc5\x01\x00\xa5nulls"
    + b"\xdc\x00\x10"
    + bytes(16)
    + b"\xa7scalars\x81\xa8weight_g\xdc\x00\x10\x05\x06\x05\x06\x07\x05\x06\x05\xa9length_mm\xdc\x00\x10"
    + b"\xafscalars_missing\x80\xadcamera_health\x8b\xa5looks\n\xaadirt_looks\n\xa9sharpness\x93\n\xcd\x9c@\xce\t\x89"
    + b"\xa8exposure\x93\n\xce\x00\x06\x1a\x80\xcf\x00\x00\x00\x03\xacred_to_green\x93\n\xcd%\x1c\xce\x00\x89"
    + b"\xadblue_to_green\x93\n\xcd)h\xce\x00\xab\xa7flicker\x93\n\x1e\xcc\xaashift_x_px\x93\n\xd1\xff\xce\x00\x01"
    + b"\xaashift_y_px\x93\n\xd1\xff\xce\x00\x01"
)
"""What windows with lanes have in common; like the first it never changes: a better one would be a third."""
_BY_ID: Final = {zlib.adler32(known): known for known in (_FIRST, _DICTIONARY)}


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
    inflater = zlib.decompressobj(zdict=_BY_ID.get(int.from_bytes(stored[2:6], "big"), _DICTIONARY))
    try:
        data, problem = inflater.decompress(stored, _MAX_BYTES), ""
    except zlib.error as error:
        data, problem = b"", str(error)
    if problem or not inflater.eof:
        raise MessageError(
            "message.malformed", "A stored window is damaged.", expected="a whole zlib stream", got=problem or "a part"
        )
    return data
