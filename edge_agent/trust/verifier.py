"""Lets a desired state through only when it is proven: keeps what was offered, has it verified, hands on the result.

The set of signed metadata, this agent's bin and the desired state come in any order, from the broker or from a stick;
the newest of each counts. Verification runs in a process of its own (`trust.verify`), one at a time, and is never
waited for.

Rules: what is not verified changes nothing; a refusal is counted, reported when it concerns something new, and looked
at again later (a clock may have been set, metadata renewed); assignment, bin and set may arrive a moment apart without
being called an attack; a fleet whose metadata changes every second does not keep this machine busy.
"""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.config import TrustConfig
from edge_agent.events import deliver_surely
from edge_agent.host import Host
from edge_agent.state_directory import StateDirectory
from edge_agent.trust.question import Answer, Question
from models.bundle import sha256
from models.errors import MessageError, TrustError
from models.messages import MAX_CONTROL_BYTES, Desired, Fault, decode
from models.signed_set import MAX_SET_BYTES

log = logging.getLogger("sortline.gate")
_APART: Final = frozenset({"trust.wrong_assignment", "trust.not_assigned", "trust.incomplete", "trust.mixed"})
"""Errors of an assignment whose bin or set has not arrived yet, or the other way round."""
_GRACE_S: Final = 3.0
_PARTS: Final = 3
"""Set, bin and document: the number of times that one of them may come alone."""
_SPACING_S: Final = 0.5
_CLOCK_ALARM_S: Final = 300
_LONGEST_RETRY_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Verified:
    """The end of a verification, with its result."""

    pair: tuple[str, str]
    desired: Desired | None
    fault: Fault | None
    facts: dict[str, str]
    quarantined: str = ""


class AssignmentVerifier:
    """Verifies the desired states of one agent.

    Args:
        root: The agent's state directory.
        config: Paths of the trust anchor and the trusted metadata, and the pauses between tries.
        agent_id: The agent to which an assignment must belong.
        host: The supervisor.
        generation: The newest generation that was taken up.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        root: Path,
        config: TrustConfig,
        agent_id: str,
        host: Host,
        generation: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self._anchor = places(root, config)
        self._config, self._agent_id, self._host, self._clock = config, agent_id, host, clock
        self._generation = generation
        self._offered, self._bin, self._document = b"", b"", b""
        self._pair = ("", "")
        self._tried: tuple[str, str] = ("", "")
        self._accepted = ""
        self._refusals = 0
        self._due_s = self._changed_s = 0.0
        self._done_s = -_LONGEST_RETRY_S
        self._running = self._clock_behind = False
        self.facts: dict[str, str] = {}
        """Facts of the last verification, for reports."""

    # -- what is offered --------------------------------------------------------------------------------------

    def offer_set(self, payload: bytes) -> None:
        """Takes a set of signed metadata.

        Raises:
            MessageError: `message.oversize`.
        """
        _check_size(payload)
        self._offered = payload
        self._changed()

    def offer_bin(self, payload: bytes) -> None:
        """Takes the bin that lists this agent's assignment.

        Raises:
            MessageError: `message.oversize`.
        """
        _check_size(payload)
        self._bin = payload
        self._changed()

    def offer_document(self, payload: bytes) -> None:
        """Takes a desired state, which is not verified yet.

        Raises:
            MessageError: It can never be one.
        """
        decode(payload, Desired, limit=MAX_CONTROL_BYTES)
        self._document = payload
        self._changed()

    def _changed(self) -> None:
        signed = sha256(self._offered) + sha256(self._bin)
        before, self._pair = self._pair, (signed, sha256(self._document))
        if self._pair == before:
            return
        if self._pair[1] != before[1]:
            self._refusals = 0
        self._changed_s = self._clock()
        # Fresh metadata alone is looked at now and then, a new assignment at once.
        pause_s = self._config.refresh_s if self._pair[1] == self._accepted else _SPACING_S
        self._due_s = self._done_s + pause_s

    # -- verifying --------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Starts a verification when one is due."""
        now = self._clock()
        if self._running or not self._document or now < self._due_s:
            return
        if not self._offered:
            self._due_s = now + self._config.retry_s
            self._settle(Fault(code="trust.no_set", message="No signed metadata came; nothing is changed."))
            return
        if self._pair == self._tried and self._pair[1] == self._accepted:
            return
        self._running = True
        body = _question(self._offered, self._bin, self._document)
        threading.Thread(target=self._run, args=(self._pair, body), name="verify", daemon=True).start()

    def _run(self, pair: tuple[str, str], body: bytes) -> None:
        command = _command(self.folder, self._anchor, self._agent_id)
        deliver_surely(self._host.enqueue, _ask(command, body, pair, self._config.timeout_s))

    def done(self, verified: Verified) -> Desired | None:
        """Takes the result of a verification; returns the desired state that is proven, or None."""
        self._running = False
        self._tried, self._done_s = verified.pair, self._clock()
        self.facts = verified.facts or self.facts
        self._look_at_clock()
        if verified.quarantined:
            self._host.event("trust.memory_broken", f"Trust begins again at the anchor; see {verified.quarantined}.")
        if verified.fault is not None:
            self._refuse(verified)
            return None
        self._host.counters["trust_accepted"] += 1
        self._refusals = 0
        self._accepted = verified.pair[1]
        if verified.pair[1] == self._pair[1]:
            self._due_s = self._done_s + self._config.refresh_s
        return verified.desired

    def _look_at_clock(self) -> None:
        """Reports once that signed metadata is later than this machine's clock, until the clock is right again."""
        behind_s = int(self.facts.get("clock_behind_s", "0"))
        if behind_s > _CLOCK_ALARM_S and not self._clock_behind:
            self._host.event("clock.behind", "The clock is behind what was signed; set it.", behind_s=str(behind_s))
        self._clock_behind = behind_s > _CLOCK_ALARM_S

    def _refuse(self, verified: Verified) -> None:
        fault = verified.fault or Fault(code="trust.malformed", message="")
        self._host.counters[f"refused_{fault.code}"] += 1
        self._refusals += 1
        if verified.pair != self._pair:
            return  # something newer is here already
        patient_until_s = self._changed_s + _GRACE_S
        if fault.code in _APART and self._refusals <= _PARTS and self._clock() < patient_until_s:
            self._due_s = patient_until_s
            return
        pause_s = min(self._config.retry_s * 2.0 ** min(self._refusals - 1, 10), _LONGEST_RETRY_S)
        self._due_s = self._clock() + pause_s
        self._settle(fault)

    def _settle(self, fault: Fault) -> None:
        """Reports a refusal where it keeps something new from happening."""
        log.warning("not accepted: %s %s", fault.code, fault.message)
        wanted = decode(self._document, Desired)
        if wanted.generation > self._generation():
            self._host.report_error(TrustError(fault.code, fault.message))


def places(root: Path, config: TrustConfig) -> tuple[Path, Path]:
    """Returns the trust folder and the trust anchor of an agent."""
    folder = Path(config.folder) if config.folder else StateDirectory(root).trust
    return folder, Path(config.root) if config.root else folder / "root.json"


def _check_size(payload: bytes) -> None:
    if len(payload) > MAX_SET_BYTES:
        raise MessageError(
            "message.oversize", "Signed metadata is too large.", expected=MAX_SET_BYTES, got=len(payload)
        )


def _question(offered: bytes, own_bin: bytes, document: bytes) -> bytes:
    return msgspec.msgpack.encode(Question(offered=offered, bin=own_bin, document=document))


def verify_now(
    root: Path, config: TrustConfig, agent_id: str, offered: bytes, own_bin: bytes, document: bytes
) -> dict[str, str]:
    """Verifies and waits for the answer; for a person at the command line.

    Raises:
        TrustError: It is not proven.
    """
    body = _question(offered, own_bin, document)
    found = _ask(_command(*places(root, config), agent_id), body, ("", ""), config.timeout_s)
    if found.fault is not None:
        raise TrustError(found.fault.code, found.fault.message)
    return found.facts


def _command(folder: Path, anchor: Path, agent_id: str) -> list[str]:
    command = [sys.executable, "-m", "edge_agent.trust.verify", "--folder", str(folder)]
    return [*command, "--root", str(anchor), "--agent", agent_id]


def _ask(command: list[str], body: bytes, pair: tuple[str, str], timeout_s: float) -> Verified:
    try:
        done = subprocess.run(command, input=body, capture_output=True, timeout=timeout_s, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        return _crashed(pair, str(error)[:300])
    try:
        found = msgspec.json.decode(done.stdout, type=Answer)
    except msgspec.MsgspecError:
        return _crashed(pair, f"exit status {done.returncode}: {done.stderr[-300:].decode(errors='replace')}")
    if found.fault is None and found.desired is None:
        return _crashed(pair, "it answered nothing")
    return Verified(pair, found.desired, found.fault, found.facts, found.quarantined)


def _crashed(pair: tuple[str, str], how: str) -> Verified:
    fault = Fault(code="trust.crashed", message=f"The verifying process failed: {how}"[:600])
    return Verified(pair, None, fault, {})
