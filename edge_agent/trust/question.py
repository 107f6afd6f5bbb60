"""Question and answer between the supervisor and the verifying process. Needs the libraries of neither side."""

from typing import Annotated

import msgspec

from models.messages import MAX_CONTROL_BYTES, Desired, Fault
from models.signed_set import MAX_SET_BYTES


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Unverified documents from the network or a stick; MessagePack on standard input."""

    offered: Annotated[bytes, msgspec.Meta(max_length=2 * MAX_SET_BYTES)]
    bin: Annotated[bytes, msgspec.Meta(max_length=2 * MAX_SET_BYTES)] = b""
    document: Annotated[bytes, msgspec.Meta(max_length=2 * MAX_CONTROL_BYTES)] | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The verified result; JSON on standard output."""

    desired: Desired | None = None
    fault: Fault | None = None
    facts: dict[str, str] = {}
    quarantined: str = ""
    """Path to which broken trusted metadata was set aside."""
