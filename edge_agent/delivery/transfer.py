"""Moves the blobs a `Fetch` wants over the agent's connection: subscriptions, pace, stalls, requests.

It handles topics and time; `fetch` checks the content of blobs, `updater` uses the bundle. Rules: at most one window of
exact subscriptions exists at a time, and each ends as soon as its blob came; a rate is kept, so that telemetry finds
room; blobs that the broker does not deliver, or delivers wrongly, are requested from the control plane, which
republishes them or answers directly; a full disk is tried again after a pause and nothing is lost.
"""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from edge_agent.config import DeliveryConfig
from edge_agent.delivery.fetch import Fetch, discard_parts
from models.chunking import CHUNK_BYTES
from models.errors import CapacityError, SortlineError
from models.messages import Request, encode
from models.token_bucket import TokenBucket
from models.topics import BLOBS, Channel, agent_topic, blob_topic

_FULL_PAUSE_S: Final = 5.0


class Connection(Protocol):
    """The part of the link that is needed."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Sends; False when it could not."""

    def subscribe(self, topics: list[str]) -> None:
        """Subscribes to exact topics."""

    def unsubscribe(self, topics: list[str]) -> None:
        """Ends subscriptions."""


class Transfer:
    """Fetches one bundle at a time.

    Args:
        root: The agent's state directory.
        agent_id: The agent that requests blobs.
        config: Window, pace, reserve, stall.
        link: The connection.
        counters: Where stalls and unwanted chunks are counted.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        root: Path,
        agent_id: str,
        config: DeliveryConfig,
        link: Connection,
        counters: Counter[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._config, self._link, self._clock = root, config, link, clock
        self._asking_topic = agent_topic(agent_id, Channel.REQUEST)
        self._counters = counters
        self._fetch: Fetch | None = None
        self._subscribed: set[str] = set()
        """Digests; those of `_refused` are among them."""
        self._refused: set[str] = set()
        """Digests whose bytes were wrong; their subscriptions stay, so that a repair arrives at once."""
        self._direct = False
        """Whether blobs come as answers of the control plane: then it is asked without waiting for a stall."""
        self._asked: set[str] = set()
        self._retry_s = 0.0
        self._bucket = TokenBucket(
            config.bytes_per_s, max(config.window * CHUNK_BYTES, config.bytes_per_s / 2.0), clock
        )

    @property
    def progress(self) -> float:
        """The share of the present bundle that is fetched, 0 to 1."""
        return self._fetch.progress if self._fetch else 0.0

    def disconnected(self) -> None:
        """Subscribes again after the broker lost the subscriptions."""
        self._forget()

    def drop(self) -> None:
        """Ends the present fetch and removes its parts."""
        self._unsubscribe(self._subscribed)
        if self._fetch is not None and not self._fetch.done:
            discard_parts(self._root)
        self._fetch = None
        self._forget()
        self._retry_s = 0.0

    def take(self, topic: str, payload: bytes) -> SortlineError | None:
        """Takes a blob that came; returns what is to be reported about it.

        Raises:
            BundleError: The bundle can never be used: block it.
        """
        fetch = self._fetch
        claimed = topic.removeprefix(BLOBS) if topic.startswith(BLOBS) else None
        if fetch is None:
            if claimed is not None:
                self._unsubscribe({claimed})
            self._counters["unwanted_chunks"] += 1
            return None
        try:
            taken = fetch.receive(payload, claimed)
        except CapacityError as error:
            self._pause()
            return error
        if claimed is None:
            self._direct = self._direct or taken
            self._unsubscribe({digest for digest in self._subscribed if not fetch.awaits(digest)})
            return None
        if taken:
            self._direct = False
        elif claimed in self._subscribed and claimed not in self._refused and fetch.awaits(claimed):
            return self._listen_on(fetch, claimed)
        self._unsubscribe({claimed})
        return None

    def _listen_on(self, fetch: Fetch, digest: str) -> SortlineError | None:
        """Requests wrong bytes from the control plane; their subscription stays while half of the window is free."""
        self._counters["poisoned_chunks"] += 1
        self._ask([digest])
        if 2 * (len(self._refused) + 1) > self._config.window:
            self._unsubscribe({digest})
        else:
            self._refused.add(digest)
        return fetch.fault

    def tick(self, digest: str) -> bool:
        """Asks for what is missing of this bundle; returns whether it is whole.

        Raises:
            CapacityError: `delivery.disk_full`; it is tried again after a pause.
        """
        now = self._clock()
        if self._fetch is not None and self._fetch.digest != digest:
            self.drop()
        fetch = self._fetch
        if fetch is None:
            if now < self._retry_s:
                return False
            fetch = self._begin(digest)
        if fetch.done:
            self._unsubscribe(self._subscribed)
            self._fetch = None
            self._forget()
            return True
        wanted = fetch.wanted()
        if now - fetch.last_progress_s > self._config.stall_s and (self._subscribed or self._asked):
            self._counters["fetch_stalled"] += 1
            self._unsubscribe(self._subscribed - self._refused)
            self._asked.clear()
            self._ask([*wanted, *sorted(self._refused - set(wanted))])
            fetch.last_progress_s = now
        if self._link.connected:
            self._want(fetch, wanted)
        return False

    def _begin(self, digest: str) -> Fetch:
        try:
            self._fetch = Fetch(
                self._root,
                digest,
                window=self._config.window,
                reserve_bytes=self._config.reserve_bytes,
                clock=self._clock,
            )
        except CapacityError:
            self._pause()
            raise
        return self._fetch

    def _want(self, fetch: Fetch, wanted: list[str]) -> None:
        """Subscribes to more blobs, as window and pace allow, and again to those refused long enough ago."""
        again = self._refused & set(wanted)
        self._unsubscribe(again)
        room = self._config.window - len(self._subscribed)
        new: list[str] = []
        for digest in wanted:
            if len(new) >= room:
                break
            if digest not in self._subscribed:
                if not self._bucket.take(fetch.size_of(digest)):
                    break
                new.append(digest)
        if new:
            self._link.subscribe([blob_topic(digest) for digest in new])
            self._subscribed |= set(new)
        if self._direct:
            self._ask([digest for digest in wanted if digest in self._subscribed and digest not in self._asked])

    def _ask(self, digests: list[str]) -> None:
        if digests and self._link.publish(self._asking_topic, encode(Request(digests=tuple(digests[:8])))):
            self._asked |= set(digests[:8])
            self._counters["blobs_asked_for"] += len(digests[:8])

    def _pause(self) -> None:
        """Postpones everything after the disk was full."""
        self._unsubscribe(self._subscribed)
        self._fetch = None
        self._forget()
        self._retry_s = self._clock() + _FULL_PAUSE_S

    def _unsubscribe(self, digests: set[str]) -> None:
        self._link.unsubscribe([blob_topic(digest) for digest in sorted(digests)])
        gone = set(digests)
        self._subscribed -= gone
        self._refused -= gone
        self._asked -= gone

    def _forget(self) -> None:
        self._subscribed.clear()
        self._refused.clear()
        self._asked.clear()
