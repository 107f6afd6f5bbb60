"""Addresses of brokers: understood or refused; and secrets in addresses, which no text shows."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.config import BrokerConfig as PlaneBroker
from edge_agent.config import BrokerConfig as AgentBroker
from models.connection import BrokerAddress, broker_of, guarded, parse_broker, read_secret
from models.errors import CameraError, ConfigError
from models.text import mask


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("broker", BrokerAddress("broker")),
        ("10.0.0.5:1884", BrokerAddress("10.0.0.5", 1884)),
        ("mqtt://broker.plant.example:1883", BrokerAddress("broker.plant.example", 1883)),
        ("MQTT://broker/", BrokerAddress("broker")),
        ("mqtts://broker", BrokerAddress("broker", None, True)),
        ("mqtts://broker:1", BrokerAddress("broker", 1, True)),
        ("[::1]:1883", BrokerAddress("::1", 1883)),
        ("mqtts://[fe80::1]", BrokerAddress("fe80::1", None, True)),
        ("::1", BrokerAddress("::1")),
        (" broker_1 ", BrokerAddress("broker_1")),
    ],
)
def test_every_usual_address_is_understood(text: str, found: BrokerAddress) -> None:
    assert parse_broker(text) == found


@pytest.mark.parametrize(
    "text",
    [
        *("", "mqtt://", "tcp://h", "http://h:1883", "ws://h", "mqtt:/h", "mqtt://user:secret@h", "h/topic"),
        *("h:", "h:x", "h:0", "h:65536", "h:1883:2", "h:١٨٨٣"),
        *("[::1", "[h]:1", "[::1]1", "::1::2", "a b", "-h", "h..x"),
    ],
)
@pytest.mark.parametrize("config", [AgentBroker, PlaneBroker])
def test_everything_else_is_refused_at_the_start_by_both_sides(text: str, config: type) -> None:
    with pytest.raises(ConfigError) as caught:
        config(host=text)
    assert caught.value.code == "config.bad_value"
    assert "mqtts://HOST" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_host_and_port_of_a_configuration_are_one_address() -> None:
    assert broker_of("mqtts://b", 1883) == BrokerAddress("b", 8883, True)
    assert broker_of("b", 1999) == BrokerAddress("b", 1999)
    assert broker_of("b:1999", 1883) == broker_of("b:1999", 1999) == BrokerAddress("b", 1999)
    with pytest.raises(ConfigError, match="different ports"):
        broker_of("b:1999", 2000)


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = parse_broker(text)
    except ConfigError:
        return
    assert address.host
    assert address.port is None or 1 <= address.port <= 65_535


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://admin:geheim@10.0.0.9/stream1",
        "rtsp://admin:a@geheim@10.0.0.9/x",
        "rtsp://admin:a/geheim@10.0.0.9/x",
        "camera rtsp://geheim@host/ is away",
        "http://host/video?user=x&password=geheim",
        "http://host/snap.cgi?loginpas=geheim&n=1",
        "rtsp://host/user=admin_password=geheim_channel=1_stream=0.sdp",
        "mqtt://u:geheim@broker:1883/topic",
        "modbus+tcp://geheim@plc",
        "http://host/x?access_token=geheim#t",
        'got "rtsp://a:geheim@h/x"',
    ],
)
def test_no_secret_of_an_address_is_shown(text: str) -> None:
    hidden = mask(text)
    assert "geheim" not in hidden
    assert mask(hidden) == hidden
    assert "geheim" not in str(CameraError("camera.absent", f"No camera at {text}.", got=text))
    assert "geheim" not in str(CameraError("camera.absent", "None.", got=text, source=text).as_dict())


@pytest.mark.parametrize("text", ["/dev/video0", "http://host:80/x?lane=1", "a@b.c", "expected 1, got 2", "simulated"])
def test_text_without_a_secret_is_shown_unchanged(text: str) -> None:
    assert mask(text) == text


def test_a_password_file_is_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("s3cret\n")
    assert read_secret(str(path)) == "s3cret"
    assert read_secret("") is None
    for bad in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError) as caught:
            read_secret(str(bad))
        assert caught.value.code == "broker.no_password"


def test_a_callback_that_raises_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    counters: Counter[str] = Counter()
    guarded(lambda: 1 / 0, counters, logging.getLogger("test"))()
    assert counters["callback_failed"] == 1
    assert "ZeroDivisionError" in caplog.text
