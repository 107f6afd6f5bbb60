"""Topic names and filters: their syntax [4.7], and the subscribers of a message."""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

MAX_TOPIC_BYTES = 512
MAX_LEVELS = 16

S = TypeVar("S", bound=Hashable)


def valid_topic(topic: str) -> bool:
    """Returns whether a message may be published under this name."""
    return (
        0 < len(topic.encode()) <= MAX_TOPIC_BYTES
        and topic.count("/") < MAX_LEVELS
        and "+" not in topic
        and "#" not in topic
    )


def valid_filter(topic_filter: str) -> bool:
    """Returns whether this is a filter: `+` fills a level, `#` only the last one."""
    if not 0 < len(topic_filter.encode()) <= MAX_TOPIC_BYTES or topic_filter.count("/") >= MAX_LEVELS:
        return False
    levels = topic_filter.split("/")
    return all(
        ("+" not in level or level == "+") and ("#" not in level or (level == "#" and at == len(levels) - 1))
        for at, level in enumerate(levels)
    )


def has_wildcard(topic_filter: str) -> bool:
    """Returns whether the filter can match more than one topic."""
    return "+" in topic_filter or "#" in topic_filter


def matches(topic_filter: str, topic: str) -> bool:
    """Returns whether a filter covers a topic; `$...` topics are not covered by a leading wildcard [4.7.2]."""
    if topic.startswith("$") and topic_filter[:1] in {"+", "#"}:
        return False
    wanted, given = topic_filter.split("/"), topic.split("/")
    for at, level in enumerate(wanted):
        if level == "#":
            return True
        if at >= len(given) or level not in {"+", given[at]}:
            return False
    return len(wanted) == len(given)


class SubscriptionIndex(Generic[S]):
    """Filters of all sessions: exact ones in a dictionary, the few with wildcards in a list of their own."""

    def __init__(self) -> None:
        self._exact: dict[str, dict[S, int]] = {}
        self._wild: dict[str, dict[S, int]] = {}

    def add(self, topic_filter: str, subscriber: S, qos: int) -> None:
        """Adds a subscription, or changes its QoS."""
        table = self._wild if has_wildcard(topic_filter) else self._exact
        table.setdefault(topic_filter, {})[subscriber] = qos

    def remove(self, topic_filter: str, subscriber: S) -> None:
        """Removes a subscription; unknown pairs are ignored."""
        table = self._wild if has_wildcard(topic_filter) else self._exact
        subscribers = table.get(topic_filter)
        if subscribers is not None:
            subscribers.pop(subscriber, None)
            if not subscribers:
                del table[topic_filter]

    def match(self, topic: str) -> Iterator[tuple[S, int]]:
        """Returns the subscribers of a topic, each once, with the highest QoS of its matching filters."""
        exact = self._exact.get(topic)
        overlapping = [table for wanted, table in self._wild.items() if matches(wanted, topic)]
        if not overlapping:
            yield from tuple(exact.items()) if exact else ()
            return
        merged: dict[S, int] = dict(exact) if exact else {}
        for table in overlapping:
            for subscriber, qos in table.items():
                merged[subscriber] = max(qos, merged.get(subscriber, 0))
        yield from merged.items()
