"""What the line does while its camera is blind: let through, eject everything, or stop the belt.

`pass` fires nothing; the belt that went by unseen is counted in millimetres. `eject-all` treats every stretch of belt
that was not seen as if a bad item lay on it: shots at a pitch closer than an item, on every lane, by belt position; so
a belt that stands fires nothing, and what was seen well before and after is judged as always. `stop-line` asks the belt
to stop and, when the camera is back, to run again; whether it may run is for the machine's own safety chain to decide.

Items that were partly seen keep their views: they are judged by what there is. The field of view's second half at the
return belongs to the camera again (an item there gets at least half its views), the first half to the fail-safe.
Called by the sorting thread; never waits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from edge_agent.ejection.queue import EjectionQueue
from edge_agent.health.camera import BLIND
from edge_agent.interfaces import BeltControl, LineGeometry, Shot
from edge_agent.line.counters import LineCounter
from edge_agent.line.sorting import LineCore
from edge_agent.line_config import Action, FailSafeConfig
from models.messages import SafeState

ITEM_MM: Final = 40.0
"""Half of a large item: so far before column 0 the centre of an item may lie that was not seen whole."""
SAFE_STATE: Final = "line.safe_state"
"""Stands in the place of a camera's fault while a safe state is asked for."""
ACTIONS: Final[dict[SafeState, Action]] = {
    SafeState.EJECT_ALL: "eject-all",
    SafeState.PASS_ALL: "pass",
    SafeState.STOP: "stop-line",
}
"""The action of each safe state."""
_MOST_SHOTS: Final = 64
"""Per lane and step: a position that jumps by kilometres must not fill the queue."""


@dataclass(slots=True)
class FailSafe:
    """Executes the fail-safe of one line.

    Attributes:
        config: Action for each fault.
        geometry: Lanes and outlets of the line.
        queue: Takes the shots of `eject-all`.
        counter: Counts blind time, blind belt and shots.
        belt: Stops the belt; None where nothing can.
        on_action: Called with the action that begins, or with "" when all is as it was.
    """

    config: FailSafeConfig
    geometry: LineGeometry
    queue: EjectionQueue
    counter: LineCounter
    belt: BeltControl | None = None
    on_action: Callable[[str, str], None] = lambda _action, _fault: None
    requested: Action | None = None
    """What is done whatever the camera sees: a safe state that was asked for."""
    action: str = ""
    """Action in force; empty = none."""
    _fault: str = ""
    _seen_mm: float | None = None
    """Belt position of the last frame that was judged."""
    _next_mm: float = 0.0
    """Belt coordinate of the next shot of `eject-all`."""
    _before: tuple[float, float] = field(default=(0.0, 0.0))
    """Time and belt position of the last step with a fault."""
    reached_mm: float = -math.inf
    """Belt coordinate up to which `eject-all` fires; items up to there are no evidence about a valve."""
    _shots: int = 0

    def saw(self, belt_mm: float) -> None:
        """Notes that a frame taken at this belt position was judged."""
        self._seen_mm = belt_mm

    def instruct(self, core: LineCore) -> None:
        """Sets in the core where items without a verdict go, and up to which belt coordinate `eject-all` fires."""
        core.unjudged_outlet = self.config.outlet if self.action == "eject-all" else ""
        core.blind_to_mm = self.reached_mm

    def step(self, fault: str, now_s: float, belt_mm: float) -> None:
        """Does one turn; costs nothing while the camera is good.

        Args:
            fault: The camera's fault, empty when it is good.
            now_s: Monotonic seconds.
            belt_mm: Belt position now.
        """
        if self.requested is not None:
            fault = fault or SAFE_STATE
        if not fault and not self._fault:
            return
        if fault != self._fault:
            self._change(fault, now_s, belt_mm)
        if not fault:
            return
        before_s, before_mm = self._before
        self._before = now_s, belt_mm
        if fault in BLIND:
            self.counter.camera("blind_ms", round((now_s - before_s) * 1000.0))
            self.counter.camera("blind_mm", round(max(belt_mm - before_mm, 0.0)))
        if self.action == "eject-all":
            self._eject(belt_mm)

    def _change(self, fault: str, now_s: float, belt_mm: float) -> None:
        was, action = self.action, (self.requested or self.config.action(fault)) if fault else ""
        if not self._fault:
            self._before = now_s, belt_mm
        if was == "eject-all" and action != "eject-all":
            self._eject(belt_mm)
        if action == "eject-all" and was != "eject-all":
            self._next_mm = (belt_mm if self._seen_mm is None else self._seen_mm) - ITEM_MM
        self._fault, self.action = fault, action
        if was == action:
            return
        if self.belt is not None and action == "stop-line":
            self.belt.stop(fault)
        if self.belt is not None and was == "stop-line":
            self.belt.run()
        self.on_action(action, fault)

    def _eject(self, belt_mm: float) -> None:
        """Fires at the belt that lies behind the middle of the picture and was not seen."""
        distance_mm = self.geometry.outlets_mm.get(self.config.outlet)
        if distance_mm is None:
            return
        half_mm = min(self.geometry.width_px * self.geometry.mm_per_px, distance_mm) / 2.0
        pitch_mm = self.config.pitch_mm
        if self.queue.rules.close == "skip":
            pitch_mm = max(pitch_mm, self.queue.rules.pitch_mm)
        to_mm = belt_mm - half_mm
        if to_mm - self._next_mm > _MOST_SHOTS * pitch_mm:
            self.counter.camera("blind_missed_mm", round(to_mm - self._next_mm - _MOST_SHOTS * pitch_mm))
            self._next_mm = to_mm - _MOST_SHOTS * pitch_mm
        while self._next_mm <= to_mm:
            for lane in range(len(self.geometry.lanes)):
                self._shots -= 1
                shot = Shot(lane, self.config.outlet, self._shots, self._next_mm + distance_mm, blind=True)
                taken = self.queue.schedule(shot)
                self.counter.camera("blind_shots" if taken else "blind_shots_late")
            self._next_mm += pitch_mm
        self.reached_mm = self._next_mm + ITEM_MM
