"""Moves the chunks a `Fetch` wants over the agent's connection: subscriptions, stalls, pauses after a full disk.

It knows topics and time, not what is in a chunk (`delivery`) nor what happens with the bundle (`updating`). Rules: at
most one window of exact subscriptions stands at a time; each is ended as soon as its chunk came; without progress
everything is asked for again; a disk that is full is asked again after a pause and loses nothing.
"""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from edge_agent.config import DeliveryConfig
from edge_agent.delivery import Fetch, discard_parts
from models.errors import CapacityError, SortlineError

_FULL_PAUSE_S: Final = 10.0


class Subscriber(Protocol):
    """The part of the link that is needed."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""

    def subscribe(self, topics: list[str]) -> None:
        """Subscribes to exact topics."""

    def unsubscribe(self, topics: list[str]) -> None:
        """Ends subscriptions."""


class Transfer:
    """Fetches one bundle at a time.

    Args:
        root: The agent's state directory.
        config: Window, reserve, stall.
        link: The connection.
        counters: Where stalls and unwanted chunks are counted.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        root: Path,
        config: DeliveryConfig,
        link: Subscriber,
        counters: Counter[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._config, self._link, self._clock = root, config, link, clock
        self._counters = counters
        self._fetch: Fetch | None = None
        self._subscribed: set[str] = set()
        self._retry_s = 0.0

    @property
    def progress(self) -> float:
        """0..1 of the bundle that is fetched now."""
        return self._fetch.progress if self._fetch else 0.0

    def disconnected(self) -> None:
        """The broker forgot our subscriptions."""
        self._subscribed.clear()

    def drop(self) -> None:
        """Gives up what is being fetched; its parts are removed."""
        self._unsubscribe_all()
        if self._fetch is not None and not self._fetch.done:
            discard_parts(self._root)
        self._fetch = None
        self._retry_s = 0.0

    def take(self, topic: str, payload: bytes) -> SortlineError | None:
        """Takes a chunk that came; returns what is to be reported about it.

        Raises:
            BundleError: The bundle can never be used: block it.
        """
        self._link.unsubscribe([topic])
        self._subscribed.discard(topic)
        fetch = self._fetch
        if fetch is None:
            self._counters["unwanted_chunks"] += 1
            return None
        try:
            return None if fetch.receive(topic, payload) else fetch.fault
        except CapacityError as error:
            self._fetch, self._retry_s = None, self._clock() + _FULL_PAUSE_S
            return error

    def tick(self, digest: str) -> bool:
        """Asks for what is missing of this bundle; returns whether it is whole.

        Raises:
            CapacityError: `delivery.disk_full`; it is tried again after a pause.
        """
        now = self._clock()
        fetch = self._fetch
        if fetch is None:
            if now < self._retry_s:
                return False
            fetch = self._begin(digest, now)
        if fetch.done:
            self._unsubscribe_all()
            self._fetch = None
            return True
        if now - fetch.last_progress_s > self._config.stall_s and self._subscribed:
            self._counters["fetch_stalled"] += 1
            self._unsubscribe_all()
            fetch.last_progress_s = now
        new = sorted(set(fetch.wanted()) - self._subscribed)
        if new and self._link.connected:
            self._link.subscribe(new)
            self._subscribed |= set(new)
        return False

    def _begin(self, digest: str, now: float) -> Fetch:
        try:
            self._fetch = Fetch(
                self._root,
                digest,
                window=self._config.window,
                reserve_bytes=self._config.reserve_bytes,
                clock=self._clock,
            )
        except CapacityError:
            self._retry_s = now + _FULL_PAUSE_S
            raise
        return self._fetch

    def _unsubscribe_all(self) -> None:
        self._link.unsubscribe(sorted(self._subscribed))
        self._subscribed.clear()
