"""A simulated line with camera health, sorting and fail-safe as in the line process; frames move its clock."""

from edge_agent.ejection.confirmation import ConfirmationLedger
from edge_agent.ejection.queue import EjectionQueue, EjectionRules
from edge_agent.health.camera import CameraHealth
from edge_agent.line.counters import LineCounter
from edge_agent.line.fail_safe import FailSafe
from edge_agent.line.sorting import LineCore
from edge_agent.line_config import FailSafeConfig
from edge_agent.simulation.faults import Faults
from edge_agent.simulation.line import SimulatedLine, SimulationConfig
from edge_agent.vision.judge import Judge, Judged
from models.errors import CameraError

FAULTS = {
    "absent": Faults(absent=True),
    "frozen": Faults(freeze=True),
    "corrupt": Faults(corrupt_share=0.6),
    "black": Faults(brightness=0.0),
    "overexposed": Faults(brightness=9.0),
    "wrong_size": Faults(wrong_size=True),
    "stalled": Faults(drop_share=1.0),
    "slow": Faults(drop_share=0.55),
}


class Bench:
    """The line process's loop over a simulated line whose clock the frames move."""

    def __init__(self, judge: Judge | None = None, *, seed: int = 1, ledger: bool = False, **fail_safe: object) -> None:
        config = SimulationConfig(apples=8, varieties=("golden",), seed=seed, defect_share=0.5, lanes=1)
        self.line = SimulatedLine(config, virtual=True)
        self.counter = LineCounter(1, truth=self.line.truth, clock=self.line.now)
        self.queue = EjectionQueue(
            self.line,
            self.line,
            clock=self.line.now,
            rules=EjectionRules(),
            ledger=ConfirmationLedger() if ledger else None,
        )
        self.judged: list[tuple[Judged, str]] = []
        self.core = LineCore(
            geometry=self.line.geometry,
            counter=self.counter,
            queue=self.queue,
            clock=self.line.now,
            on_verdict=lambda judged, outlet: self.judged.append((judged, outlet)),
            confirmation=self.line if ledger else None,
        )
        self.core.use(judge)
        self.events: list[tuple[float, str]] = []
        self.watch = CameraHealth(frames_per_s=30.0, on_change=lambda code, _: self.events.append((self.now, code)))
        self.actions: list[str] = []
        self.safe = FailSafe(
            FailSafeConfig(**fail_safe),  # type: ignore[arg-type]
            self.line.geometry,
            self.queue,
            self.counter,
            self.line,
            lambda action, _: self.actions.append(action),
        )

    @property
    def now(self) -> float:
        return self.line.now()

    def run(self, seconds: float) -> None:
        until_s = self.now + seconds
        while self.now < until_s - 1e-6:
            self._turn()

    def _turn(self) -> None:
        before_s, frame = self.now, None
        try:
            frame = self.line.read(1.0)
        except CameraError as error:
            self.watch.failed(error, self.now)
        else:
            if frame is None:
                self.watch.silent(self.now)
        self.queue.run_to(before_s, self.now)
        if frame is not None and self.watch.take(frame, self.now):
            if self.core.judge is not None:
                self.core.process(frame)
            self.safe.saw(frame.belt_mm)
        elif frame is not None:
            self.counter.count("frames_bad")
            self.core.refused(1)
        self.safe.step(self.watch.fault, self.now, self.line.position_mm(self.now))
        self.safe.instruct(self.core)
        if frame is None or self.watch.blind:
            self.core.unseen(self.line.position_mm(self.now))

    def trouble(self, trouble: Faults, seconds: float) -> float:
        began_s = self.now
        self.line.set_trouble(trouble)
        self.run(seconds)
        self.line.set_trouble(Faults())
        return began_s

    @property
    def escaped(self) -> int:
        """Counts the items that passed the outlet on the belt."""
        return sum(count for what, count in self.line.truth().outcomes.items() if what.endswith(">pass"))
