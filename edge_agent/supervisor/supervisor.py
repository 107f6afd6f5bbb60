"""The supervisor: one loop that owns all state of the agent. Everything else only hands it events.

Events come from the MQTT connection, from the line process, from the self-test and from the verification; a turn comes
at least four times a second. The line is a child process and is never waited for. The last good bundle runs without
network, broker or control plane; a lost report never changes what runs.
"""

import logging
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.config import AgentConfig
from edge_agent.delivery.challenger import Challenger
from edge_agent.delivery.offline_import import ImportOrNetwork, StagedImport
from edge_agent.delivery.selftest_process import SelfTestDone
from edge_agent.delivery.state_file import challenger_file, champion_file
from edge_agent.delivery.transfer import Transfer
from edge_agent.delivery.updater import Updater
from edge_agent.events import bounded_queue
from edge_agent.identity.certificate import IdentityUpkeep, identity_folder
from edge_agent.line_protocol import (
    Beat,
    Faulted,
    LoadFailed,
    ModelFailed,
    Pictured,
    Ready,
    ShadowChanged,
    ShadowFailed,
    Swapped,
    Tuned,
    WindowClosed,
)
from edge_agent.mqtt import Incoming, Link, LinkChanged, LinkTrouble
from edge_agent.state_directory import StateDirectory
from edge_agent.supervisor.conditions import Conditions
from edge_agent.supervisor.connection_file import Connection, connection_file
from edge_agent.supervisor.journal import Journal
from edge_agent.supervisor.line_control import LineControl
from edge_agent.supervisor.line_process import LineGone
from edge_agent.supervisor.lots import Lots
from edge_agent.supervisor.report import Report
from edge_agent.telemetry.spool import Spool
from edge_agent.telemetry.uplink import Uplink
from edge_agent.trust.verifier import AssignmentVerifier, Verified
from models.errors import CapacityError, MessageError, SortlineError
from models.messages import Ack, Desired, Fault, Phase, Presence, RecordKind, Response, decode, encode, wall_ms
from models.service_notice import ServiceNotice
from models.text import mask
from models.topics import BLOBS, SENTINEL_TOPIC, TRUST_TOPIC, Channel, agent_topic, bin_of, bin_topic

log = logging.getLogger("sortline.supervisor")
_TICK_S = 0.25
_REPORT_S = 10.0
"""Between two reports while nothing changes; a second while a bundle is fetched or tried."""
_CHANNELS = (Channel.DESIRED, Channel.ACK, Channel.BLOB, Channel.COMMAND)


class Supervisor:
    """One agent.

    Args:
        config: Its configuration.

    Raises:
        ConflictError: `agent.already_running`: another process uses this state directory.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        root = Path(config.state_dir).resolve()
        root.mkdir(parents=True, exist_ok=True)
        directory = StateDirectory(root)
        self._lock = directory.lock()
        self.boot_id = secrets.token_hex(8)
        self._events = bounded_queue()
        self._journal = journal = Journal(self._events, self._store, self._publish_report)
        self._spool = Spool(
            root, self.boot_id, max_bytes=config.spool.max_bytes, ballast_bytes=config.spool.ballast_bytes
        )
        self._wanted: Desired | None = None
        """Desired states that are proven and not yet taken up."""
        self._reported_s = 0.0
        self._last_tick_s = time.monotonic()
        self._stop = threading.Event()
        self._notice = ServiceNotice(journal.counters)
        self._conditions = Conditions()
        self._connection = connection_file(root)
        self._link = Link(
            config.broker,
            config.id,
            will=(self._topic(Channel.PRESENCE), encode(self._presence(online=False))),
            deliver=journal.enqueue,
        )
        self._identity = IdentityUpkeep(
            identity_folder(config), check_s=config.identity.check_s, counters=journal.counters
        )
        self._uplink = Uplink(self._spool, self._link, self._topic(Channel.BATCH), retry_s=config.spool.retry_s)
        self._stick = StagedImport(root)
        network = ImportOrNetwork(self._link, self._stick, journal.enqueue)
        transfer = Transfer(root, config.id, config.delivery, network, journal.counters)
        self._line = line = LineControl(
            config,
            directory,
            self.boot_id,
            journal,
            updater=lambda: self._updater,
            lot=lambda: self._lots.state,
        )
        line.lifetime_items = self._spool.lifetime_items
        self._updater = Updater(root, config.delivery, champion_file(root, self._quarantined), transfer, journal, line)
        self._challenger = Challenger(
            root, challenger_file(root, self._quarantined), config.delivery, transfer, journal, line
        )
        self._lots = Lots(
            root,
            (config.line.lot, config.line.variety),
            journal,
            set_lot=line.set_lot,
            respond=self._respond,
            commands=config.lot_commands,
        )
        self._bin_topic = bin_topic(bin_of(config.id))
        self._verifier = AssignmentVerifier(
            root, config.trust, config.id, journal, lambda: self._updater.state.generation
        )
        self._report = Report(
            config=config,
            boot_id=self.boot_id,
            journal=journal,
            updater=self._updater,
            challenger=self._challenger,
            lots=self._lots,
            line=line,
            spool=self._spool,
            link=self._link,
            verifier=self._verifier,
            conditions=self._conditions,
        )

    def _quarantined(self, path: Path, why: str) -> None:
        self._journal.event("state.quarantined", f"{why} It was set aside as {path}.")

    def _topic(self, channel: Channel) -> str:
        return agent_topic(self.config.id, channel)

    def _presence(self, *, online: bool) -> Presence:
        return Presence(online=online, boot_id=self.boot_id, at_ms=wall_ms())

    # -- life -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs until SIGTERM or SIGINT; leaves no process behind."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        if self._spool.quarantined:
            self._journal.event("spool.quarantined", "The spool file was broken and set aside.")
        self._guarded(self._updater.recover)
        self._identity.start()
        with self._link:
            try:
                while not self._stop.is_set():
                    self._step()
                    self._notice.alive()
            finally:
                self._notice.stopping()
                self._shut_down()
        return 0

    def _step(self) -> None:
        try:
            event = self._events.get(timeout=_TICK_S)
        except queue.Empty:
            event = None
        if event is not None:
            self._guarded(lambda: self._handle(event))
        for part in self._parts():
            self._guarded(part)

    def _guarded(self, act: Callable[[], object]) -> None:
        """Reports what fails; being a part of every turn, it is tried again, and the rest of the turn goes on."""
        try:
            act()
        except SortlineError as error:
            self._journal.counters["step_failed"] += 1
            self._journal.report_error(error)
        except OSError as error:
            self._journal.counters["disk_failed"] += 1
            self._journal.report_error(CapacityError("agent.disk_failed", "The disk refuses to write.", got=error))

    def _shut_down(self) -> None:
        self._identity.stop()
        self._line.keeper.stop(2.0)
        # The line's last messages (its final window) still go to the spool.
        while not self._events.empty():
            event = self._events.get_nowait()
            if isinstance(event, tuple) and isinstance(event[1], WindowClosed):
                self._store_window(event[1])
        self._uplink.tick(time.monotonic())
        self._link.publish(self._topic(Channel.PRESENCE), encode(self._presence(online=False)), retain=True)
        self._spool.close()

    # -- events -----------------------------------------------------------------------------------------------

    def _handle(self, event: Any) -> None:
        match event:
            case LinkChanged():
                self._link_changed(event)
            case LinkTrouble():
                self._link_trouble(event)
            case Incoming():
                self._incoming(event)
            case SelfTestDone():
                if not self._challenger.tested(event):
                    self._updater.tested(event)
            case Verified():
                self._wanted = self._verifier.done(event) or self._wanted
                self._take_wanted()
            case LineGone():
                if self._line.gone(event.child):
                    self._line_gone(event.reason)
            case (child, message) if child is self._line.keeper.line:
                self._from_line(message)
            case _:
                self._journal.counters["stale_events"] += 1

    def _link_changed(self, change: LinkChanged) -> None:
        self._updater.transfer.disconnected()
        self._uplink.reset()
        log.info("broker %s %s", "connected" if change.connected else "lost", change.reason)
        if change.connected:
            self._link.subscribe([TRUST_TOPIC, self._bin_topic, *map(self._topic, _CHANNELS), SENTINEL_TOPIC])
            self._link.publish(self._topic(Channel.PRESENCE), encode(self._presence(online=True)), retain=True)
            self._journal.report()
        self._keep_connection(Connection(connected=change.connected, at_ms=wall_ms(), message=change.reason))

    def _link_trouble(self, trouble: LinkTrouble) -> None:
        """Keeps why there is no connection: for `sortline-agent status`, and later for the control plane."""
        if trouble.code != "identity.alone":
            self._keep_connection(
                Connection(connected=False, at_ms=wall_ms(), code=trouble.code, message=trouble.message)
            )
        self._note(Fault(code=trouble.code, message=trouble.message))

    def _keep_connection(self, connection: Connection) -> None:
        address = f"{self.config.broker.host}:{self.config.broker.port}"
        self._connection.save(msgspec.structs.replace(connection, broker=address))

    def _incoming(self, message: Incoming) -> None:
        try:
            if message.topic == self._topic(Channel.DESIRED):
                if message.payload:
                    self._verifier.offer_document(message.payload)
            elif message.topic == TRUST_TOPIC:
                if message.payload:
                    self._verifier.offer_set(message.payload)
            elif message.topic == self._bin_topic:
                if message.payload:
                    self._verifier.offer_bin(message.payload)
            elif message.topic == self._topic(Channel.ACK):
                self._uplink.acknowledged(decode(message.payload, Ack))
            elif message.topic == self._topic(Channel.COMMAND):
                self._lots.command(message.payload)
            elif message.topic.startswith(BLOBS) or message.topic == self._topic(Channel.BLOB):
                for_challenger = self._challenger.fetching and self._updater.state.settled
                owner = self._challenger if for_challenger else self._updater
                owner.chunk(message.topic, message.payload)
            elif message.topic != SENTINEL_TOPIC:
                self._journal.counters["unexpected_topic"] += 1
        except MessageError as error:
            self._journal.counters[f"refused_{error.code}"] += 1
            log.warning("message refused: %s", error)

    def _look_at_stick(self) -> None:
        """Hands an import to the verifier like messages of the broker."""
        news = self._stick.news()
        if news is not None:
            self._journal.event("stick.found", "An imported folder is being looked at.")
            self._verifier.offer_set(news.offered)
            self._verifier.offer_bin(news.own_bin)
            self._verifier.offer_document(news.document)

    def _take_wanted(self) -> None:
        """Takes up a proven desired state, which is kept until it is on disk."""
        if self._wanted is not None:
            self._desire(self._wanted)
            self._wanted = None

    def _desire(self, desired: Desired) -> None:
        state = self._updater.state
        self._journal.counters["desired_stale"] += desired.generation < state.generation
        if desired.generation >= state.generation:
            self._challenger.desire(desired, state.blocked)
        self._updater.desire(desired)

    # -- the line ---------------------------------------------------------------------------------------------

    def _line_gone(self, reason: str) -> None:
        self._journal.event("line.gone", reason)
        self._conditions.line_gone()
        self._challenger.line_gone()
        if not self._line.was_replaced:
            self._updater.line_died(reason)

    def _from_line(self, message: Any) -> None:
        match message:
            case Beat():
                self._take_beat(message)
            case WindowClosed():
                self._store_window(message)
            case Ready():
                self._line.came_up(message)
                self._journal.report()
            case Swapped():
                times = {"load_ms": f"{message.load_ms:.1f}", "gap_ms": f"{message.gap_ms:.3f}"}
                self._journal.event("bundle.swapped", "", bundle=message.digest, **times)
            case LoadFailed() | ModelFailed():
                self._updater.bundle_failed(message)
            case Tuned():
                self._line.was_tuned(message)
                self._journal.event("line.tuned", "", **message.facts)
                self._journal.report()
            case ShadowChanged():
                self._challenger.changed(message)
            case ShadowFailed():
                self._challenger.failed(message)
            case Faulted():
                self._note(message.fault, message.subject)
            case Pictured():
                self._journal.record(RecordKind.EVIDENCE, msgspec.msgpack.encode(message.evidence))

    def _note(self, fault: Fault, subject: str = "") -> None:
        """Stores an event and reports the condition that it begins or ends."""
        fault = msgspec.structs.replace(fault, message=mask(fault.message), at_ms=fault.at_ms or wall_ms())
        self._journal.event(fault.code, fault.message)
        self._conditions.note(fault, subject)
        self._journal.report()

    def _take_beat(self, beat: Beat) -> None:
        before, self._line.beat = self._line.beat, beat
        live = msgspec.structs.replace(beat.live, boot_id=self.boot_id)
        self._link.publish(self._topic(Channel.LIVE), encode(live), qos=0)
        if self._lots.running(before) != self._lots.running(beat):
            self._journal.report()

    def _store_window(self, closed: WindowClosed) -> None:
        self._line.lifetime_items = max(self._line.lifetime_items, closed.window.lifetime_items)
        self._journal.record(RecordKind.WINDOW, msgspec.msgpack.encode(closed.window))

    def _store(self, kind: RecordKind, payload: bytes) -> None:
        self._spool.append(kind, payload, lifetime_items=self._line.lifetime_items)

    # -- time and reports -------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[Callable[[], object]]:
        """Yields the parts of one turn; none depends on whether another failed."""
        now = time.monotonic()
        elapsed_s, self._last_tick_s = now - self._last_tick_s, now
        yield self._line.tick
        yield self._look_at_stick
        yield self._verifier.tick
        yield self._take_wanted
        yield lambda: self._updater.tick(elapsed_s, self._line.beat)
        yield lambda: self._challenger.tick(settled=self._updater.state.settled)
        yield lambda: self._uplink.tick(now)
        yield self._lots.tick
        if now - self._reported_s > (1.0 if self._updater.state.phase in {Phase.FETCHING, Phase.TRIAL} else _REPORT_S):
            yield self._journal.report

    def _publish_report(self) -> None:
        self._reported_s = time.monotonic()
        self._link.publish(self._topic(Channel.REPORTED), encode(self._report.build()), retain=True)

    def _respond(self, response: Response) -> None:
        self._link.publish(self._topic(Channel.RESPONSE), encode(response))
