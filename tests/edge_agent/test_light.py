"""The light changes at once, by brightness and colour: no item is missed, doubled or made up."""

import numpy as np
import pytest

from edge_agent.devices.hardware import NullEjector
from edge_agent.ejection.queue import EjectionQueue
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import LineCore
from edge_agent.simulation.faults import Faults
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge
from tests.simulators.tiny_bundle import tiny_bundle

STEPS = [
    Faults(brightness=0.6),
    Faults(brightness=1.4, blue=1.3),
    *(
        pytest.param(trouble, marks=pytest.mark.slow)
        for trouble in (
            Faults(brightness=0.4),
            Faults(brightness=0.8),
            Faults(brightness=1.2),
            Faults(brightness=1.4),
            Faults(blue=1.4, red=0.7),
            Faults(blue=0.6, red=1.3),
            Faults(brightness=0.6, blue=0.7, red=1.3),
            Faults(brightness=1.4, blue=1.3, red=1.2),
            Faults(dirt=0.5),
        )
    ),
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    directory = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny_bundle(directory)
    return Judge(directory)


class Bench:
    """A line whose verdicts are held against the truth."""

    def __init__(self, judge: Judge) -> None:
        config = SimulationConfig(apples=8, varieties=("red", "golden"), seed=3, lanes=1, touching_share=0.0)
        self.line = SimulatedLine(config, virtual=True)
        self.core = LineCore(
            geometry=self.line.geometry,
            counter=LineCounter(1, clock=self.line.now),
            queue=EjectionQueue(self.line, NullEjector(), clock=self.line.now),
            clock=self.line.now,
        )
        self.places: list[float] = []
        self.core.on_verdict = lambda judged, _outlet: self.places.append(judged.track.item_mm)
        self.core.use(judge)
        self.items: dict[int, float] = {}
        self.coverage: list[float] = []

    def run(self, frames: int) -> None:
        for _ in range(frames):
            frame = self.line.read(1.0)
            assert frame is not None
            self.core.process(frame)
            self.coverage.append(self.core.locator.coverage)
            self.items |= {item.item_id: item.item_mm for item in self.line.items()}

    def verdicts(self) -> list[int]:
        """Counts the verdicts of each item that crossed the picture."""
        to_mm = self.line.position_mm(self.line.now()) - 460.0
        return [
            sum(abs(place - item_mm) < 30.0 for place in self.places)
            for item_mm in self.items.values()
            if 60.0 < item_mm < to_mm
        ]

    def ghosts(self) -> int:
        """Verdicts where there is no item."""
        known = np.array(list(self.items.values()))
        return sum(abs(known - place).min() >= 30.0 for place in self.places)


@pytest.mark.parametrize("trouble", STEPS)
def test_a_step_of_the_light_floods_nothing(judge: Judge, trouble: Faults) -> None:
    bench = Bench(judge)
    bench.run(60)
    bench.line.set_trouble(trouble)
    bench.run(150)
    found = bench.verdicts()
    assert len(found) > 40
    assert set(found) == {1}
    assert bench.ghosts() == 0
    assert max(bench.coverage) < 0.6


def test_the_belt_under_the_items_follows_the_lamp_as_the_rest_does(judge: Judge) -> None:
    bench = Bench(judge)
    bench.run(60)
    before = bench.core.locator.background.copy()
    bench.line.set_trouble(Faults(brightness=1.4))
    bench.run(90)
    ratio = bench.core.locator.background[6:-6] / before[6:-6]  # without the dividers
    middle, edge = np.median(ratio[14:-14]), np.median(np.concatenate((ratio[:4], ratio[-4:])))
    assert middle == pytest.approx(1.4, abs=0.08)
    assert edge == pytest.approx(middle, abs=0.06)
