"""Drives the update's life cycle on the box: fetch, self-test, trial, commit or rollback (`lifecycle` has the table).

Every step persists its state before its effect, so a crash or a power cut at any line is continued or undone at the
next start (`recover`). The broker and the line process are reached only through its `Host` and `line`. The commit is
local and final; a lost report never changes what runs.
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Final, Protocol

import msgspec
from msgspec import UNSET

from edge_agent.config import DeliveryConfig
from edge_agent.delivery.fetch import collect_garbage
from edge_agent.delivery.lifecycle import SlotState, Trigger, advance
from edge_agent.delivery.selftest_process import SelfTestDone, start_selftest
from edge_agent.delivery.state_file import StateFile
from edge_agent.delivery.transfer import Transfer
from edge_agent.host import Host
from edge_agent.line_protocol import Beat, LoadFailed, ModelFailed
from edge_agent.state_directory import StateDirectory
from models.bundle import read_bundle
from models.errors import BundleError, ConflictError
from models.messages import Desired, Fault, Mode, Phase, SafeState, Swap

log = logging.getLogger("sortline.updating")
_SHORTEST_TRIAL_S: Final = 1.0


class LineSwitch(Protocol):
    """The part of the line that a trial needs."""

    @property
    def covered(self) -> bool:
        """Whether a standby can take over from a bundle on trial, or none is wanted."""

    @property
    def outlets(self) -> Collection[str]:
        """Outlets that a recipe of this line may name."""

    def load_judging(self) -> None:
        """Makes the line use `Updater.judging`."""


class Updater:
    """The bundles of one agent.

    Args:
        root: The agent's state directory.
        config: The settings of delivery.
        file: The file of the state.
        transfer: Fetches bundles.
        host: The supervisor.
        line: The line that judges.
    """

    def __init__(
        self,
        root: Path,
        config: DeliveryConfig,
        file: StateFile[SlotState],
        transfer: Transfer,
        host: Host,
        line: LineSwitch,
    ) -> None:
        self._directory, self._config, self._file = StateDirectory(root), config, file
        self._host, self._line = host, line
        self.transfer = transfer
        self.state = file.load() or SlotState()
        self._testing = False
        self._found: SelfTestDone | None = None
        self._trial_running_s = 0.0
        self._waited_s: float | None = None
        """How long the next try has been waiting for a standby; None = no try waits."""
        self._lot_began = False
        """Another lot has begun while the try waited."""
        self._died = ""
        """Why the line of the present try ended, until that is on disk."""
        self._failed: Fault | None = None
        """Why the bundle on trial is taken back, until that is on disk."""
        self._overtaken = False
        """A newer desired state is being taken up: the trial commits nothing until that is on disk."""

    def slot(self, digest: str) -> Path:
        """Returns the slot of this bundle."""
        return self._directory.slot(digest)

    @property
    def judging(self) -> str:
        """The bundle that the line must judge with: the one on trial only while a try runs; none in a safe state."""
        if self._trying:
            return self.state.active
        return "" if self.state.safe_state else self.state.committed

    @property
    def safe_state(self) -> SafeState:
        """The safe state that replaces judging; a bundle on trial judges all the same."""
        return SafeState.NONE if self._trying else self.state.safe_state or SafeState.NONE

    @property
    def _trying(self) -> bool:
        waits = self._waited_s is not None or self._died or self._failed is not None
        return self.state.phase is Phase.TRIAL and not waits

    @property
    def swap(self) -> Swap:
        """What the line waits for before it switches to the bundle on trial."""
        return Swap.BELT_GAP if self._lot_began else self.state.swap

    def lot_began(self) -> None:
        """Records that another lot begins, so that a bundle that waits for its standby need not wait for the next."""
        self._lot_began = self._waited_s is not None and self.state.swap is Swap.LOT_CHANGE

    def _no_try(self) -> None:
        """Whether no try waits and no line died, so that `judging` is the active bundle."""
        self._waited_s, self._died, self._failed = None, "", None

    def progress(self, beat: Beat | None) -> float:
        """The progress of the present phase, 0 to 1."""
        if self.state.phase is Phase.FETCHING:
            return self.transfer.progress
        if self.state.phase is Phase.TRIAL and beat is not None and beat.digest == self.state.active:
            return min(1.0, beat.items_on_bundle / max(self.state.trial_items, 1))
        return 1.0 if self.state.phase is Phase.COMMITTED else 0.0

    def _save(self, state: SlotState, fault: Fault | None = None) -> None:
        """Persists the state before any effect, then reports it with its reason."""
        self._file.save(state)
        self.state = state
        if fault is not None:
            self._host.set_fault(fault)
        self._host.report()

    # -- start ------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Continues or undoes, after a start, the phase in which the power failed.

        Raises:
            OSError: The state could not be saved; necessary steps are tried again without a call.
        """
        phase = self.state.phase
        if self.state.active and not self._usable(self.state.active):
            self._host.event("slots.active_broken", f"{self.state.active} does not verify; going back.")
            fallback = self.state.previous if self._usable(self.state.previous) else ""
            # The next start would find the same: a state that cannot be saved now is saved with the next change.
            self.state = msgspec.structs.replace(
                self.state,
                active=fallback,
                previous=(self.state.before or "") if fallback else "",
                before=UNSET,
                phase=Phase.ROLLED_BACK,
            )
            self._save(self.state)
        elif phase is Phase.TRIAL:
            self._next_try(wait=self._usable(self.state.previous))
        elif phase in {Phase.FETCHING, Phase.VERIFIED, Phase.SELF_TEST}:
            self.state = msgspec.structs.replace(self.state, phase=Phase.FETCHING)

    def _usable(self, digest: str) -> bool:
        try:
            read_bundle(self.slot(digest), digest=digest)
        except BundleError as error:
            log.warning("%s", error)
            return False
        return bool(digest)

    # -- what is asked ----------------------------------------------------------------------------------------

    def desire(self, desired: Desired) -> None:
        """Takes up a newer desired state; an older one changes nothing.

        Whatever was being fetched, tested or tried ends in every case, also when the new bundle is refused: only a
        desired state of mode `shadow` leaves it alone. A bundle that is committed already needs no trial.

        Raises:
            OSError: The state could not be saved: offer the desired state again. A trial commits nothing meanwhile.
        """
        state = self.state
        if desired.generation <= state.generation:
            return
        facts = {"generation": desired.generation, "rollout_id": desired.rollout_id}
        log.info("desired generation %s bundle %s", desired.generation, desired.bundle[:12])
        if desired.mode is Mode.SHADOW:
            # `challenger` handles it; the champion's phase goes on.
            self._save(msgspec.structs.replace(state, generation=desired.generation))
            return
        self._overtaken = True
        if desired.bundle in state.blocked:
            self._host.report_error(
                ConflictError(
                    "agent.digest_blocked",
                    "This bundle failed here before and is not tried again.",
                    expected="a bundle that was not blocked",
                    got=desired.bundle,
                )
            )
            if state.settled:
                self._take_up(msgspec.structs.replace(state, **facts))
            else:
                self._take_up(advance(state, Trigger.DROPPED, **facts))
            return
        self._host.fault = None
        if desired.bundle in {"", state.committed}:  # an empty one is a recall
            safe_state = desired.safe_state or UNSET
            self._take_up(advance(state, Trigger.DROPPED, safe_state=safe_state, **facts))
            return
        self._take_up(
            advance(
                state,
                Trigger.DESIRED,
                target=desired.bundle,
                trial_items=desired.trial_items,
                trial_s=desired.trial_s,
                swap=desired.swap,
                swap_within_s=desired.swap_within_s,
                **facts,
            )
        )

    def _take_up(self, state: SlotState) -> None:
        """Saves the state after a desired state, and ends what it overtakes."""
        before = self.judging, self.safe_state
        if not self.state.settled:
            self.transfer.drop()
        self._save(state)
        self._overtaken = False
        self._no_try()
        if (self.judging, self.safe_state) != before:
            self._line.load_judging()

    # -- what happens -----------------------------------------------------------------------------------------

    def tick(self, elapsed_s: float, beat: Beat | None) -> None:
        """Runs one turn: checks the event that the present phase waits for.

        Args:
            elapsed_s: Since the last turn.
            beat: The line's last sign of life.

        Raises:
            CapacityError: The disk is full; tried again by itself.
            OSError: The state could not be saved; tried again by itself.
        """
        phase = self.state.phase
        if phase is Phase.FETCHING:
            if self.transfer.tick(self.state.target):
                self._host.fault = None
                self._save(advance(self.state, Trigger.FETCHED))
        elif phase is Phase.VERIFIED and not self._testing:
            self._start_selftest()
        elif phase is Phase.SELF_TEST and self._found is not None:
            self._judge_found(self._found)
        elif phase is Phase.TRIAL:
            if self._overtaken:
                return
            if self._failed is not None:
                self._roll_back(self._failed)
            elif self._died:
                self._after_death()
            elif self._waited_s is not None:
                self._wait_for_standby(elapsed_s)
            else:
                self._tick_trial(elapsed_s, beat)

    def chunk(self, topic: str, payload: bytes) -> None:
        """Takes a chunk that arrived."""
        try:
            error = self.transfer.take(topic, payload)
        except BundleError as found:
            self._host.report_error(found)
            self.transfer.drop()
            self._save(advance(self.state, Trigger.TEST_FAILED))
            return
        if error is not None:
            self._host.report_error(error)

    # -- self-test and trial ----------------------------------------------------------------------------------

    def _start_selftest(self) -> None:
        self._save(advance(self.state, Trigger.TEST_STARTED))
        self._testing = True
        target = self.state.target
        start_selftest(self.slot(target), target, self._config, self._line.outlets, self._host.enqueue)

    def tested(self, done: SelfTestDone) -> None:
        """Takes the result of the self-test, which is kept until it is on disk."""
        self._testing, self._found = False, done
        self._judge_found(done)

    def _judge_found(self, done: SelfTestDone) -> None:
        if self.state.phase is not Phase.SELF_TEST or done.digest != self.state.target:
            self._found = None  # overtaken by a newer desired state
            return
        self._save(advance(self.state, Trigger.TEST_PASSED if done.fault is None else Trigger.TEST_FAILED), done.fault)
        self._found = None
        if done.fault is not None:
            self._host.event(done.fault.code, done.fault.message, bundle=done.digest)
            return
        self._host.event("selftest.passed", "", bundle=done.digest, p99_ms=str(done.p99_ms), rss_mb=str(done.rss_mb))
        self._next_try()

    def _next_try(self, *, wait: bool = True) -> None:
        """Begins the next try as soon as a standby could take over from it, or has been waited for long enough."""
        if self.state.tries >= self._config.max_tries:
            self._roll_back(Fault(code="trial.too_many_tries", message="The bundle did not survive its trial."))
            return
        self._waited_s, self._lot_began = 0.0 if wait else self._config.standby_wait_s, False
        self._wait_for_standby(0.0)

    def _wait_for_standby(self, elapsed_s: float) -> None:
        self._waited_s = (self._waited_s or 0.0) + elapsed_s
        covered = self._line.covered
        if not covered and self._waited_s < self._config.standby_wait_s:
            return
        if not covered:
            log.warning("the trial begins without a standby after %.0f s", self._waited_s)
        self._start_try()

    def _start_try(self) -> None:
        """Counts the try before the bundle is loaded, so that it counts after a crash, too."""
        self._save(advance(self.state, Trigger.TRIAL_STARTED))
        self._no_try()
        self._trial_running_s = 0.0
        self._line.load_judging()

    def _roll_back(self, fault: Fault) -> None:
        known, self._failed = self._failed, fault
        failed = self.state.active
        try:
            self._save(advance(self.state, Trigger.TRIAL_FAILED), fault)
        except OSError:
            if known is None:
                self._line.load_judging()  # the old bundle judges; after a power cut it would be tried again
            raise
        self._no_try()
        log.warning("rolled back: %s", fault.message)
        self._line.load_judging()
        self._host.event(fault.code, fault.message, bundle=failed)

    def _tick_trial(self, elapsed_s: float, beat: Beat | None) -> None:
        if beat is None or beat.digest != self.state.active:
            return
        if beat.items_on_bundle >= self.state.trial_items:
            self._save(advance(self.state, Trigger.TRIAL_PASSED))
            self._host.event("bundle.committed", "", bundle=self.state.active, items=str(beat.items_on_bundle))
            collect_garbage(self._directory.root, {self.state.active, self.state.previous})
            return
        if beat.belt_running:
            self._trial_running_s += elapsed_s
        if self._trial_running_s > max(self.state.trial_s, _SHORTEST_TRIAL_S):
            message = (
                f"{beat.items_on_bundle} of {self.state.trial_items} items in {self.state.trial_s:g} s of running belt."
            )
            self._roll_back(Fault(code="trial.timeout", message=message))

    def line_died(self, reason: str) -> None:
        """Takes the end of the line process, which during a try counts against the bundle.

        Raises:
            OSError: The state could not be saved; tried again by itself.
        """
        if self.state.phase is Phase.TRIAL and self._waited_s is None:
            self._died = reason
            self._after_death()

    def _after_death(self) -> None:
        if self.state.tries >= self._config.max_tries:
            self._roll_back(Fault(code="trial.line_died", message=self._died))
        else:
            self._next_try()
        self._died = ""

    def bundle_failed(self, message: LoadFailed | ModelFailed) -> None:
        """Takes the line's report that it could not load or run a bundle."""
        self._host.event(message.fault.code, message.fault.message, bundle=message.digest)
        if message.digest != self.judging:
            return
        if self.state.phase is Phase.TRIAL and self._waited_s is None:
            self._roll_back(message.fault)
        elif isinstance(message, ModelFailed):
            # A committed model failed on one input: it is loaded again, so that judging goes on.
            self._host.set_fault(message.fault)
            self._line.load_judging()
