"""What lies in the database is small, and every row that was ever written reads as it came."""

import zlib
from hashlib import sha256
from pathlib import Path

import pytest

from control_plane.fleet.window_payload import _DICTIONARY, _FIRST, pack_window, unpack_window
from models.errors import MessageError

GOLDEN = Path(__file__).parents[2] / "golden"
LINE, LANES = (GOLDEN / f"window-v1-{name}.msgpack" for name in ("line", "lanes"))


@pytest.mark.parametrize("path", [LINE, LANES])
def test_what_lies_in_the_database_is_smaller_and_reads_as_it_came(path: Path) -> None:
    data = path.read_bytes()
    packed = pack_window(data)
    assert unpack_window(packed) == data
    assert len(packed) < len(data) / 2.5
    assert unpack_window(data) == data, "a row from before compression"


@pytest.mark.parametrize("known", [_FIRST, _DICTIONARY])
def test_a_row_is_read_with_the_dictionary_it_was_written_with(known: bytes) -> None:
    data = LINE.read_bytes()
    packer = zlib.compressobj(6, zdict=known)
    assert unpack_window(packer.compress(data) + packer.flush()) == data


def test_dictionaries_never_change() -> None:
    assert sha256(_FIRST).hexdigest() == "e08fc9f4dff577c137b7ae36d23ebb2a5e68d0b6d062c1f0fe2eb3ba30cd28e9"
    assert sha256(_DICTIONARY).hexdigest() == "c47147c18d8680b5bb634d87875366b5d3c904d7cc47a7f6948bfdfa0021e5df"


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-9] + b"123456789", lambda d: d[:-9], lambda d: d[:2] + b"1234" + d[6:]]
)
def test_a_damaged_row_is_named(damage: object) -> None:
    assert callable(damage)
    with pytest.raises(MessageError) as caught:
        unpack_window(damage(pack_window(LANES.read_bytes())))
    assert caught.value.code == "message.malformed"
