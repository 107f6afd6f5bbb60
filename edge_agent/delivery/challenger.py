"""The challenger of one agent: fetched and self-tested like any bundle, then judging in the shadow of the champion.

A desired state of mode `shadow` says which; one of mode `live` ends it. The champion's life cycle (`updater`) is never
touched by this module: while it fetches, tests or tries a bundle, the challenger waits. Every step is persisted before
its effect. Rules: a challenger is loaded into a line that already works, never at its start; a challenger whose line
dies twice soon after taking it is withdrawn; a failed one is tried again only when a newer generation asks for it.
"""

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Protocol

import msgspec

from edge_agent.config import DeliveryConfig
from edge_agent.delivery.lifecycle import ChallengerState, Trigger, advance_challenger
from edge_agent.delivery.selftest_process import SelfTestDone, start_selftest
from edge_agent.delivery.state_file import StateFile
from edge_agent.delivery.transfer import Transfer
from edge_agent.host import Host
from edge_agent.line_protocol import ShadowChanged, ShadowFailed
from edge_agent.state_directory import StateDirectory
from models.errors import BundleError, ConflictError
from models.messages import Desired, Fault, Mode, ShadowPhase, fault_of

log = logging.getLogger("sortline.challenger")
_PROVEN_S: Final = 60.0
"""Seconds after which the death of a line no longer counts against its challenger."""


class ShadowLine(Protocol):
    """The part of the line that a challenger needs."""

    @property
    def line_ready(self) -> bool:
        """Whether a line process works."""

    @property
    def outlets(self) -> Collection[str]:
        """Outlets that a recipe of this line may name."""

    def load_shadow(self, digest: str) -> None:
        """Asks the line to take this challenger, or none."""


class Challenger:
    """At most one challenger.

    Args:
        root: The agent's state directory.
        file: Where the state is kept.
        config: Of delivery and self-test.
        transfer: Fetches bundles; shared with the updater, which is idle while it is used from here.
        host: The supervisor.
        line: The line it judges on.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        root: Path,
        file: StateFile[ChallengerState],
        config: DeliveryConfig,
        transfer: Transfer,
        host: Host,
        line: ShadowLine,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory, self._config, self._transfer = StateDirectory(root), config, transfer
        self._host, self._line, self._clock = host, line, clock
        self._file = file
        self.state = file.load() or ChallengerState()
        self.running = ""
        """Digest of the challenger the line has now."""
        self._testing = ""
        """Digest of the bundle in the self-test."""
        self._asked = False
        self._since_s = 0.0

    def _save(self, state: ChallengerState) -> None:
        self._file.save(state)
        self.state = state
        self._host.report()

    # -- what is asked ----------------------------------------------------------------------------------------

    def desire(self, desired: Desired, blocked: tuple[str, ...]) -> None:
        """Takes up a newer desired state of either mode; an older one changes nothing.

        Args:
            desired: The desired state, not older than the champion's.
            blocked: Bundles that failed here as champions.
        """
        state = self.state
        if desired.generation <= state.generation:
            return
        wanted = desired.bundle if desired.mode is Mode.SHADOW else ""
        if not wanted and state.phase is ShadowPhase.IDLE:
            return
        if wanted in blocked:
            self._host.report_error(
                ConflictError(
                    "agent.digest_blocked",
                    "This bundle failed here before and is not tried again.",
                    expected="a bundle that was not blocked",
                    got=wanted,
                )
            )
            wanted = ""
        if wanted and wanted == state.digest and state.phase is ShadowPhase.SHADOW:
            self._save(msgspec.structs.replace(state, generation=desired.generation))
            return
        if state.phase is ShadowPhase.FETCHING:
            self._transfer.drop()
        trigger = Trigger.DESIRED if wanted else Trigger.DROPPED
        self._save(advance_challenger(state, trigger, generation=desired.generation, digest=wanted))
        self._end_running()

    def _end_running(self) -> None:
        if (self.running or self._asked) and self._line.line_ready:
            self._line.load_shadow("")
        self.running, self._asked = "", False

    # -- what happens -----------------------------------------------------------------------------------------

    @property
    def fetching(self) -> bool:
        """Whether chunks that come are the challenger's."""
        return self.state.phase is ShadowPhase.FETCHING

    def tick(self, *, settled: bool) -> None:
        """Runs one turn of the life cycle.

        Args:
            settled: The champion neither fetches nor tests nor tries a bundle.

        Raises:
            CapacityError: The disk is full; tried again by itself.
        """
        state = self.state
        if not settled:
            return
        if state.phase is ShadowPhase.FETCHING:
            if self._transfer.tick(state.digest):
                self._save(advance_challenger(state, Trigger.FETCHED))
        elif state.phase is ShadowPhase.SELF_TEST and not self._testing:
            self._start_selftest()
        elif state.phase is ShadowPhase.SHADOW:
            self._tick_shadow()

    def chunk(self, topic: str, payload: bytes) -> None:
        """Takes a chunk that arrived for the challenger."""
        try:
            error = self._transfer.take(topic, payload)
        except BundleError as found:
            self._transfer.drop()
            self._fail(fault_of(found))
            return
        if error is not None:
            self._host.report_error(error)

    def _start_selftest(self) -> None:
        self._testing = self.state.digest
        slot = self._directory.slot(self._testing)
        start_selftest(slot, self._testing, self._config, self._line.outlets, self._host.enqueue)

    def tested(self, done: SelfTestDone) -> bool:
        """Takes the result of a self-test; returns whether it was the challenger's."""
        if done.digest != self._testing:
            return False
        self._testing = ""
        if self.state.phase is not ShadowPhase.SELF_TEST or done.digest != self.state.digest:
            return True  # overtaken by a newer desired state
        if done.fault is not None:
            self._fail(done.fault)
            return True
        self._host.event("selftest.passed", "", bundle=done.digest, p99_ms=str(done.p99_ms), rss_mb=str(done.rss_mb))
        self._save(advance_challenger(self.state, Trigger.TEST_PASSED))
        return True

    def _tick_shadow(self) -> None:
        state, now = self.state, self._clock()
        if self.running:
            if state.tries and now - self._since_s > _PROVEN_S:
                self._save(advance_challenger(state, Trigger.TRIAL_PASSED))
        elif not self._asked and self._line.line_ready:
            if state.tries >= self._config.max_tries:
                message = f"The line died {state.tries} times soon after it took the challenger."
                self._fail(Fault(code="shadow.line_died", message=message))
                return
            # The try is counted before the line loads, so that it counts even if the line dies of it.
            self._save(advance_challenger(state, Trigger.TRIAL_STARTED))
            self._asked = True
            self._line.load_shadow(state.digest)

    def changed(self, message: ShadowChanged) -> None:
        """Records that the line has this challenger now, or none."""
        if message.digest != self.state.digest or self.state.phase is not ShadowPhase.SHADOW:
            return
        self._since_s = self._clock()
        self.running = message.digest
        self._host.event("shadow.started", "", bundle=message.digest, load_ms=f"{message.load_ms:.1f}")
        self._host.report()

    def failed(self, message: ShadowFailed) -> None:
        """Records that the line could not take the challenger, or had to give it up."""
        if message.digest == self.state.digest and self.state.phase is ShadowPhase.SHADOW:
            self.running, self._asked = "", False
            self._fail(message.fault)

    def line_gone(self) -> None:
        """Records that the line process ended; the challenger is offered to the next one."""
        self.running, self._asked = "", False

    def _fail(self, fault: Fault) -> None:
        self._host.set_fault(fault)
        self._host.event(fault.code, fault.message, bundle=self.state.digest, mode=Mode.SHADOW.value)
        log.warning("challenger failed: %s", fault.message)
        shadowing = self.state.phase is ShadowPhase.SHADOW
        self._save(advance_challenger(self.state, Trigger.TRIAL_FAILED if shadowing else Trigger.TEST_FAILED))
