"""Topics and messages between agents and control plane (`MESSAGES.md` is the document of this module).

Rules: a payload's size is checked before it is parsed; unknown fields are ignored; an unknown `schema_version` is
refused by name; an agent subscribes to exact topics only. Control messages are JSON, batches MessagePack + zlib.
"""

import time
import zlib
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from models.errors import MessageError, SortlineError
from models.topics import AGENT_ID
from models.versioning import version_in

MAX_CONTROL_BYTES: Final = 8 * 1024
MAX_REPORTED_BYTES: Final = 16 * 1024
MAX_LIVE_BYTES: Final = 64 * 1024
MAX_BATCH_BYTES: Final = 256 * 1024
MAX_BATCH_UNPACKED_BYTES: Final = 2 * 1024 * 1024
MAX_BATCH_RECORDS: Final = 500
MAX_GAP_RANGES: Final = 500
MAX_PICTURE_BYTES: Final = 32 * 1024
"""Largest picture of a record; it travels in batches of at most 256 KiB."""
MAX_CONDITIONS: Final = 12
KEEP_ALIVE_S: Final = 12
"""A peer is gone after one and a half of these; mosquitto looks every 5 s and counts whole seconds: 24 s at most."""
SCHEMA_VERSION: Final = 1
CLOCK_SLACK_MS: Final = 60_000
"""So far may the control plane's clock be ahead of an agent's: a command that claims to be newer is refused."""


AgentId = Annotated[str, msgspec.Meta(pattern=AGENT_ID.pattern)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
OptionalDigest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")]
Counter = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
BootId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
ShortText = Annotated[str, msgspec.Meta(max_length=200)]
LotText = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z")]
"""Name of a lot or a variety, as people write it; empty = none is known."""
RequestId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class Phase(StrEnum):
    """Where an agent is in the update's life cycle."""

    IDLE = "idle"
    FETCHING = "fetching"
    VERIFIED = "verified"
    SELF_TEST = "self-test"
    TRIAL = "trial"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled-back"


class Mode(StrEnum):
    """What a bundle does on the line."""

    LIVE = "live"
    """It judges, after self-test and trial."""
    SHADOW = "shadow"
    """It judges the same items beside the champion and moves nothing; the champion stays."""


class ShadowPhase(StrEnum):
    """Where an agent's challenger is."""

    IDLE = "idle"
    FETCHING = "fetching"
    SELF_TEST = "self-test"
    SHADOW = "shadow"
    FAILED = "failed"


class Swap(StrEnum):
    """When a line changes over to a new bundle."""

    BELT_GAP = "belt-gap"
    """Between two items."""
    LOT_CHANGE = "lot-change"
    """When the next lot begins, at a gap: a lot is judged by one bundle."""
    NOW = "now"
    """Between two frames."""


class SafeState(StrEnum):
    """What a line does instead of judging, on the request of a person."""

    NONE = ""
    """It judges with the bundle it has committed."""
    EJECT_ALL = "eject-all"
    """Every item leaves by the reject outlet."""
    PASS_ALL = "pass-all"  # noqa: S105  no password: items pass
    """No item is ejected."""
    STOP = "stop"
    """The line's stop output is set; nothing is ejected."""


class CommandKind(StrEnum):
    """What the control plane may ask of an agent at once."""

    SET_LOT = "set-lot"
    """From now on this lot of this variety runs. What that means for items is said by the signed recipe alone."""


class LotSource(StrEnum):
    """The origin of the name of the lot that runs."""

    CONFIGURATION = "configuration"
    OPERATOR = "operator"
    CONTROL_PLANE = "control-plane"


class RecordKind(StrEnum):
    """What a spooled record holds."""

    WINDOW = "window"
    EVENT = "event"
    GAP = "gap"
    EVIDENCE = "evidence"
    """A picture that shows what an event of the camera is about; the first to go where there is no room."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """An error as it travels."""

    code: Annotated[str, msgspec.Meta(max_length=80)]
    message: Annotated[str, msgspec.Meta(max_length=600)]
    at_ms: Counter = 0


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent shall run (retained)."""

    schema_version: Literal[1] = 1
    generation: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    """Grows with every change; an agent ignores what is not newer than what it has."""
    bundle: OptionalDigest
    """Digest of the bundle's manifest, which names every file by digest; empty = a recall: whatever is fetched,
    tested or tried is given up, a challenger is dropped, and the agent goes on with the bundle it has committed."""
    safe_state: SafeState = SafeState.NONE
    """Only with a recall: what the line does instead of judging, until a later desired state says otherwise."""
    mode: Mode = Mode.LIVE
    rollout_id: Annotated[str, msgspec.Meta(max_length=64)] = ""
    trial_items: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 50
    """Items the new bundle must judge before the agent commits it."""
    trial_s: Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)] = 60.0
    """The trial fails when these items were not judged while the belt ran this long."""
    swap: Swap = Swap.BELT_GAP
    swap_within_s: Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)] | None = None
    """After so long the line changes over between two frames anyway; None = the line's own limit."""

    def __post_init__(self) -> None:
        """Refuses a safe state beside a bundle, and a challenger without one."""
        if self.bundle and self.safe_state:
            raise ValueError("a safe state is for a recall; a bundle is to judge")
        if not self.bundle and self.mode is Mode.SHADOW:
            raise ValueError("a challenger needs a bundle")


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be done now or not at all (never retained)."""

    schema_version: Literal[1] = 1
    request_id: RequestId
    issued_at_ms: Counter
    """By the control plane's clock; grows with every command to the same agent."""
    expires_at_ms: Counter
    """Past this the agent refuses it."""
    kind: CommandKind
    lot: LotText
    variety: LotText


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent made of a command."""

    schema_version: Literal[1] = 1
    request_id: RequestId
    at_ms: Counter
    fault: Fault | None = None
    """Why it was refused; None = accepted and kept, also over a power cut."""


class RunningLot(msgspec.Struct, frozen=True, kw_only=True):
    """Which lot a line runs."""

    lot: LotText = ""
    variety: LotText = ""
    source: LotSource = LotSource.CONFIGURATION
    since_ms: Counter = 0
    """By the agent's clock, as `Reported.at_ms`; 0 = since its first start."""
    begun: bool = False
    """The line sorts by it; false while it waits for a gap on the belt, or does not run."""
    terms: Literal["", "lot", "variety", "recipe"] = ""
    """Whose terms of the running recipe hold: those of this lot, of its variety, or the recipe's own because it knows
    neither; empty = nothing judges."""


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """Birth and last will (retained)."""

    schema_version: Literal[1] = 1
    online: bool
    boot_id: BootId
    at_ms: Counter = 0


class Reported(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent runs and how it is (retained)."""

    schema_version: Literal[1] = 1
    boot_id: BootId
    at_ms: Counter
    generation: Counter = 0
    phase: Phase = Phase.IDLE
    active: OptionalDigest = ""
    """Digest of the bundle that judges now."""
    previous: OptionalDigest = ""
    """Digest that was committed here before `active`, never a blocked one; in phase `trial` it is the committed one."""
    safe_state: SafeState = SafeState.NONE
    """What the line does instead of judging, as the last recall requested it."""
    target: OptionalDigest = ""
    """Digest that is being fetched, tested or tried."""
    progress: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    """Share of the phase that is done."""
    items_on_active: Counter = 0
    """Items judged by the active bundle since it was loaded."""
    blocked: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=32)] = ()
    shadow_phase: ShadowPhase = ShadowPhase.IDLE
    shadow: OptionalDigest = ""
    """Digest of the challenger the last desired state of mode `shadow` named."""
    shadow_running: bool = False
    """Whether it judges now; windows say what came of it."""
    fault: Fault | None = None
    line_running: bool = False
    camera: ShortText = ""
    """Description of the frame source."""
    camera_fault: ShortText = ""
    conditions: Annotated[tuple[Fault, ...], msgspec.Meta(max_length=MAX_CONDITIONS)] = ()
    """What is wrong and has not recovered (camera, ejectors, fail-safe, abstain budget, identity), oldest first."""
    lot: RunningLot = RunningLot()
    spool_records: Counter = 0
    spool_dropped: Counter = 0
    counters: dict[str, Counter] = {}
    versions: dict[str, str] = {}
    hardware: dict[str, str] = {}
    trust: dict[str, str] = {}
    """Versions of the roles that were verified last, reference time; `development` where the keys are no real ones."""
    lanes: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    labels: dict[str, str] = {}
    """site, line, ...: selectors of rollouts."""
    rss_mb: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    """Resident memory of supervisor and line together."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """An agent asks for blobs the broker does not give it, or of which it holds wrong bytes."""

    schema_version: Literal[1] = 1
    digests: Annotated[tuple[Digest, ...], msgspec.Meta(min_length=1, max_length=8)]


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """The control plane has committed a batch of this boot: every record it held with numbers in this range."""

    schema_version: Literal[1] = 1
    boot_id: BootId
    from_seq: Counter
    through_seq: Counter


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One spooled record; (agent, boot_id, seq) is its key for ever."""

    boot_id: BootId
    seq: Counter
    kind: RecordKind
    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_BATCH_BYTES)]
    """MessagePack of a `Window`, an `Event`, a `Gap` or an `Evidence`."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened once: a state change, a fault, its end."""

    schema_version: Literal[1] = 1
    at_ms: Counter
    code: Annotated[str, msgspec.Meta(max_length=80)]
    message: Annotated[str, msgspec.Meta(max_length=600)] = ""
    facts: dict[str, str] = {}


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """A picture of what has become of the camera: before and now."""

    schema_version: Literal[1] = 1
    at_ms: Counter
    code: Annotated[str, msgspec.Meta(max_length=80)]
    """Code of the event it shows, such as `optics.dirty`."""
    quantity: Annotated[str, msgspec.Meta(max_length=64)]
    """What left its band: a quantity of `Window.camera_health`, or `dirt`."""
    jpeg: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_PICTURE_BYTES)]


class GapRange(msgspec.Struct, frozen=True, array_like=True):
    """Numbers `[first, last]`, both included."""

    first: Counter
    last: Counter


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Records that had to be dropped for lack of room, exactly: they will never come."""

    schema_version: Literal[1] = 1
    at_ms: Counter
    boot_id: BootId
    """Boot of the records, which may be an earlier one than the boot that reports the gap."""
    ranges: Annotated[tuple[GapRange, ...], msgspec.Meta(max_length=MAX_GAP_RANGES)]
    records: dict[str, Counter] = {}
    """How many of each kind were dropped since the last gap was reported."""


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Records of one agent, oldest first."""

    schema_version: Literal[1] = 1
    records: Annotated[tuple[Record, ...], msgspec.Meta(max_length=MAX_BATCH_RECORDS)]


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """Lossy counters of the last second (QoS 0, never stored)."""

    schema_version: Literal[1] = 1
    boot_id: BootId
    at_ms: Counter
    items_per_s: float = 0.0
    frames_per_s: float = 0.0
    belt_mm_s: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    items: Counter = 0
    """Since the line started; so are the tables below."""
    items_unjudged: Counter = 0
    frames_dropped: Counter = 0
    verdicts_late: Counter = 0
    classes: dict[str, Counter] = {}
    outlets: dict[str, Counter] = {}
    ejections: dict[str, Counter] = {}
    truth: dict[str, Counter] = {}
    bundle: OptionalDigest = ""
    camera_fault: ShortText = ""
    """Code of what is wrong with the camera now, such as `camera.frozen`; empty = good."""


T = TypeVar("T")


def wall_ms() -> int:
    """Returns milliseconds since 1970, UTC, by this machine's clock: every `at_ms`."""
    return time.time_ns() // 1_000_000


def fault_of(error: SortlineError, at_ms: int = 0) -> Fault:
    """Returns an error as it travels.

    Args:
        error: What went wrong.
        at_ms: When; 0 = not said.
    """
    return Fault(code=error.code[:80], message=str(error)[:600], at_ms=at_ms)


def encode(message: msgspec.Struct) -> bytes:
    """JSON of a control message."""
    return msgspec.json.encode(message)


def decode(payload: bytes, kind: type[T], *, limit: int = MAX_CONTROL_BYTES) -> T:
    """Reads a control message.

    Raises:
        MessageError: `message.oversize`, `message.wrong_version`, `message.malformed`.
    """
    _check_size(len(payload), limit, kind.__name__)
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _explain(payload, kind.__name__, error, msgspec.json.decode) from error


def encode_batch(batch: Batch) -> bytes:
    """Compresses MessagePack with zlib. Law: `decode_batch(encode_batch(b)) == b`."""
    return zlib.compress(msgspec.msgpack.encode(batch), 6)


def decode_batch(payload: bytes) -> Batch:
    """Reads a batch; inflates no more than the limit whatever the payload claims.

    Raises:
        MessageError: `message.oversize`, `message.malformed`, `message.wrong_version`.
    """
    return decode_packed(unpack_batch(payload), Batch)


def unpack_batch(payload: bytes) -> bytes:
    """Returns the MessagePack of a batch; inflates no more than the limit whatever the payload claims.

    Raises:
        MessageError: `message.oversize`, `message.malformed`.
    """
    _check_size(len(payload), MAX_BATCH_BYTES, "Batch")
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(payload, MAX_BATCH_UNPACKED_BYTES)
    except zlib.error as error:
        raise MessageError("message.malformed", "A batch is not zlib data.", expected="zlib", got=str(error)) from error
    if inflater.unconsumed_tail:
        _check_size(MAX_BATCH_UNPACKED_BYTES + 1, MAX_BATCH_UNPACKED_BYTES, "unpacked Batch")
    if not inflater.eof:
        raise MessageError("message.malformed", "A batch is truncated.", expected="a whole zlib stream", got="a part")
    return data


def decode_packed(data: bytes, kind: type[T]) -> T:
    """Reads a MessagePack payload (`Window`, `Event`, `Batch`).

    Raises:
        MessageError: `message.malformed`, `message.wrong_version`.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _explain(data, kind.__name__, error, msgspec.msgpack.decode) from error


def _explain(payload: bytes, name: str, error: Exception, decode_any: Callable[..., Any]) -> MessageError:
    """An unknown version is named as such: the sender may simply be newer than we are."""
    version = version_in(payload, absent=SCHEMA_VERSION, decode=decode_any)
    if version is not None and version != SCHEMA_VERSION:
        return MessageError(
            "message.wrong_version",
            f"{name} has a schema version this program does not know.",
            expected=SCHEMA_VERSION,
            got=version,
        )
    return MessageError("message.malformed", f"This is no {name}.", expected=name, got=str(error)[:300])


def _check_size(size: int, limit: int, name: str) -> None:
    if size > limit:
        raise MessageError("message.oversize", f"{name} is too large.", expected=f"<= {limit} bytes", got=size)
