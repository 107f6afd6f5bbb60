"""The supervisor's control of its line: the bundle that judges, the challenger beside it, the lot that is sorted.

A line that does not read is never waited for: a message that cannot be sent is logged, and the line that starts next
begins with the state of that moment.
"""

import logging
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from edge_agent.config import AgentConfig
from edge_agent.delivery.lifecycle import SlotState
from edge_agent.delivery.updater import Updater
from edge_agent.host import Host
from edge_agent.line_protocol import Beat, Go, Ready, Tuned
from edge_agent.state_directory import StateDirectory
from edge_agent.supervisor.line_keeper import LineKeeper, standby_for
from edge_agent.supervisor.line_process import LineProcess
from edge_agent.supervisor.lots import LotState
from models.errors import ConfigError, SortlineError
from models.messages import Phase, SafeState
from models.text import mask

log = logging.getLogger("sortline.supervisor")


class LineControl:
    """The line of one agent.

    Args:
        config: The agent's configuration.
        directory: Its state directory.
        boot_id: Of this start of the supervisor.
        host: The supervisor.
        updater: Names the bundle that judges; it is made after this object, hence a function.
        lot: The lot that runs.
    """

    def __init__(
        self,
        config: AgentConfig,
        directory: StateDirectory,
        boot_id: str,
        host: Host,
        *,
        updater: Callable[[], Updater],
        lot: Callable[[], LotState],
    ) -> None:
        self._config, self._directory, self._boot_id, self._host = config, directory, boot_id, host
        self._updater, self._lot = updater, lot
        self.keeper = LineKeeper(host, self)
        self.beat: Beat | None = None
        """The line's last sign of life; None = it does not run."""
        self.lanes, self.camera = 0, ""
        self.tuned: dict[str, str] = {}
        """How many threads the line's libraries use, and what was measured for it."""
        self._safe_state = SafeState.NONE
        """What the present line process was started with."""
        self._replaced = False
        """The present line process ends because it was asked to: nothing is to blame."""
        self.lifetime_items = 0
        """Items this line has judged since it was installed."""

    # -- the process ------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Runs one turn: starts and replaces line and standby."""
        self.keeper.tick(self._updater().judging, self.standby)

    @property
    def standby(self) -> str:
        """Digest of the bundle that a standby must hold; empty = none is wanted."""
        return standby_for(self._config.standby, self._state)

    @property
    def _state(self) -> SlotState:
        return self._updater().state

    @property
    def present(self) -> Go:
        """Returns the state from which a standby continues."""
        lot = self._lot()
        return Go(lifetime_items=self.lifetime_items, lot=lot.lot, variety=lot.variety)

    def start_process(self, digest: str, *, standby: bool) -> LineProcess:
        """Starts a line process, or a standby, with this bundle (empty = none)."""
        line = self._config.line
        if not line.threads:
            # The measurement of one line serves those after it.
            onnx, opencv = (int(self.tuned.get(f"{library}_threads", 0)) for library in ("onnx", "opencv"))
            opencv = line.opencv_threads or opencv
            if onnx and opencv:
                line = msgspec.structs.replace(line, threads=onnx, opencv_threads=opencv)
        lot = self._lot()
        config = msgspec.structs.replace(
            line,
            bundle=str(self._directory.slot(digest)) if digest else "",
            digest=digest,
            lot=lot.lot,
            variety=lot.variety,
            lifetime_items=self.lifetime_items,
            safe_state=self._updater().safe_state,
            boot_id=self._boot_id,
            owner=str(self._directory.lock_file),
            camera_levels=line.camera_levels or str(self._directory.camera_levels),
            trouble_file=line.trouble_file or str(self._directory.trouble),
        )
        if not standby:
            self._safe_state, self._replaced = config.safe_state, False
        return LineProcess(config, self._host.enqueue, standby=standby)

    def came_up(self, ready: Ready) -> None:
        """Records that the line reported that it works."""
        self.lanes, self.camera = ready.lanes, mask(ready.camera)[:200]
        self.keeper.came_up()

    def was_tuned(self, message: Tuned) -> None:
        """Keeps the number of threads that the line measured as best."""
        self.tuned |= message.facts

    def gone(self, process: object) -> bool:
        """Handles the end of a process; returns whether it was the line."""
        if not self.keeper.gone(process, self.standby):
            return False
        self.beat = None
        return True

    @property
    def was_replaced(self) -> bool:
        """Whether the line that ended last did so because it was asked to."""
        return self._replaced

    # -- what is asked ----------------------------------------------------------------------------------------

    @property
    def covered(self) -> bool:
        """Whether a standby can take over from a bundle on trial, or none is wanted."""
        return self.keeper.covered(self.standby)

    @property
    def line_ready(self) -> bool:
        """Whether a line process works."""
        return self.keeper.ready

    @property
    def outlets(self) -> Collection[str]:
        """Outlets that a recipe of this line may name."""
        return self._config.line.outlets

    def load_judging(self) -> None:
        """Makes the line use `Updater.judging`: by a swap while it runs, else at its next start."""
        updater, digest = self._updater(), self._updater().judging
        state, slot = updater.state, self._directory.slot(digest)
        if updater.safe_state is not self._safe_state:
            self._begin_safe_state(updater.safe_state)
        elif state.phase is Phase.TRIAL and digest == state.active:
            self.keeper.load(digest, slot, swap=updater.swap, swap_within_s=state.swap_within_s)
        else:
            # A rollback never waits for a lot change.
            self.keeper.load(digest, slot)

    def _begin_safe_state(self, safe_state: SafeState) -> None:
        """Begins or ends a safe state: with another line process, so that nothing of the old bundle is left."""
        line = self._config.line
        if safe_state is SafeState.STOP and not line.belt and line.camera != "simulated":
            self._host.report_error(
                ConfigError(
                    "safe_state.no_stop",
                    "Nothing can stop this belt; nothing is ejected instead.",
                    expected="line.belt",
                    got="none",
                )
            )
        if safe_state is SafeState.EJECT_ALL and line.fail_safe.outlet not in line.outlets_mm:
            self._host.report_error(
                ConfigError(
                    "safe_state.no_outlet",
                    "This line has no outlet that takes everything; nothing is ejected.",
                    expected=sorted(line.outlets_mm),
                    got=line.fail_safe.outlet,
                )
            )
        self._host.event("line.safe_state", safe_state or "The line judges again.")
        if self.keeper.line is not None:
            self._replaced = True
            self.keeper.line.kill()

    def load_shadow(self, digest: str) -> None:
        """Asks the line to take this challenger, or none (empty)."""
        samples = self._config.line.samples or str(self._directory.shadow_samples)
        slot = self._directory.slot(digest) if digest else None
        self._send("challenger", lambda line: line.load_shadow(digest, slot, samples))

    def set_lot(self, lot: str, variety: str) -> None:
        """Asks the line to begin another lot; one that does not respond is replaced by one that starts with it."""
        self._updater().lot_began()
        if not self._send("lot", lambda line: line.set_lot(lot, variety)) and self.keeper.line is not None:
            self.keeper.line.kill()

    def _send(self, what: str, send: Callable[[Any], None]) -> bool:
        line = self.keeper.line
        if line is None:
            return False
        try:
            send(line)
        except SortlineError as error:
            log.warning("%s not sent: %s", what, error)
            return False
        return True
