"""Topics of the wire contract: how they are built and taken apart, without their payloads."""

import hashlib
import re
from enum import StrEnum
from typing import Final

from models.errors import InputError, MessageError

ROOT: Final = "sortline/v1"
SENTINEL_TOPIC: Final = f"{ROOT}/sentinel"
TRUST_TOPIC: Final = f"{ROOT}/tuf"
ALARMS_TOPIC: Final = f"{ROOT}/alarms"
BIN_BITS: Final = 6
"""Assignments are spread over 2^6 signed documents. Fixed, so that an agent can compute its own."""
BIN_PREFIX: Final = "assign-bin"
BLOBS: Final = f"{ROOT}/blobs/"
"""Prefix of the topics of blobs."""
MAX_BLOB_BYTES: Final = 120 * 1024
"""Most bytes of a manifest or chunk: fits the payload limit of every known broker (the smallest is 128 KiB)."""
AGENT_ID = re.compile(r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_AGENT_TOPIC = re.compile(rf"^{ROOT}/agents/([a-z0-9-]{{1,63}})/([a-z]+)\Z")


class Channel(StrEnum):
    """Last level of an agent's topics."""

    DESIRED = "desired"
    ACK = "ack"
    COMMAND = "command"
    RESPONSE = "response"
    PRESENCE = "presence"
    REPORTED = "reported"
    BATCH = "batch"
    LIVE = "live"
    REQUEST = "request"
    BLOB = "blob"


def check_agent_id(agent_id: str) -> str:
    """Returns the id itself.

    Raises:
        InputError: `agent.bad_id`.
    """
    if not AGENT_ID.match(agent_id):
        raise InputError(
            "agent.bad_id",
            "This is no agent id.",
            expected="1-63 lower-case letters, digits and inner dashes",
            got=agent_id[:80],
        )
    return agent_id


def agent_topic(agent_id: str, channel: Channel) -> str:
    """`sortline/v1/agents/{id}/{channel}`."""
    return f"{ROOT}/agents/{agent_id}/{channel}"


def assignment_path(agent_id: str) -> str:
    """Returns the name under which an agent's desired state is signed."""
    return f"assign/{agent_id}.json"


def bin_of(agent_id: str) -> str:
    """Returns the signed document that lists an agent, `assign-bin-00` to `assign-bin-3f`.

    The leading bits of the sha256 of the path, as TUF's TAP 15 has it.
    """
    leading = hashlib.sha256(assignment_path(agent_id).encode()).digest()[0]
    return f"{BIN_PREFIX}-{leading >> (8 - BIN_BITS):02x}"


def bin_topic(name: str) -> str:
    """`sortline/v1/tuf/{bin}`."""
    return f"{TRUST_TOPIC}/{name}"


def blob_topic(digest: str) -> str:
    """`sortline/v1/blobs/{sha256}`: the manifest or chunk with this digest."""
    return f"{BLOBS}{digest}"


def parse_agent_topic(topic: str) -> tuple[str, Channel]:
    """Returns the agent and channel of a topic.

    Raises:
        MessageError: `topic.unknown`.
    """
    match = _AGENT_TOPIC.match(topic)
    if not match or not AGENT_ID.match(match[1]) or match[2] not in set(Channel):
        raise MessageError(
            "topic.unknown",
            "This topic is not one of ours.",
            expected=f"{ROOT}/agents/<id>/<channel>",
            got=topic[:120],
        )
    return match[1], Channel(match[2])
