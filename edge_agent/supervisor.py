"""The supervisor: one loop that owns all state. Everything else only enqueues.

Events come from the MQTT link, from the line process and from the self-test; a tick comes at least four times a
second. The line is a child process and is never waited for. The last good bundle runs without network, broker or
control plane; a lost report never changes what runs.
"""

import fcntl
import logging
import os
import platform
import queue
import secrets
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.child import LineChild, LineGone, SelfTestDone, start_selftest
from edge_agent.config import AgentConfig
from edge_agent.delivery import Fetch, collect_garbage, discard_parts
from edge_agent.link import Incoming, Link, LinkChanged, bounded_queue
from edge_agent.pipe import Beat, Faulted, LoadFailed, ModelFailed, Ready, Swapped, WindowClosed
from edge_agent.slots import SlotState, StateFile, Trigger, advance, already_running
from edge_agent.spool import Spool
from edge_agent.uplink import Uplink
from models.bundle import read_bundle
from models.errors import BundleError, CapacityError, ConflictError, MessageError, SortlineError
from models.messages import (
    SENTINEL_TOPIC,
    Ack,
    Channel,
    Desired,
    Event,
    Fault,
    Phase,
    Presence,
    RecordKind,
    Reported,
    agent_topic,
    decode,
    encode,
)

log = logging.getLogger("sortline.supervisor")
_TICK_S = 0.25
_BEAT_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 60.0
_REPORT_S = 10.0


def wall_ms() -> int:
    """Milliseconds since 1970, UTC, by this machine's clock."""
    return time.time_ns() // 1_000_000


class Supervisor:
    """One agent.

    Args:
        config: The agent.

    Raises:
        ConflictError: `agent.already_running`: another process uses this state directory.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self._root = Path(config.state_dir).resolve()
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._root)
        self.boot_id = secrets.token_hex(8)
        self._events = bounded_queue()
        self.counters: Counter[str] = Counter()
        self._file = StateFile(self._root, lambda path: self._event("state.quarantined", str(path)))
        self._spool = Spool(
            self._root,
            self.boot_id,
            max_bytes=config.spool.max_bytes,
            ballast_bytes=config.spool.ballast_bytes,
        )
        self.state: SlotState = self._file.load()
        self._lifetime_items = self._spool.lifetime_items
        self._fault: Fault | None = None
        self._fetch: Fetch | None = None
        self._subscribed: set[str] = set()
        self._fetch_retry_s = 0.0
        self._selftest: threading.Thread | None = None
        self._line: LineChild | None = None
        self._line_next_s = 0.0
        self._line_failures = 0
        self._beat: Beat | None = None
        self._lanes, self._camera = 0, ""
        self._trial_running_s = 0.0
        self._reported_s = 0.0
        self._last_tick_s = time.monotonic()
        self._stop = threading.Event()
        presence = Presence(online=False, boot_id=self.boot_id, at_ms=wall_ms())
        self._link = Link(
            config.broker,
            config.id,
            will=(self._topic(Channel.PRESENCE), encode(presence)),
            deliver=self._enqueue,
        )
        self._uplink = Uplink(self._spool, self._link, self._topic(Channel.BATCH), retry_s=config.spool.retry_s)

    def _topic(self, channel: Channel) -> str:
        return agent_topic(self.config.id, channel)

    def _enqueue(self, event: Any) -> bool:
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self.counters["events_dropped"] += 1
            return False
        return True

    # -- life -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs until SIGTERM or SIGINT; leaves no process behind."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        if self._spool.quarantined:
            self._event("spool.quarantined", "The spool file was broken and set aside.")
        self._recover()
        with self._link:
            try:
                while not self._stop.is_set():
                    self._step()
            finally:
                self._shut_down()
        return 0

    def _step(self) -> None:
        try:
            event = self._events.get(timeout=_TICK_S)
        except queue.Empty:
            event = None
        try:
            if event is not None:
                self._handle(event)
            self._tick()
        except SortlineError as error:
            self.counters["step_failed"] += 1
            self._blame(error)
        except OSError as error:
            self.counters["disk_failed"] += 1
            self._blame(CapacityError("agent.disk_failed", "The disk refuses to write.", got=error))

    def _shut_down(self) -> None:
        if self._line is not None:
            self._line.stop(2.0)
            # What the line said last (its final window) still goes to the spool.
            while not self._events.empty():
                event = self._events.get_nowait()
                if isinstance(event, tuple) and isinstance(event[1], WindowClosed):
                    self._store_window(event[1])
        self._uplink.tick(time.monotonic())
        presence = Presence(online=False, boot_id=self.boot_id, at_ms=wall_ms())
        self._link.publish(self._topic(Channel.PRESENCE), encode(presence), retain=True)
        self._spool.close()

    def _recover(self) -> None:
        """After a start: whatever phase the power failed in is continued or undone."""
        phase = self.state.phase
        if self.state.active and not self._usable(self.state.active):
            self._event("slots.active_broken", f"{self.state.active} does not verify; going back.")
            fallback = self.state.previous if self._usable(self.state.previous) else ""
            self._save(msgspec.structs.replace(self.state, active=fallback, previous="", phase=Phase.ROLLED_BACK))
        elif phase is Phase.TRIAL:
            self._start_trial()
        elif phase in {Phase.FETCHING, Phase.VERIFIED, Phase.SELF_TEST}:
            self._save(msgspec.structs.replace(self.state, phase=Phase.FETCHING))

    def _usable(self, digest: str) -> bool:
        try:
            read_bundle(self._root / "slots" / digest, digest=digest)
        except BundleError as error:
            log.warning("%s", error)
            return False
        return bool(digest)

    # -- events -----------------------------------------------------------------------------------------------

    def _handle(self, event: Any) -> None:
        match event:
            case LinkChanged():
                self._link_changed(event)
            case Incoming():
                self._incoming(event)
            case SelfTestDone():
                self._tested(event)
            case LineGone():
                if event.child is self._line:
                    self._line_gone(event.reason)
            case (child, message) if child is self._line:
                self._from_line(message)
            case _:
                self.counters["stale_events"] += 1

    def _link_changed(self, change: LinkChanged) -> None:
        self._subscribed.clear()
        self._uplink.reset()
        log.info("broker %s %s", "connected" if change.connected else "lost", change.reason)
        if change.connected:
            self._link.subscribe([self._topic(c) for c in (Channel.DESIRED, Channel.ACK)] + [SENTINEL_TOPIC])
            birth = Presence(online=True, boot_id=self.boot_id, at_ms=wall_ms())
            self._link.publish(self._topic(Channel.PRESENCE), encode(birth), retain=True)
            self._report()

    def _incoming(self, message: Incoming) -> None:
        try:
            if message.topic == self._topic(Channel.DESIRED):
                if message.payload:
                    self._desire(decode(message.payload, Desired))
            elif message.topic == self._topic(Channel.ACK):
                self._uplink.acknowledged(decode(message.payload, Ack))
            elif message.topic.startswith("sortline/v1/blobs/"):
                self._chunk(message)
            elif message.topic != SENTINEL_TOPIC:
                self.counters["unexpected_topic"] += 1
        except MessageError as error:
            self.counters[f"refused_{error.code}"] += 1
            log.warning("message refused: %s", error)

    def _desire(self, desired: Desired) -> None:
        state = self.state
        if desired.generation <= state.generation:
            self.counters["desired_stale"] += desired.generation < state.generation
            return
        facts = {"generation": desired.generation, "rollout_id": desired.rollout_id}
        log.info("desired generation %s bundle %s", desired.generation, desired.bundle[:12])
        if desired.bundle in state.blocked:
            self._blame(
                ConflictError(
                    "agent.digest_blocked",
                    "This bundle failed here before and is not tried again.",
                    expected="a bundle that was not blocked",
                    got=desired.bundle,
                )
            )
            self._save(msgspec.structs.replace(state, **facts))
            return
        self._fault = None
        self._drop_fetch()
        if desired.bundle == state.active and state.phase is not Phase.TRIAL:
            self._save(already_running(state, **facts))
            return
        was_trial = state.phase is Phase.TRIAL
        self._save(
            advance(
                state,
                Trigger.DESIRED,
                target=desired.bundle,
                trial_items=desired.trial_items,
                trial_s=desired.trial_s,
                **facts,
            )
        )
        if was_trial:
            self._load_active()

    # -- fetching ---------------------------------------------------------------------------------------------

    def _drop_fetch(self) -> None:
        self._link.unsubscribe(sorted(self._subscribed))
        self._subscribed.clear()
        if self._fetch is not None and not self._fetch.done:
            discard_parts(self._root)
        self._fetch = None
        self._fetch_retry_s = 0.0

    def _chunk(self, message: Incoming) -> None:
        self._link.unsubscribe([message.topic])
        self._subscribed.discard(message.topic)
        fetch = self._fetch
        if fetch is None:
            self.counters["unwanted_chunks"] += 1
            return
        try:
            if not fetch.receive(message.topic, message.payload) and fetch.fault is not None:
                self._blame(fetch.fault)
        except CapacityError as error:
            self._fetch, self._fetch_retry_s = None, time.monotonic() + 10.0
            self._blame(error)
        except BundleError as error:
            self._blame(error)
            self._drop_fetch()
            self._save(advance(self.state, Trigger.TEST_FAILED))

    def _tick_fetch(self, now: float) -> None:
        if self._fetch is None:
            if now < self._fetch_retry_s:
                return
            try:
                self._fetch = Fetch(
                    self._root,
                    self.state.target,
                    window=self.config.delivery.window,
                    reserve_bytes=self.config.delivery.reserve_bytes,
                    clock=time.monotonic,
                )
            except CapacityError as error:
                self._fetch_retry_s = now + 10.0
                self._blame(error)
                return
        fetch = self._fetch
        if fetch.done:
            self._fetch_done()
            return
        if now - fetch.last_progress_s > self.config.delivery.stall_s and self._subscribed:
            self.counters["fetch_stalled"] += 1
            self._link.unsubscribe(sorted(self._subscribed))
            self._subscribed.clear()
            fetch.last_progress_s = now
        wanted = set(fetch.wanted())
        new = sorted(wanted - self._subscribed)
        if new and self._link.connected:
            self._link.subscribe(new)
            self._subscribed |= set(new)

    def _fetch_done(self) -> None:
        self._link.unsubscribe(sorted(self._subscribed))
        self._subscribed.clear()
        self._fetch = None
        self._fault = None
        self._save(advance(self.state, Trigger.FETCHED))

    # -- self-test and trial ----------------------------------------------------------------------------------

    def _start_selftest(self) -> None:
        self._save(advance(self.state, Trigger.TEST_STARTED))
        self._selftest = start_selftest(
            self._root / "slots" / self.state.target,
            self.state.target,
            budget_ms=self.config.delivery.selftest_budget_ms,
            timeout_s=self.config.delivery.selftest_timeout_s,
            deliver=self._enqueue,
        )

    def _tested(self, done: SelfTestDone) -> None:
        self._selftest = None
        if self.state.phase is not Phase.SELF_TEST or done.digest != self.state.target:
            return  # overtaken by a newer wish
        if done.fault is not None:
            self._set_fault(done.fault)
            self._event(done.fault.code, done.fault.message, bundle=done.digest)
            self._save(advance(self.state, Trigger.TEST_FAILED))
            return
        self._event("selftest.passed", "", bundle=done.digest, p99_ms=str(done.p99_ms), rss_mb=str(done.rss_mb))
        self._save(advance(self.state, Trigger.TEST_PASSED))
        self._start_trial()

    def _start_trial(self) -> None:
        """Counts the try before the bundle is loaded: a crash cannot forget it."""
        if self.state.tries >= self.config.delivery.max_tries:
            self._roll_back(Fault(code="trial.too_many_tries", message="The bundle did not survive its trial."))
            return
        self._save(advance(self.state, Trigger.TRIAL_STARTED))
        self._trial_running_s = 0.0
        self._load_active()

    def _roll_back(self, fault: Fault) -> None:
        self._set_fault(fault)
        self._event(fault.code, fault.message, bundle=self.state.active)
        self._save(advance(self.state, Trigger.TRIAL_FAILED))
        log.warning("rolled back: %s", fault.message)
        self._load_active()

    def _load_active(self) -> None:
        """Makes the line use `active`: by a swap while it runs, else at its next start."""
        line = self._line
        if line is None:
            return
        if not self.state.active:
            line.kill()
            return
        try:
            line.load(self.state.active, self._root / "slots" / self.state.active)
        except SortlineError as error:
            log.warning("load not sent: %s", error)
            line.kill()

    def _tick_trial(self, elapsed_s: float) -> None:
        beat = self._beat
        if beat is None or beat.digest != self.state.active:
            return
        if beat.items_on_bundle >= self.state.trial_items:
            self._save(advance(self.state, Trigger.TRIAL_PASSED))
            self._event("bundle.committed", "", bundle=self.state.active, items=str(beat.items_on_bundle))
            collect_garbage(self._root, {self.state.active, self.state.previous})
            return
        if beat.belt_running:
            self._trial_running_s += elapsed_s
        if self._trial_running_s > max(self.state.trial_s, 1.0):
            message = (
                f"{beat.items_on_bundle} of {self.state.trial_items} items in {self.state.trial_s:g} s of running belt."
            )
            self._roll_back(Fault(code="trial.timeout", message=message, at_ms=wall_ms()))

    # -- the line ---------------------------------------------------------------------------------------------

    def _tick_line(self, now: float) -> None:
        line = self._line
        if line is None:
            if now >= self._line_next_s:
                self._start_line()
            return
        silent_s = now - line.heard_s
        if silent_s > (_BEAT_TIMEOUT_S if line.ready else _START_TIMEOUT_S):
            self.counters["line_stalled"] += 1
            line.kill()

    def _start_line(self) -> None:
        config = msgspec.structs.replace(
            self.config.line,
            bundle=str(self._root / "slots" / self.state.active) if self.state.active else "",
            digest=self.state.active,
            lifetime_items=self._lifetime_items,
            boot_id=self.boot_id,
        )
        self._beat = None
        self._line = LineChild(config, self._root, self._enqueue)
        self.counters["line_starts"] += 1

    def _line_gone(self, reason: str) -> None:
        line, self._line, self._beat = self._line, None, None
        lived_s = time.monotonic() - line.started_s if line else 0.0
        self._line_failures = 0 if lived_s > 60.0 else self._line_failures + 1
        self._line_next_s = time.monotonic() + min(0.2 * 2.0**self._line_failures, 10.0)
        self._event("line.gone", reason)
        if self.state.phase is Phase.TRIAL:
            self._start_or_roll_back(Fault(code="trial.line_died", message=reason, at_ms=wall_ms()))

    def _start_or_roll_back(self, fault: Fault) -> None:
        if self.state.tries >= self.config.delivery.max_tries:
            self._roll_back(fault)
        else:
            self._start_trial()

    def _from_line(self, message: Any) -> None:
        match message:
            case Beat():
                self._beat = message
                live = msgspec.structs.replace(message.live, boot_id=self.boot_id)
                self._link.publish(self._topic(Channel.LIVE), encode(live), qos=0)
            case WindowClosed():
                self._store_window(message)
            case Ready():
                self._lanes, self._camera = message.lanes, message.camera
                self._report()
            case Swapped():
                self._event(
                    "bundle.swapped",
                    "",
                    bundle=message.digest,
                    load_ms=f"{message.load_ms:.1f}",
                    gap_ms=f"{message.gap_ms:.3f}",
                )
            case LoadFailed() | ModelFailed():
                self._bundle_failed(message)
            case Faulted():
                self._event(message.fault.code, message.fault.message)
                self._report()

    def _bundle_failed(self, message: LoadFailed | ModelFailed) -> None:
        self._event(message.fault.code, message.fault.message, bundle=message.digest)
        if message.digest != self.state.active:
            return
        if self.state.phase is Phase.TRIAL:
            self._roll_back(message.fault)
        elif isinstance(message, ModelFailed):
            # The committed model broke on one input: load it again rather than stop judging.
            self._set_fault(message.fault)
            self._load_active()

    def _store_window(self, closed: WindowClosed) -> None:
        self._lifetime_items = max(self._lifetime_items, closed.window.lifetime_items)
        self._store(RecordKind.WINDOW, msgspec.msgpack.encode(closed.window))

    def _event(self, code: str, message: str, **facts: str) -> None:
        log.info("event %s %s %s", code, message, facts)
        event = Event(at_ms=wall_ms(), code=code, message=message[:600], facts=facts)
        self._store(RecordKind.EVENT, msgspec.msgpack.encode(event))

    def _store(self, kind: RecordKind, payload: bytes) -> None:
        try:
            self._spool.append(kind, payload, lifetime_items=self._lifetime_items)
        except CapacityError as error:
            self.counters["spool_full"] += 1
            log.warning("%s", error)

    # -- time and reports -------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        elapsed_s, self._last_tick_s = now - self._last_tick_s, now
        phase = self.state.phase
        if phase is Phase.FETCHING:
            self._tick_fetch(now)
        elif phase is Phase.VERIFIED and self._selftest is None:
            self._start_selftest()
        elif phase is Phase.TRIAL:
            self._tick_trial(elapsed_s)
        self._tick_line(now)
        self._uplink.tick(now)
        if now - self._reported_s > (1.0 if phase in {Phase.FETCHING, Phase.TRIAL} else _REPORT_S):
            self._report()

    def _save(self, state: SlotState) -> None:
        """Persists before any effect, then tells the world."""
        self._file.save(state)
        self.state = state
        self._report()

    def _set_fault(self, fault: Fault) -> None:
        self._fault = msgspec.structs.replace(fault, at_ms=fault.at_ms or wall_ms())

    def _blame(self, error: SortlineError) -> None:
        if self._fault is None or self._fault.code != error.code:
            log.warning("%s", error)
            self._set_fault(Fault(code=error.code, message=str(error)[:600]))
            self._event(error.code, str(error))
            self._report()

    def _report(self) -> None:
        self._reported_s = time.monotonic()
        state, beat = self.state, self._beat
        counters = {**self.counters, **{f"link_{k}": v for k, v in self._link.counters.items()}}
        self._link.publish(
            self._topic(Channel.REPORTED),
            encode(
                Reported(
                    boot_id=self.boot_id,
                    at_ms=wall_ms(),
                    generation=state.generation,
                    phase=state.phase,
                    active=state.active,
                    previous=state.previous,
                    target=state.target,
                    progress=round(self._progress(), 3),
                    items_on_active=beat.items_on_bundle if beat and beat.digest == state.active else 0,
                    blocked=state.blocked,
                    fault=self._fault,
                    line_running=self._line is not None and self._line.ready,
                    camera=self._camera,
                    camera_fault=beat.camera_fault if beat else "",
                    spool_records=self._spool.depth,
                    spool_dropped=self._spool.dropped,
                    counters=counters,
                    versions={"python": platform.python_version()},
                    hardware={"machine": platform.machine(), "cores": str(os.cpu_count() or 1)},
                    lanes=self._lanes,
                    labels=self.config.labels,
                    rss_mb=round(_rss_mb(os.getpid()) + (_rss_mb(self._line.pid) if self._line else 0.0), 1),
                )
            ),
            retain=True,
        )

    def _progress(self) -> float:
        if self.state.phase is Phase.FETCHING:
            return self._fetch.progress if self._fetch else 0.0
        if self.state.phase is Phase.TRIAL and self._beat is not None:
            return min(1.0, self._beat.items_on_bundle / max(self.state.trial_items, 1))
        return 1.0 if self.state.phase is Phase.COMMITTED else 0.0


def _rss_mb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _lock(root: Path) -> Any:
    stream = (root / "lock").open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.seek(0)
        owner = stream.read().strip() or "unknown"
        stream.close()
        raise ConflictError(
            "agent.already_running",
            f"Another agent (process {owner}) uses {root}; stop it or choose another --state-dir.",
            expected="one agent per state directory",
            got=f"process {owner}",
        ) from error
    stream.seek(0)
    stream.truncate()
    stream.write(str(os.getpid()))
    stream.flush()
    return stream
