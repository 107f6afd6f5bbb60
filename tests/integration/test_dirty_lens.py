"""A smudge on one simulated lens: frames, windows, detection, alarm, evidence; wiped, it closes by itself."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlmodel import select

from control_plane.database.engine import reading
from control_plane.database.tables.alarms import Alarm
from control_plane.services import Services
from edge_agent.simulation.faults import Faults, parse_faults
from models.messages import encode
from models.topics import Channel
from tests.control_plane.fleet.test_fleet import batch, reported, say, window
from tests.edge_agent.health.test_camera_sensor import LOOKS, Bench

WINDOW_S = 10
DIRTY_FROM, WIPED_FROM, END = 13, 25, 45
"""Numbers of windows: detection has learnt by the first, and the alarm must be there twelve windows later."""


@pytest.mark.slow
def test_one_dirty_lens_is_one_alarm_of_the_right_cause_and_closes_when_it_is_wiped(services: Services) -> None:
    lines = {"line-1": Bench(4), "line-2": Bench(5)}
    begun = datetime.now(UTC) - timedelta(seconds=WINDOW_S * END)
    for line, bench in lines.items():
        at_ms = round(datetime.now(UTC).timestamp() * 1000)
        say(services, Channel.REPORTED, encode(reported(labels={"site": "north"}, at_ms=at_ms)), line)
        bench.looks(LOOKS)
    states: list[list[tuple[str, str, str]]] = []
    for number in range(END):
        start = begun + timedelta(seconds=WINDOW_S * number)
        if number in {DIRTY_FROM, WIPED_FROM}:
            dirty = number == DIRTY_FROM
            lines["line-1"].line.set_trouble(parse_faults("dirt=0.8 dirt_x=0.8 dirt_y=0.2") if dirty else Faults())
        for line, bench in lines.items():
            counts = bench.looks(WINDOW_S)
            one = window(items=30, started_ms=round(start.timestamp() * 1000), camera_health=counts, bundle="")
            say(services, Channel.BATCH, batch(one, first=number), line)
        services.alarms.watcher.look(start + timedelta(seconds=WINDOW_S + 1))
        with reading(services.engine) as session:
            found = session.exec(select(Alarm).order_by(Alarm.id)).all()
        states.append([(alarm.line, alarm.cause, str(alarm.state)) for alarm in found])
    raised = next(number for number, alarms in enumerate(states) if alarms)
    assert states[raised] == [("line-1", "camera-dirty", "open")]
    assert DIRTY_FROM <= raised <= WIPED_FROM
    assert states[-1] == [("line-1", "camera-dirty", "resolved")], "no other alarm, and over by itself"
    assert found[0].reason == "cause gone"
    assert "upper right" in found[0].action
