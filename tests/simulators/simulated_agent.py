"""One light agent: speaks the real messages over a real broker, and remembers what it said.

Everything on the wire is as a real agent does it: birth and last will, retained reports at every phase, exact
subscriptions to a window of chunks whose digests are checked, one batch in flight until its acknowledgement, only the
newest desired state counts, a blocked digest is never tried again. Everything behind the wire is simulated: no camera,
no line process, no disk; "power" (`reboot`) keeps what a real agent keeps on its disk.
"""

import contextlib
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from models.bundle import Manifest, parse_manifest, sha256
from models.errors import SortlineError
from models.messages import (
    KEEP_ALIVE_S,
    Ack,
    Batch,
    Desired,
    Event,
    Fault,
    Live,
    Phase,
    Presence,
    Record,
    RecordKind,
    Reported,
    Request,
    decode,
    encode,
    encode_batch,
)
from models.topics import SENTINEL_TOPIC, Channel, agent_topic, blob_topic
from models.windows import Window

WINDOW_OF_CHUNKS: Final = 8
MAX_BATCH: Final = 200


@dataclass
class Manner:
    """The behaviour of an agent; tests change it while the agent runs."""

    verdict: str = "commit"
    """`commit`, `reject` (self-test fails), `fail` (rolled back in the trial) or `hang` (the trial never ends)."""
    selftest_s: float = 0.05
    items_per_s: float = 20.0
    window_s: float = 10.0
    """Length of a statistics window; 0 = no telemetry."""
    report_s: float = 10.0
    retry_s: float = 5.0
    """A batch that is not acknowledged is sent again after this."""
    stall_s: float = 5.0
    """A chunk that does not come for so long is asked for."""
    live_hz: float = 0.0
    reconnect_s: tuple[float, float] = (0.2, 2.0)


@dataclass
class Held:
    """The state that a real agent keeps on its disk; it survives `reboot`."""

    generation: int = 0
    phase: Phase = Phase.IDLE
    active: str = ""
    previous: str = ""
    target: str = ""
    trial_items: int = 0
    trial_s: float = 60.0
    blocked: tuple[str, ...] = ()
    chunks: set[str] = field(default_factory=set)
    records: deque[Record] = field(default_factory=deque)
    next_seq: int = 0


class Loop(Protocol):
    """The reactor that drives the sockets of many agents."""

    host: str
    port: int

    def prepare(self, client: mqtt.Client, agent_id: str) -> None: ...

    def watch(self, sock: Any, agent: "SimulatedAgent", *, write: bool = False) -> None: ...

    def unwatch(self, sock: Any) -> None: ...


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


class SimulatedAgent:
    """One agent. All methods run in the fleet's thread; `produced`, `taken` and `held` may be read from outside.

    Args:
        fleet: Gives sockets a loop.
        agent_id: Its id.
        labels: As reported.
        manner: How it behaves.
        seed: Of its randomness.
    """

    def __init__(self, fleet: Loop, agent_id: str, labels: dict[str, str], manner: Manner, seed: int) -> None:
        self._fleet, self.id, self.labels, self.manner = fleet, agent_id, labels, manner
        self._rng = random.Random(seed)
        self.held = Held()
        self.counters: Counter[str] = Counter()
        self.produced: set[tuple[str, int]] = set()
        """Every record ever made, by (boot, seq): the oracle of what the database must hold."""
        self.taken: list[tuple[int, str]] = []
        """Every desired state taken up, as (generation, bundle), in order."""
        self.taken_s: dict[str, float] = {}
        """Monotonic time at which each bundle was first asked of it."""
        self.committed_s: dict[str, float] = {}
        """Monotonic time of the last commit of each bundle."""
        self.connected = False
        self._boot()

    def _boot(self) -> None:
        self.boot_id = f"{self._rng.getrandbits(64):016x}"
        self._fault: Fault | None = None
        self._manifest: Manifest | None = None
        self._missing: list[str] = []
        self._subscribed: set[str] = set()
        self._sent: tuple[Record, ...] = ()
        self._send_due_s = 0.0
        self._phase_s = self._progress_s = self._reported_s = self._live_s = 0.0
        self._window_s = time.monotonic() + self._rng.uniform(0.0, max(self.manner.window_s, 0.01))
        self._items = self._window_items = 0.0
        self._last_s = time.monotonic()
        self._connect_s = 0.0
        self._cut_until_s = 0.0
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=self.id, clean_session=True, protocol=mqtt.MQTTv311)
        self._fleet.prepare(client, self.id)
        will = Presence(online=False, boot_id=self.boot_id, at_ms=wall_ms())
        client.will_set(self._topic(Channel.PRESENCE), encode(will), qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_socket_open = lambda _c, _d, sock: self._fleet.watch(sock, self)
        client.on_socket_close = lambda _c, _d, sock: self._fleet.unwatch(sock)
        client.on_socket_register_write = lambda _c, _d, sock: self._fleet.watch(sock, self, write=True)
        client.on_socket_unregister_write = lambda _c, _d, sock: self._fleet.watch(sock, self)
        self.client = client

    def _topic(self, channel: Channel) -> str:
        return agent_topic(self.id, channel)

    # -- power and cable --------------------------------------------------------------------------------------

    def cut(self, seconds: float) -> None:
        """Pulls the cable: no goodbye, so the broker publishes the will."""
        self._cut_until_s = time.monotonic() + seconds
        self._drop_socket()

    def reboot(self) -> None:
        """Power cut and start: what is on the disk stays, the rest is gone."""
        self._drop_socket()
        self._boot()
        held = self.held
        if held.phase is Phase.TRIAL:
            self._enter(Phase.TRIAL)
        elif held.phase in {Phase.FETCHING, Phase.VERIFIED, Phase.SELF_TEST}:
            self._enter(Phase.FETCHING)
        self.counters["reboots"] += 1

    def _drop_socket(self) -> None:
        sock = self.client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(2)
            self.client.loop_read()
        self.connected = False

    # -- the link ---------------------------------------------------------------------------------------------

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _props: Any) -> None:
        if reason.is_failure:
            self.counters["refused"] += 1
            return
        self.connected = True
        self.counters["connects"] += 1
        self._subscribed.clear()
        self._sent = ()
        topics = [(self._topic(Channel.DESIRED), 1), (self._topic(Channel.ACK), 1), (SENTINEL_TOPIC, 1)]
        self.client.subscribe(topics)
        birth = Presence(online=True, boot_id=self.boot_id, at_ms=wall_ms())
        self.client.publish(self._topic(Channel.PRESENCE), encode(birth), qos=1, retain=True)
        self.report()

    def _on_disconnect(self, *_: Any) -> None:
        self.connected = False
        self._connect_s = time.monotonic() + self._rng.uniform(*self.manner.reconnect_s)

    def _on_message(self, _client: Any, _data: Any, message: Any) -> None:
        self.counters["received"] += 1
        try:
            if message.topic == self._topic(Channel.DESIRED):
                if message.payload:
                    self._desire(decode(message.payload, Desired))
            elif message.topic == self._topic(Channel.ACK):
                self._acknowledged(decode(message.payload, Ack))
            elif message.topic.startswith("sortline/v1/blobs/"):
                self._chunk(message.topic, bytes(message.payload))
        except SortlineError as error:
            self.counters[f"refused_{error.code}"] += 1

    def _connect(self, now: float) -> None:
        if now < max(self._connect_s, self._cut_until_s):
            return
        self._connect_s = now + self._rng.uniform(*self.manner.reconnect_s) + 1.0
        try:
            self.client.connect(self._fleet.host, self._fleet.port, keepalive=KEEP_ALIVE_S)
        except OSError:
            self.counters["connect_failed"] += 1

    # -- the life cycle of a bundle ---------------------------------------------------------------------------

    def _desire(self, desired: Desired) -> None:
        held = self.held
        if desired.generation <= held.generation:
            self.counters["desired_stale"] += desired.generation < held.generation
            return
        self.taken.append((desired.generation, desired.bundle))
        self.taken_s.setdefault(desired.bundle, time.monotonic())
        held.generation = desired.generation
        self._drop_fetch()
        if desired.bundle in held.blocked:
            self._fault = Fault(code="agent.digest_blocked", message="Failed here before.", at_ms=wall_ms())
            self.report()
            return
        self._fault = None
        if held.phase is Phase.TRIAL:
            held.active, held.previous = held.previous, ""
        held.trial_items, held.trial_s = desired.trial_items, desired.trial_s
        if desired.bundle == held.active:
            held.target = ""
            self._enter(Phase.COMMITTED)
            return
        held.target = desired.bundle
        self._enter(Phase.FETCHING)

    def _enter(self, phase: Phase) -> None:
        self.held.phase = phase
        self._phase_s = self._progress_s = time.monotonic()
        if phase is Phase.TRIAL:
            self._items = 0.0
        self.report()

    def _drop_fetch(self) -> None:
        if self._subscribed and self.connected:
            self.client.unsubscribe(sorted(self._subscribed))
        self._subscribed.clear()
        self._manifest, self._missing = None, []

    def _want(self) -> None:
        """Subscribes to the next chunks, at most a window of them."""
        digests = [self.held.target] if self._manifest is None else self._missing[:WINDOW_OF_CHUNKS]
        wanted = [blob_topic(digest) for digest in digests]
        now = time.monotonic()
        if now - self._progress_s > self.manner.stall_s:
            # As in a real agent, a missing blob is subscribed to again and requested.
            self._progress_s = now
            self.counters["stalls"] += 1
            self.client.unsubscribe(sorted(self._subscribed) or wanted)
            self._subscribed.clear()
            self.client.publish(self._topic(Channel.REQUEST), encode(Request(digests=tuple(digests))), qos=1)
        new = [topic for topic in wanted if topic not in self._subscribed]
        if new:
            self.client.subscribe([(topic, 1) for topic in new])
            self._subscribed.update(new)

    def _chunk(self, topic: str, payload: bytes) -> None:
        if topic not in self._subscribed:
            self.counters["unwanted_chunks"] += 1
            return
        self._subscribed.discard(topic)
        self.client.unsubscribe(topic)
        self._progress_s = time.monotonic()
        self.counters["chunk_bytes"] += len(payload)
        if self._manifest is None:
            self._manifest = parse_manifest(payload, digest=self.held.target)
            chunks = {chunk.sha256: 0 for entry in self._manifest.files for chunk in entry.chunks}
            self._missing = [digest for digest in chunks if digest not in self.held.chunks]
        elif topic == blob_topic(digest := sha256(payload)) and digest in self._missing:
            self._missing.remove(digest)
        else:
            self.counters["poisoned_chunks"] += 1
        if not self._missing:
            self.held.chunks.update(chunk.sha256 for entry in self._manifest.files for chunk in entry.chunks)
            self._drop_fetch()
            self._enter(Phase.VERIFIED)

    def _tick_bundle(self, now: float) -> None:
        held, manner, since_s = self.held, self.manner, now - self._phase_s
        if held.phase is Phase.FETCHING and self.connected:
            self._want()
        elif held.phase is Phase.VERIFIED:
            self._enter(Phase.SELF_TEST)
        elif held.phase is Phase.SELF_TEST and since_s >= manner.selftest_s:
            if manner.verdict == "reject":
                self._give_up(held.target, "selftest.too_slow", "Simulated: the self-test fails.")
                return
            held.active, held.previous, held.target = held.target, held.active, ""
            self._enter(Phase.TRIAL)
        elif held.phase is Phase.TRIAL and manner.verdict != "hang":
            if manner.verdict == "fail":
                broken, held.active, held.previous = held.active, held.previous, ""
                self._give_up(broken, "trial.line_died", "Simulated: the line died in the trial.")
            elif self._items >= held.trial_items:
                self.committed_s[held.active] = now
                self._event("bundle.committed", bundle=held.active)
                self._enter(Phase.COMMITTED)

    def _give_up(self, digest: str, code: str, message: str) -> None:
        self.held.blocked = (*(d for d in self.held.blocked if d != digest), digest)[-32:]
        self.held.target = ""
        self._fault = Fault(code=code, message=message, at_ms=wall_ms())
        self._event(code, bundle=digest)
        self._enter(Phase.ROLLED_BACK)

    # -- telemetry --------------------------------------------------------------------------------------------

    def _event(self, code: str, **facts: str) -> None:
        self.store(RecordKind.EVENT, msgspec.msgpack.encode(Event(at_ms=wall_ms(), code=code, facts=facts)))

    def store(self, kind: RecordKind, payload: bytes) -> None:
        """Adds one record to the simulated spool."""
        record = Record(boot_id=self.boot_id, seq=self.held.next_seq, kind=kind, payload=payload)
        self.held.next_seq += 1
        self.held.records.append(record)
        self.produced.add((record.boot_id, record.seq))

    def _tick_window(self, now: float) -> None:
        if not self.manner.window_s or now < self._window_s:
            return
        self._window_s = now + self.manner.window_s
        items, self._window_items = int(self._window_items), 0.0
        window = Window(
            started_ms=wall_ms() - int(self.manner.window_s * 1000),
            duration_ms=int(self.manner.window_s * 1000),
            bundle=self.held.active,
            items=items,
            classes={"sound": items},
            outlets={"pass": items},
            lanes=(items,),
        )
        self.store(RecordKind.WINDOW, msgspec.msgpack.encode(window))

    def _tick_uplink(self, now: float) -> None:
        held = self.held
        if not held.records or (self._sent and now < self._send_due_s):
            return
        self.counters["batch_repeats"] += bool(self._sent)
        boot = held.records[0].boot_id
        self._sent = tuple(r for r, _ in zip(held.records, range(MAX_BATCH), strict=False) if r.boot_id == boot)
        self._send_due_s = now + self.manner.retry_s
        self.client.publish(self._topic(Channel.BATCH), encode_batch(Batch(records=self._sent)), qos=1)

    def _acknowledged(self, ack: Ack) -> None:
        if not self._sent or ack.boot_id != self._sent[0].boot_id:
            self.counters["stale_acks"] += 1
            return
        through, records = min(ack.through_seq, self._sent[-1].seq), self.held.records
        while records and records[0].boot_id == ack.boot_id and records[0].seq <= through:
            records.popleft()
            self.counters["acknowledged"] += 1
        self._sent = ()

    def report(self) -> None:
        """Publishes the reported state (retained)."""
        self._reported_s = time.monotonic()
        if not self.connected:
            return
        held = self.held
        reported = Reported(
            boot_id=self.boot_id,
            at_ms=wall_ms(),
            generation=held.generation,
            phase=held.phase,
            active=held.active,
            previous=held.previous,
            target=held.target,
            progress=min(1.0, self._items / max(held.trial_items, 1)) if held.phase is Phase.TRIAL else 0.0,
            items_on_active=int(self._items) if held.active else 0,
            blocked=held.blocked,
            fault=self._fault,
            line_running=True,
            camera="simulated",
            spool_records=len(held.records),
            lanes=2,
            labels=self.labels,
        )
        self.client.publish(self._topic(Channel.REPORTED), encode(reported), qos=1, retain=True)

    def tick(self, now: float) -> None:
        """Advances the agent to the given time."""
        passed_s, self._last_s = now - self._last_s, now
        self._items += passed_s * self.manner.items_per_s
        self._window_items += passed_s * self.manner.items_per_s
        if self.client.socket() is None:
            self._connect(now)
        else:
            self.client.loop_misc()
        self._tick_bundle(now)
        self._tick_window(now)
        if self.connected:
            self._tick_uplink(now)
            busy = self.held.phase in {Phase.FETCHING, Phase.TRIAL}
            if now - self._reported_s > (min(1.0, self.manner.report_s) if busy else self.manner.report_s):
                self.report()
            if self.manner.live_hz and now - self._live_s > 1.0 / self.manner.live_hz:
                self._live_s = now
                live = Live(boot_id=self.boot_id, at_ms=wall_ms(), items_per_s=self.manner.items_per_s)
                self.client.publish(self._topic(Channel.LIVE), encode(live), qos=0)
