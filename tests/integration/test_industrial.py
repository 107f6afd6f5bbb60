"""Drivers against real processes: pymodbus' server as the PLC, the embedded broker for MQTT."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_agent.devices.drivers.belt import open_belt
from edge_agent.devices.drivers.ejectors import open_ejector
from edge_agent.devices.drivers.encoder import open_encoder
from edge_agent.devices.drivers.heartbeat import open_heartbeat
from edge_agent.devices.drivers.item_sensors import open_scalar
from edge_agent.devices.drivers.modbus import ModbusPort
from edge_agent.devices.drivers.photo_eyes import open_photo_eyes
from edge_agent.devices.drivers.pulses import PulseEncoder
from edge_agent.devices.hardware import open_hardware
from edge_agent.interfaces import Shot
from edge_agent.line_config import LineConfig
from models.errors import ConfigError
from tests.simulators.mqtt_probe import Probe, close_probes
from tests.simulators.plc import plc_process
from tests.simulators.processes import embedded_broker, free_port, running, wait_until


@pytest.fixture
def plc() -> Iterator[int]:
    port = free_port()
    with plc_process(port):
        yield port


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[int]:
    with embedded_broker(tmp_path) as port:
        yield port
    close_probes()


@pytest.fixture
def program(plc: int) -> Iterator[ModbusPort]:
    """Stands for the PLC's own program: changes and reads its registers."""
    with closing(ModbusPort("127.0.0.1", plc, timeout_s=5.0)) as port:
        yield port


def standing_belt(pulses: int) -> PulseEncoder:
    belt = PulseEncoder(mm_per_pulse=0.1)
    belt.feed(pulses, time.monotonic())
    return belt


def test_a_counter_is_polled_across_its_end(plc: int, program: ModbusPort) -> None:
    program.write(100, [0xFFFF, 0xFF00])
    where = f"modbus://127.0.0.1:{plc}/holding/100"
    url = f"{where}?mm_per_pulse=0.1&poll_ms=5&stale_ms=5000&timeout_ms=5000&max_mm_s=1e6"
    with closing(open_encoder(url)) as encoder:
        wait_until(lambda: not encoder.stale, what="the first reading")
        program.write(100, [0, 0x0100])
        wait_until(lambda: encoder.position_mm(time.monotonic()) > 50.0, what="the counter's wrap")
        wait_until(lambda: encoder.speed_mm_s() == 0.0, what="the belt to stand")
        assert encoder.position_mm(time.monotonic()) == pytest.approx(51.2)
        assert encoder.counters["lost_track"] == 0


@pytest.mark.slow
def test_a_dead_plc_makes_the_encoder_stale_and_its_return_is_noticed() -> None:
    port = free_port()
    url = f"modbus://127.0.0.1:{port}/input/100?mm_per_pulse=0.1&poll_ms=5&stale_ms=500"
    with closing(open_encoder(url)) as encoder:
        with plc_process(port) as process:
            wait_until(lambda: not encoder.stale, what="the first reading")
            process.kill()
            wait_until(lambda: encoder.stale, what="the encoder to notice")
            assert encoder.speed_mm_s() == 0.0
        with plc_process(port):
            wait_until(lambda: not encoder.stale, "the encoder to come back")
        assert encoder.stale_count >= 1
        assert encoder.poller.counters["no_answer"] > 0


def test_registers_that_do_not_exist_are_refused_and_the_poll_goes_on(plc: int) -> None:
    with closing(open_encoder(f"modbus://127.0.0.1:{plc}/input/5000?mm_per_pulse=0.1")) as encoder:
        wait_until(lambda: encoder.poller.counters["no_answer"] >= 3, what="refusals")
        assert encoder.stale


def test_a_device_with_another_protocol_never_gives_a_reading(tmp_path: Path) -> None:
    script = (
        "import os,socket,sys\n"
        "s=socket.create_server(('127.0.0.1',0)); print(s.getsockname()[1],flush=True)\n"
        "while True:\n"
        " c,_=s.accept()\n"
        " try: c.recv(99); c.sendall(os.urandom(300)); c.close()\n"
        " except OSError: pass\n"
    )
    ready = tmp_path / "port"
    with ready.open("w") as out, running([sys.executable, "-c", script], stdout=out):
        wait_until(lambda: ready.read_text().endswith("\n"), what="the impostor")
        port = int(ready.read_text())
        url = f"modbus://127.0.0.1:{port}/input/100?mm_per_pulse=0.1&timeout_ms=100"
        with closing(open_encoder(url)) as encoder:
            wait_until(lambda: encoder.poller.counters["no_answer"] >= 4, "failures")
            assert encoder.stale


def test_shots_reach_the_ring_of_the_plc(plc: int, program: ModbusPort) -> None:
    program.write(200, [9] * 24)
    url = f"modbus://127.0.0.1:{plc}/holding/200?outlet=reject:1&outlet=juice:2&slots=4&timeout_ms=5000&ahead_mm=90"
    with closing(open_ejector(url, standing_belt(100_000))) as ejector:
        assert ejector.ahead_mm == 90.0
        assert ejector.announce(Shot(1, "juice", 7, 50.0), 0.0)  # type: ignore[union-attr]
        assert ejector.announce(Shot(0, "reject", 8, 60.0), 0.0)  # type: ignore[union-attr]
        wait_until(lambda: ejector.queue.counters["sent"] == 2, what="the writes")  # type: ignore[union-attr]
        assert ejector.queue.write_ms.count == 2  # type: ignore[union-attr]
    target, other = divmod(100_500, 1 << 16), divmod(100_600, 1 << 16)
    expected = [1, 1, 2, *target, 1, 2, 0, 1, *other, 2, *[0] * 12]
    assert program.read("holding", 200, 24) == expected


def test_weights_are_read_once_per_sequence_and_joined(plc: int, program: ModbusPort) -> None:
    url = f"modbus://127.0.0.1:{plc}/holding/300?value=uint16&scale=0.1&pulses=true&poll_ms=5&timeout_ms=5000"
    with closing(open_scalar(url, standing_belt(1000), sensor_mm=100.0, tolerance_mm=10.0)) as sensor:
        wait_until(lambda: sensor._sequence is not None, what="first contact")  # type: ignore[union-attr]
        program.write(300, [1, 1825, 0, 500])
        wait_until(lambda: sensor.join.remembered, what="the reading")
        assert sensor.join.value_for(-152.0) == pytest.approx(182.5)


def test_the_belt_is_stopped_by_a_register_that_is_written_only_then(plc: int, program: ModbusPort) -> None:
    program.write(400, [7])
    with closing(open_belt(f"modbus://127.0.0.1:{plc}/holding/400?every_ms=50&timeout_ms=5000")) as belt:
        time.sleep(0.2)
        assert program.read("holding", 400, 1) == [7]  # a restarted agent starts no belt that was stopped before
        belt.stop("camera.frozen")
        wait_until(lambda: program.read("holding", 400, 1) == [1], what="the stop")
        program.write(400, [0])
        wait_until(lambda: program.read("holding", 400, 1) == [1], what="the request again")
        belt.run()
        wait_until(lambda: program.read("holding", 400, 1) == [0], what="the release")


def test_photo_eyes_are_discrete_inputs_or_counters_of_the_plc(plc: int, program: ModbusPort) -> None:
    belt = standing_belt(1000)
    base = f"modbus://127.0.0.1:{plc}"
    inputs = f"{base}/discrete/160?eye=0:reject:0&eye=1:reject:1&poll_ms=5&timeout_ms=5000"
    counter = f"{base}/holding/420?eye=2:reject:0&pulses=true&poll_ms=5&timeout_ms=5000"
    with closing(open_photo_eyes([inputs, counter], belt)) as eyes:
        wait_until(lambda: all(source._before is not None for source in eyes.sources), what="first contact")  # type: ignore[attr-defined]
        program.write(420, [1, 0, 1500])
        # In this PLC inputs and coils are the same bits, so its program can set an input.
        program.write_coil(160, active=True)
        wait_until(lambda: eyes.counters["seen"] == 2, what="two sightings")
        found = {sighting.lane: sighting for sighting in eyes.sightings(time.monotonic())}
    assert set(found) == {0, 2}
    assert found[2].belt_mm == pytest.approx(50.0)


def test_the_heartbeat_changes_until_the_line_hangs(plc: int, program: ModbusPort) -> None:
    register = f"modbus://127.0.0.1:{plc}/holding/430?every_ms=20&timeout_ms=5000"
    coil = f"modbus://127.0.0.1:{plc}/coil/320?every_ms=20&timeout_ms=5000"
    with closing(open_heartbeat(register)) as counting, closing(open_heartbeat(coil)) as toggling:
        assert program.read("holding", 430, 1) == [0]
        seen: set[int] = set()

        def turns() -> bool:
            counting.turned()
            toggling.turned()
            seen.update(program.read("coil", 320, 1))
            return program.read("holding", 430, 1)[0] >= 3 and seen == {0, 1}

        wait_until(turns, what="beats")
        wait_until(lambda: counting.counters["skipped"] > 2, what="the line to count as dead")
        stands = program.read("holding", 430, 1)
        wait_until(lambda: counting.counters["skipped"] > 5, what="more turns")
        assert program.read("holding", 430, 1) == stands
    assert program.read("holding", 430, 1) == [0]
    assert program.read("coil", 320, 1) == [0]


def test_photo_eyes_and_heartbeat_over_mqtt(broker: int) -> None:
    plant = Probe(broker, "plant", {"user": "plant", "password": "x"})
    plant.subscribe(("sortline/line1/heartbeat", 1))
    base = f"mqtt://127.0.0.1:{broker}/sortline/line1"
    with (
        closing(open_photo_eyes([f"{base}/eyes?eye=1:juice:4&client=eyes"], standing_belt(1000))) as eyes,
        closing(open_heartbeat(f"{base}/heartbeat?every_ms=50&client=beat")) as heartbeat,
    ):

        def publish() -> bool:
            heartbeat.turned()
            plant.publish("sortline/line1/eyes", b'{"eye": "4"}')
            plant.publish("sortline/line1/eyes", b'{"eye": 4, "pulses": 1200}')
            return eyes.counters["seen"] > 0 and heartbeat.counters["beats"] > 1

        wait_until(publish, what="a sighting and two beats")
        (sighting,) = eyes.sightings(time.monotonic())
        assert (sighting.lane, sighting.outlet, sighting.belt_mm) == (1, "juice", pytest.approx(20.0))
        first, second = (json.loads(message[1])["sequence"] for message in plant.messages(2, timeout=10.0))
        assert second > first


def test_the_belt_is_stopped_by_a_message(broker: int) -> None:
    plant = Probe(broker, "plant", {"user": "plant", "password": "x"})
    plant.subscribe(("sortline/line1/belt", 1))
    with closing(open_belt(f"mqtt://127.0.0.1:{broker}/sortline/line1/belt?client=belt&every_ms=100")) as belt:
        belt.stop("camera.black")
        first, second = plant.messages(2, timeout=10.0)
    assert json.loads(first[1]) == json.loads(second[1]) == {"stop": True, "reason": "camera.black", "sequence": 1}


def test_a_refused_topic_is_counted(broker: int) -> None:
    with closing(open_encoder(f"mqtt://127.0.0.1:{broker}/foreign/encoder?mm_per_pulse=0.1")) as encoder:
        wait_until(lambda: encoder.feeder.link.counters["subscribe_refused"], what="the refusal")  # type: ignore[union-attr]
        assert encoder.stale


def test_encoder_weights_and_shots_over_mqtt(broker: int) -> None:
    plant = Probe(broker, "plant", {"user": "plant", "password": "x"})
    plant.subscribe(("sortline/line1/shots", 1))
    base = f"mqtt://127.0.0.1:{broker}/sortline/line1"
    with ExitStack() as stack:
        encoder = stack.enter_context(
            closing(open_encoder(f"{base}/encoder?mm_per_pulse=0.1&stale_ms=60000&client=enc"))
        )
        wait_until(lambda: encoder.feeder.link.connected, what="the encoder's connection")  # type: ignore[union-attr]

        def publish_counts() -> bool:
            # Until the subscription stands, nothing arrives: a hostile message and a count, again and again.
            plant.publish("sortline/line1/encoder", b'{"pulses": NaN}')
            count = {"pulses": 0xFFFFFFFF, "at_ms": time.time_ns() // 1_000_000}
            plant.publish("sortline/line1/encoder", json.dumps(count).encode())
            return not encoder.stale

        wait_until(publish_counts, what="a reading")
        assert encoder.position_mm(time.monotonic()) == 0.0
        weights = stack.enter_context(
            closing(open_scalar(f"{base}/weight?client=weight", encoder, sensor_mm=0.0, tolerance_mm=5.0))
        )

        def publish_weights() -> bool:
            plant.publish("sortline/line1/weight", b'{"value": "heavy"}')
            plant.publish("sortline/line1/weight", b'{"value": 182.5, "pulses": 9}')
            return weights.join.remembered > 0

        wait_until(publish_weights, what="a weight")
        assert weights.join.value_for(1.0) == 182.5
        ejector = stack.enter_context(closing(open_ejector(f"{base}/shots?client=shots&ahead_mm=300", encoder)))
        ejector.fire(Shot(1, "reject", 7, 10.0), time.monotonic())  # waits until there is a connection
        ((topic, payload, *_),) = plant.messages(1, timeout=10.0)
    assert topic == "sortline/line1/shots"
    assert json.loads(payload) == {
        "sequence": 1,
        "lane": 1,
        "outlet": "reject",
        "item_id": 7,
        "target_mm": 10.0,
        "position_mm": 0.0,
        "target_pulses": 99,
    }
    assert encoder.feeder.counters["malformed"] > 0  # type: ignore[union-attr]


def test_a_line_takes_its_belt_from_the_plc_and_hands_it_shots_ahead_of_time(
    plc: int, program: ModbusPort, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((100, 200, 3), np.uint8))
    base = f"modbus://127.0.0.1:{plc}"
    config = LineConfig(
        camera=str(tmp_path),
        paced=False,
        lanes=1,
        encoder=f"{base}/holding/100?mm_per_pulse=0.1&poll_ms=5&stale_ms=5000&timeout_ms=5000&max_mm_s=1e6",
        ejector=f"{base}/holding/200?outlet=reject:7&slots=4&ahead_mm=150&timeout_ms=5000",
    )
    program.write(100, [0, 1000])
    with closing(open_hardware(config)) as world:
        wait_until(lambda: not getattr(world.encoder, "stale", True), what="the first reading")
        queue = world.ejection_queue(config, time.monotonic)
        start_mm = world.encoder.position_mm(time.monotonic())
        frame = world.source.read(1.0)
        assert frame is not None
        assert frame.belt_mm == start_mm
        assert queue.schedule(Shot(0, "reject", 1, start_mm + 400.0))
        queue.fire_due()
        assert queue.waiting == 1
        program.write(100, [0, 4000])
        wait_until(lambda: world.encoder.position_mm(time.monotonic()) >= start_mm + 300.0, what="the belt to move")
        wait_until(lambda: queue.fire_due() >= 0.0 and program.read("holding", 200, 6)[0] != 0, what="the hand-over")
        sequence, lane, outlet, high, low, again = program.read("holding", 200, 6)
        assert (sequence, lane, outlet) == (again, 0, 7)
        assert (high << 16) + low == 1000 + 4000
        assert queue.waiting == 1, "the shot stays until its place has come, and is then not handed over again"


def test_devices_without_an_encoder_are_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((100, 200, 3), np.uint8))
    with pytest.raises(ConfigError) as caught:
        open_hardware(LineConfig(camera=str(tmp_path), ejector="modbus://127.0.0.1:1/holding/0?outlet=reject:1"))
    assert caught.value.code == "line.no_encoder"
