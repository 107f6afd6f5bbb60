"""What the supervisor asks the verifying process, and what that answers. Light: neither side's libraries are needed."""

from typing import Annotated

import msgspec

from models.messages import MAX_CONTROL_BYTES, Desired, Fault
from models.signed_set import MAX_SET_BYTES


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What came over the network or from a stick; MessagePack on standard input."""

    offered: Annotated[bytes, msgspec.Meta(max_length=2 * MAX_SET_BYTES)]
    bin: Annotated[bytes, msgspec.Meta(max_length=2 * MAX_SET_BYTES)] = b""
    document: Annotated[bytes, msgspec.Meta(max_length=2 * MAX_CONTROL_BYTES)] | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What may be done about it; JSON on standard output."""

    desired: Desired | None = None
    fault: Fault | None = None
    facts: dict[str, str] = {}
    quarantined: str = ""
    """Where a broken memory of trust was set aside."""
