"""Publishes what the control plane gives out: acknowledgements, signed metadata, desired states, commands.

The database is written first, by the part that decides; what is published is what was committed, and
publishing it again is always safe. A broker that lost its store, and an agent that reports an older generation than
it shall have, get everything again.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from sqlalchemy import Engine
from sqlmodel import col, select

from control_plane.database.engine import reading, writing
from control_plane.database.tables.agents import Agent
from control_plane.database.tables.columns import utc_now
from control_plane.fleet.blobs import Publisher
from control_plane.fleet.connection import BrokerConnection
from control_plane.trust.online_signer import OnlineSigner
from models.messages import Ack, Command, encode
from models.topics import SENTINEL_TOPIC, TRUST_TOPIC, Channel, agent_topic

log = logging.getLogger("sortline.fleet")
_SENTINEL_WAIT_S: Final = 1.5
_TURN_S: Final = 0.5
_AGAIN_S: Final = 30.0
"""A desired state that an agent has not taken up is published again at most this often: reports come every 10 s."""


class Outbox:
    """Publishes to agents.

    Args:
        engine: Database.
        signer: Has the signed metadata and one signed document per agent.
        blobs: Publishes bundles.
        connection: Sends.
        counters: Counts what happened.
        follow_live: Says whether somebody looks at live figures now; asked twice a second.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        signer: OnlineSigner,
        blobs: Publisher,
        connection: BrokerConnection,
        counters: Counter[str],
        *,
        follow_live: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._signer, self._blobs, self._connection = engine, signer, blobs, connection
        self._counters, self._clock, self._follow_live = counters, clock, follow_live
        self._trust_published: dict[str, int] = {}
        """Version by topic."""
        self._trust_order = threading.Lock()
        self._behind: dict[str, int] = {}
        """Agent -> generation that it has not taken up; waits for the thread."""
        self._repeated: dict[str, tuple[int, float]] = {}
        """Agent -> generation that was published again, and when."""
        self._behind_lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def start(self) -> None:
        """Starts the thread that publishes again what was lost."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread within a few seconds."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(3.0)

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._connection.follow_live(wanted=self._follow_live())
            try:
                self._publish_behind()
            except Exception:
                self._counters["republish_failed"] += 1
                log.exception("publishing desired states again failed; the next reports ask for it again")
            if self._connection.connected_again.wait(_TURN_S):
                self._after_connect()

    def _after_connect(self) -> None:
        """When the broker has lost its store, everything is published again."""
        self._connection.connected_again.clear()
        try:
            if not self._connection.sentinel_seen.wait(_SENTINEL_WAIT_S):
                self.republish()
            self._republish_missing()
        except Exception:  # whatever the database raises while it is away: no other thread republishes
            log.exception("republishing failed; it is tried again")
            self._counters["republish_failed"] += 1
            self._connection.connected_again.set()
            self._stopping.wait(2.0)

    def republish(self) -> None:
        """Publishes every bundle an agent shall run and every desired state, then the sentinel.

        A broker that has the sentinel has the rest: an interruption begins it again.
        """
        with self._trust_order:
            self._trust_published = {}
        self._blobs.store_lost()
        self.publish_trust()
        with reading(self._engine) as session:
            agents = session.exec(select(Agent).where(col(Agent.generation) > 0)).all()
        self.publish_desired(*agents)
        self._connection.control.publish(SENTINEL_TOPIC, b"1", qos=1, retain=True)
        self._counters["republished"] += 1
        log.info("published %s desired states to a broker without store", len(agents))

    def _republish_missing(self) -> None:
        """Publishes the bundles that an interrupted publication left out."""
        with reading(self._engine) as session:
            desired = session.exec(select(Agent.desired_bundle).where(col(Agent.desired_bundle) != "").distinct()).all()
        for digest in sorted(desired):
            self.publish_bundle(digest)

    def repeat_desired(self, behind: Iterable[tuple[str, int]]) -> None:
        """Has the desired states of agents published again that report an older generation; returns at once.

        Args:
            behind: Agent and the generation that it shall have.
        """
        now = self._clock()
        with self._behind_lock:
            for agent_id, generation in behind:
                before, at_s = self._repeated.get(agent_id, (-1, 0.0))
                if before != generation or now - at_s >= _AGAIN_S:
                    self._repeated[agent_id] = generation, now
                    self._behind[agent_id] = generation

    def _publish_behind(self) -> None:
        with self._behind_lock:
            behind, self._behind = self._behind, {}
        if not behind:
            return
        with reading(self._engine) as session:
            agents = session.exec(select(Agent).where(col(Agent.id).in_(sorted(behind)))).all()
        for digest in sorted({agent.desired_bundle for agent in agents} - {""}):
            self.publish_bundle(digest)
        self.publish_desired(*agents)

    # -- called by others -------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether both connections to the broker stand."""
        return self._connection.connected

    def acknowledge(self, agent_id: str, ack: Ack) -> None:
        """Says that these records are committed. A lost acknowledgement brings the batch again, and changes nothing."""
        self._connection.bulk.publish(agent_topic(agent_id, Channel.ACK), encode(ack), qos=1)

    def publish_bundle(self, digest: str) -> None:
        """Has the blobs of a bundle published in the background, as far as the broker does not hold them.

        Raises:
            CapacityError: `delivery.retained_full`: nothing was sent.
        """
        self._blobs.want(digest)

    def command(self, agent_id: str, command: Command) -> None:
        """Publishes a command, once and for now.

        Raises:
            UnavailableError: `broker.not_connected`.
        """
        self._connection.check_connected()
        self._connection.control.publish(agent_topic(agent_id, Channel.COMMAND), encode(command), qos=1)
        self._counters["commands"] += 1

    def clear_agent(self, agent_id: str) -> None:
        """Removes what the broker retains of an agent that was forgotten, else it would be known again."""
        for channel in (Channel.DESIRED, Channel.REPORTED, Channel.PRESENCE):
            self._connection.control.publish(agent_topic(agent_id, channel), b"", qos=1, retain=True)

    def publish_trust(self) -> None:
        """Publishes the signed metadata (retained) as far as it is newer than what was published last.

        One thread at a time: an older bin must not come after a newer set.
        """
        with self._trust_order:
            with reading(self._engine) as session:
                news = self._signer.news(session, self._trust_published)
            for topic, version, data in news:
                self._connection.control.publish(topic, data, qos=1, retain=True)
                self._trust_published[topic] = version
                self._counters["trust_published"] += topic == TRUST_TOPIC
                self._counters["trust_bins_published"] += topic != TRUST_TOPIC

    def publish_desired(self, *agents: Agent) -> None:
        """Publishes what agents shall run (retained), exactly as it was signed, after the metadata that proves it.

        Where nothing is desired any more, the message is cleared.
        """
        with reading(self._engine) as session:
            sealed = all(self._signer.is_sealed(session, agent) for agent in agents)
            documents = [(agent, self._signer.document(session, agent.id)) for agent in agents]
        if not sealed:
            # The rows were changed without signing them.
            with writing(self._engine) as session:
                if self._signer.sign_changes(session, utc_now()):
                    session.commit()
                documents = [(agent, self._signer.document(session, agent.id)) for agent in agents]
        self.publish_trust()
        for agent, document in documents:
            if document or not agent.generation:
                topic = agent_topic(agent.id, Channel.DESIRED)
                self._connection.control.publish(topic, document, qos=1, retain=True)
