"""The lot that runs on this line, named by the operator beside it or by a command of the control plane.

A lot is a name. Its meaning for the items is in the signed recipe of the running bundle, which has terms for lots and
varieties; no recipe decides here. Rules: the lot is stored durably before the line receives it; the command that was
issued last counts, in whatever order commands arrive; a command that is late, early, repeated or not allowed changes
nothing, and its sender is answered with the reason; an operator's request counts from the moment it is found and needs
neither network nor clock; the start configuration counts until a lot is named, and again after it was changed.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from edge_agent.delivery.state_file import StateFile, champion_file
from edge_agent.host import Host
from edge_agent.line_protocol import Beat
from edge_agent.state_directory import StateDirectory
from models.bundle import RECIPE
from models.errors import BundleError, InputError, MessageError
from models.files import write_atomically
from models.messages import (
    CLOCK_SLACK_MS,
    Command,
    Counter,
    Fault,
    LotSource,
    LotText,
    RequestId,
    Response,
    RunningLot,
    decode,
    fault_of,
    wall_ms,
)
from models.recipe import parse_recipe

log = logging.getLogger("sortline.lots")
T = TypeVar("T", bound=msgspec.Struct)
MAX_LIFE_MS: Final = 600_000
"""The longest time for which a command may be valid."""
TERMS: Final = {
    "lot": "of this lot",
    "variety": "of this variety",
    "recipe": "the recipe's own: it has none for this lot or variety",
}
PAUSE_S: Final = 1.0
"""Shortest time between two applied commands, because each is written to the disk and closes a window."""
_REMEMBERED: Final = 32
_MAX_BYTES: Final = 16 * 1024


class LotState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The state of the lot that must survive a power cut."""

    schema_version: Literal[1] = 1
    lot: LotText = ""
    variety: LotText = ""
    source: LotSource = LotSource.CONFIGURATION
    since_ms: Counter = 0
    configured: tuple[LotText, LotText] = ("", "")
    """Lot and variety of the start configuration when this was written: a different one has been configured since."""
    issued_at_ms: Counter = 0
    """When the newest applied command was issued, by the control plane's clock."""
    requests: Annotated[tuple[RequestId, ...], msgspec.Meta(max_length=_REMEMBERED)] = ()
    """The applied requests, newest last: a repetition is confirmed again and changes nothing."""


class LotRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request of the operator at the line; a file in the state directory."""

    schema_version: Literal[1] = 1
    request_id: RequestId
    lot: LotText
    variety: LotText


def accept(state: LotState, command: Command, now_ms: int) -> LotState:
    """Returns the state after a command; the same one when it was applied before. Pure.

    Args:
        state: The present state.
        command: The command as received; its sender was checked by the broker alone.
        now_ms: The time by this machine's clock.

    Raises:
        MessageError: `command.bad_times`, `command.expired`, `command.from_future`, `command.overtaken`.
    """
    if command.request_id in state.requests:
        return state
    life_ms, late_ms = command.expires_at_ms - command.issued_at_ms, now_ms - command.expires_at_ms
    if not 0 < life_ms <= MAX_LIFE_MS:
        raise MessageError(
            "command.bad_times",
            "A command is valid for a while, not longer.",
            expected=f"1..{MAX_LIFE_MS}",
            got=life_ms,
        )
    if late_ms > 0:
        raise MessageError(
            "command.expired",
            "The command came too late, or this machine's clock is ahead: send it again, or set the lot at the line.",
            expected="before it expired",
            got=f"{late_ms / 1000.0:.0f} s later",
        )
    early_ms = command.issued_at_ms - now_ms
    if early_ms > CLOCK_SLACK_MS:
        raise MessageError(
            "command.from_future",
            "The command is from the future: this machine's clock is behind, or the control plane's ahead. Set the lot "
            "at the line.",
            expected=f"at most {CLOCK_SLACK_MS / 1000.0:.0f} s ahead",
            got=f"{early_ms / 1000.0:.0f} s",
        )
    # A command applied while both clocks were years ahead must not block all others until then.
    newest_ms = state.issued_at_ms if state.issued_at_ms <= now_ms + CLOCK_SLACK_MS else 0
    if command.issued_at_ms <= newest_ms:
        raise MessageError(
            "command.overtaken",
            "A newer command was applied before.",
            expected=f"> {newest_ms}",
            got=command.issued_at_ms,
        )
    state = msgspec.structs.replace(state, issued_at_ms=command.issued_at_ms)
    return with_lot(state, command, LotSource.CONTROL_PLANE, now_ms)


def with_lot(state: LotState, request: Command | LotRequest, source: LotSource, now_ms: int) -> LotState:
    """Returns the state after an accepted request; pure. The same lot named again keeps the time of its begin."""
    same = (request.lot, request.variety) == (state.lot, state.variety)
    return msgspec.structs.replace(
        state,
        lot=request.lot,
        variety=request.variety,
        source=source,
        since_ms=state.since_ms if same else now_ms,
        requests=(*state.requests, request.request_id)[-_REMEMBERED:],
    )


def lot_file(root: Path, on_quarantine: Callable[[Path, str], None] = lambda *_: None) -> StateFile[LotState]:
    """Returns `lot.json` of a state directory."""
    return StateFile(StateDirectory(root).lot, LotState, code="lot.unreadable", on_quarantine=on_quarantine)


class Lots:
    """The lot of one line.

    Args:
        root: The agent's state directory; keeps `lot.json`.
        configured: Lot and variety of the start configuration.
        host: The supervisor.
        set_lot: Makes the line begin another lot.
        respond: Answers a command.
        commands: Whether the control plane may set the lot.
        wall_ms: Milliseconds since 1970 by this machine's clock.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        root: Path,
        configured: tuple[str, str],
        host: Host,
        *,
        set_lot: Callable[[str, str], None],
        respond: Callable[[Response], None],
        commands: bool = True,
        wall_ms: Callable[[], int] = wall_ms,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._applied_s = clock, -math.inf
        self._file = lot_file(root, self._quarantined)
        directory = StateDirectory(root)
        self._request, self._taken = directory.lot_request, directory.lot_taken
        self._set_lot, self._respond = set_lot, respond
        self._host, self._commands, self._wall_ms = host, commands, wall_ms
        self.state = self._load(configured)

    def _load(self, configured: tuple[str, str]) -> LotState:
        lot, variety = configured
        fresh = LotState(lot=lot, variety=variety, configured=configured)
        state = self._file.load()
        if state is None:
            return fresh
        if state.configured == configured:
            return state
        state = msgspec.structs.replace(
            state,
            lot=lot,
            variety=variety,
            source=LotSource.CONFIGURATION,
            since_ms=self._wall_ms(),
            configured=configured,
        )
        with contextlib.suppress(OSError):  # the configuration applies again at the next start
            self._save(state)
        return state

    def _quarantined(self, _path: Path, why: str) -> None:
        # A wrong lot would be worse than none: there is no backup to go back to.
        self._host.event("state.quarantined", f"{why} The line runs the lot of its configuration.")

    def _save(self, state: LotState) -> None:
        self._file.save(state)
        self.state = state

    def _begin(self, state: LotState, request_id: str) -> None:
        """Stores the state first, then passes the lot to the line, then reports the event."""
        before = self.state
        self._save(state)
        if (state.lot, state.variety) == (before.lot, before.variety):
            return
        self._set_lot(state.lot, state.variety)
        facts = {"lot": state.lot, "variety": state.variety, "source": state.source, "request": request_id}
        self._host.event("lot.changed", "", **facts)

    # -- the control plane's way ------------------------------------------------------------------------------

    def command(self, payload: bytes) -> None:
        """Applies a command, or answers why it was refused.

        Raises:
            MessageError: It was refused; count it and go on. The sender of a readable one was answered.
            OSError: The disk refused; nothing changed, and the sender was not answered: it may ask again.
        """
        command = decode(payload, Command)
        try:
            if not self._commands:
                raise MessageError(
                    "command.not_allowed",
                    "This agent takes its lot from the line alone (lot_commands = false).",
                    expected="sortline-agent lot",
                    got=command.kind,
                )
            state = accept(self.state, command, self._wall_ms())
            if state is not self.state and self._clock() - self._applied_s < PAUSE_S:
                raise MessageError(
                    "command.too_soon", "Another command was applied less than a second ago: send it again."
                )
        except MessageError as error:
            self._answer(command, fault_of(error, self._wall_ms()))
            raise
        if state is not self.state:
            self._begin(state, command.request_id)
            self._applied_s = self._clock()
        self._answer(command, None)
        self._host.report()

    def _answer(self, command: Command, fault: Fault | None) -> None:
        self._respond(Response(request_id=command.request_id, at_ms=self._wall_ms(), fault=fault))

    # -- the operator's way -----------------------------------------------------------------------------------

    def tick(self) -> None:
        """Takes up a request that an operator has left.

        Raises:
            OSError: The disk refused; it is tried again.
        """
        if not self._taken.exists():
            if not self._request.exists():
                return
            # A request that is written now does not replace the one being read.
            self._request.rename(self._taken)
        try:
            request = _parse(_bounded(self._taken), LotRequest)
        except InputError as error:
            self._host.counters[f"refused_{error.code}"] += 1
            self._host.event(error.code, str(error))
        else:
            # After a power failure between here and the end the request is already applied.
            if request.request_id not in self.state.requests:
                self._begin(with_lot(self.state, request, LotSource.OPERATOR, self._wall_ms()), request.request_id)
        self._taken.unlink()
        self._host.report()

    # -- what runs --------------------------------------------------------------------------------------------

    def running(self, beat: Beat | None) -> RunningLot:
        """Returns the lot as it is reported.

        Args:
            beat: The line's last one; None = it does not run.
        """
        state = self.state
        begun = beat is not None and (beat.lot, beat.variety) == (state.lot, state.variety)
        return RunningLot(
            lot=state.lot,
            variety=state.variety,
            source=state.source,
            since_ms=state.since_ms,
            begun=begun,
            terms=beat.terms if beat is not None and begun else "",
        )


def submit_lot_request(root: Path, lot: str, variety: str, request_id: str) -> None:
    """Leaves an operator's request for the agent; a newer one replaces one that was not taken up.

    Args:
        root: The agent's state directory; it may be running or not.
        lot: Name of the lot.
        variety: Name of the variety.
        request_id: 32 hexadecimal digits, never used before.

    Raises:
        InputError: `lot.bad_name`: no name for a lot or a variety.
        OSError: The disk refused.
    """
    data = msgspec.json.encode(LotRequest(request_id=request_id, lot=lot, variety=variety))
    try:
        _parse(data, LotRequest)
    except InputError as error:
        raise InputError(
            "lot.bad_name",
            "This names no lot or variety.",
            expected="up to 64 characters of one line",
            got=f"{lot!r}, {variety!r}"[:200],
        ) from error
    write_atomically(StateDirectory(root).lot_request, data)


def wait_until_applied(root: Path, request_id: str, *, timeout_s: float) -> bool:
    """Waits up to `timeout_s` until a running agent has kept the request; returns whether it has."""
    until = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError, InputError):
            state = lot_file(root).read()
            if state is not None and request_id in state.requests:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def known_lot(root: Path) -> dict[str, str]:
    """Returns the lot in an agent's state directory as text for `sortline-agent status`."""
    state = lot_file(root).read()
    if state is None:
        return {"lot": "as configured", "source": LotSource.CONFIGURATION}
    since = datetime.fromtimestamp(state.since_ms / 1000.0, UTC).isoformat(timespec="seconds")
    facts = {"lot": state.lot, "variety": state.variety, "source": str(state.source), "since": since}
    try:
        champion = champion_file(root).read()
        active = champion.active if champion else ""
        recipe = parse_recipe((StateDirectory(root).slot(active) / RECIPE).read_bytes())
    except (OSError, BundleError, InputError):
        return facts | {"terms": "no bundle judges"}
    return facts | {"terms": TERMS[recipe.terms_source(state.variety, state.lot)]}


def _bounded(path: Path) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise _unreadable(path.name, f"> {_MAX_BYTES} bytes")
    return data


def _parse(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _unreadable(kind.__name__, error) from error


def _unreadable(name: str, got: object) -> InputError:
    return InputError("lot.unreadable", f"{name} cannot be read.", expected="what this agent wrote", got=str(got)[:200])
