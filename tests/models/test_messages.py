"""Messages are refused by name and size before they are believed."""

import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InputError, MessageError
from models.messages import (
    MAX_BATCH_UNPACKED_BYTES,
    MAX_CONTROL_BYTES,
    Ack,
    Batch,
    Command,
    CommandKind,
    Desired,
    Event,
    Fault,
    LotSource,
    Record,
    RecordKind,
    Reported,
    Response,
    RunningLot,
    SafeState,
    decode,
    decode_batch,
    decode_packed,
    encode,
    encode_batch,
)
from models.topics import Channel, agent_topic, check_agent_id, parse_agent_topic
from models.windows import Window

BOOT = "0123456789abcdef"
DIGEST = "ab" * 32
REQUEST = "cd" * 16


def record(seq: int, payload: bytes = b"x") -> Record:
    return Record(boot_id=BOOT, seq=seq, kind=RecordKind.WINDOW, payload=payload)


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_a_batch_survives_the_wire(payloads: list[bytes]) -> None:
    batch = Batch(records=tuple(record(i, p) for i, p in enumerate(payloads)))
    assert decode_batch(encode_batch(batch)) == batch


@given(st.binary(max_size=400))
def test_rubbish_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode_batch(data)
    with pytest.raises(MessageError):
        decode(data, Desired)


@given(st.data())
def test_a_truncated_batch_is_refused(data: st.DataObject) -> None:
    whole = encode_batch(Batch(records=(record(1, b"abc" * 50),)))
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(MessageError) as caught:
        decode_batch(whole[:cut])
    assert caught.value.code == "message.malformed"


def test_a_zip_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(b"\0" * (MAX_BATCH_UNPACKED_BYTES * 50), 9)
    with pytest.raises(MessageError) as caught:
        decode_batch(bomb)
    assert caught.value.code == "message.oversize"


def test_an_oversize_message_is_refused_before_parsing() -> None:
    with pytest.raises(MessageError) as caught:
        decode(b"{" * (MAX_CONTROL_BYTES + 1), Desired)
    assert caught.value.code == "message.oversize"
    assert caught.value.got == MAX_CONTROL_BYTES + 1


def test_deep_nesting_does_not_break_the_parser() -> None:
    with pytest.raises(MessageError):
        decode(b"[" * 8000, Desired)


def test_an_unknown_version_is_refused_by_name() -> None:
    payload = msgspec.json.encode({"schema_version": 7, "generation": 1, "bundle": DIGEST})
    with pytest.raises(MessageError) as caught:
        decode(payload, Desired)
    assert (caught.value.code, caught.value.expected, caught.value.got) == ("message.wrong_version", 1, 7)
    with pytest.raises(MessageError) as caught:
        decode_packed(msgspec.msgpack.encode({"schema_version": 9}), Window)
    assert caught.value.code == "message.wrong_version"


def test_unknown_fields_are_ignored() -> None:
    payload = msgspec.json.encode({"generation": 3, "bundle": DIGEST, "from_the_future": [1, 2]})
    assert decode(payload, Desired).generation == 3


@pytest.mark.parametrize(
    "change",
    [
        {"generation": 0},
        {"bundle": "AB" * 32},
        {"bundle": "../etc"},
        {"trial_s": -1},
        {"mode": "shadowy"},
        {"safe_state": "eject-all"},
        {"bundle": "", "safe_state": "reject-all"},
        {"bundle": "", "mode": "shadow"},
    ],
)
def test_values_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(MessageError) as caught:
        decode(msgspec.json.encode({"generation": 1, "bundle": DIGEST} | change), Desired)
    assert caught.value.code == "message.malformed"


def test_control_messages_survive_the_wire() -> None:
    for message in (
        Desired(generation=4, bundle=DIGEST),
        Desired(generation=5, bundle="", safe_state=SafeState.EJECT_ALL),
        Ack(boot_id=BOOT, from_seq=3, through_seq=9),
        Reported(boot_id=BOOT, at_ms=5, active=DIGEST),
        Reported(boot_id=BOOT, at_ms=5, lot=RunningLot(lot="B-7", source=LotSource.OPERATOR, terms="variety")),
        Response(request_id=REQUEST, at_ms=7, fault=Fault(code="command.expired", message="late")),
    ):
        assert decode(encode(message), type(message)) == message
    event = Event(at_ms=1, code="camera.stalled")
    assert decode_packed(msgspec.msgpack.encode(event), Event) == event


def command(**changes: object) -> dict[str, object]:
    fields = {
        "request_id": REQUEST,
        "issued_at_ms": 5,
        "expires_at_ms": 9,
        "kind": "set-lot",
        "lot": "B",
        "variety": "",
    }
    return fields | changes


NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\u2028\u2029"), max_size=64)


@given(NAMES, NAMES, st.integers(0, 2**53), st.integers(0, 2**53))
def test_a_command_survives_the_wire(lot: str, variety: str, issued: int, expires: int) -> None:
    sent = Command(
        request_id=REQUEST,
        issued_at_ms=issued,
        expires_at_ms=expires,
        kind=CommandKind.SET_LOT,
        lot=lot,
        variety=variety,
    )
    assert decode(encode(sent), Command) == sent


@given(
    st.binary(max_size=300)
    | st.dictionaries(st.sampled_from(sorted(command())), st.integers()).map(msgspec.json.encode)
)
def test_a_malformed_command_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(MessageError) as caught:
        decode(data, Command)
    assert caught.value.code == "message.malformed"


@pytest.mark.parametrize(
    "change",
    [
        {"request_id": "short"},
        {"issued_at_ms": -1},
        {"kind": "set-belt"},
        {"lot": "x" * 65},
        {"lot": "two\nlines"},
        {"variety": "\x1b[2J"},
        {"variety": 7},
    ],
)
def test_a_command_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    assert decode(msgspec.json.encode(command()), Command).lot == "B"
    with pytest.raises(MessageError) as caught:
        decode(msgspec.json.encode(command(**change)), Command)
    assert caught.value.code == "message.malformed"


def test_topics_name_agent_and_channel() -> None:
    assert parse_agent_topic(agent_topic("line-7", Channel.BATCH)) == ("line-7", Channel.BATCH)
    for topic in ("sortline/v1/agents/line-7/rubbish", "sortline/v1/agents/a/b/c", "other/v1/agents/a/batch", ""):
        with pytest.raises(MessageError):
            parse_agent_topic(topic)


@pytest.mark.parametrize("agent_id", ["", "A", "a/b", "a+", "-a", "a-", "#", "a" * 64, "a\n"])
def test_an_agent_id_cannot_reach_other_topics(agent_id: str) -> None:
    with pytest.raises(InputError):
        check_agent_id(agent_id)
