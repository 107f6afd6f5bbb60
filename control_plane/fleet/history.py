"""Keeps what an agent reported about its set-up, from when to when: bundle, lot, terms, camera, versions, labels.

A report replaces the one before it; this history answers what held at any moment since. A row is written when the
set-up changes, not when a report arrives; counters, ages and progress are no part of it. The digest of the newest row
stands in the agent's row, so that comparing costs no query and all replicas compare with the same one.
"""

import hashlib
from datetime import datetime
from typing import Any

import msgspec
from sqlmodel import Session, col, desc, select

from control_plane.database.tables.windows import AgentHistory
from models.messages import Digest, Phase, Reported, RunningLot, SafeState


class SetUp(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a report that says how an agent is set up; fields as in `models.messages.Reported`."""

    boot_id: str = ""
    generation: int = 0
    phase: Phase = Phase.IDLE
    active: str = ""
    previous: str = ""
    safe_state: SafeState = SafeState.NONE
    shadow: str = ""
    line_running: bool = False
    camera: str = ""
    camera_fault: str = ""
    lot: RunningLot = RunningLot()
    lanes: int = 0
    blocked: tuple[Digest, ...] = ()
    versions: dict[str, str] = {}
    hardware: dict[str, str] = {}
    labels: dict[str, str] = {}


def set_up_of(reported: Reported) -> SetUp:
    """Returns the set-up that a report states."""
    return SetUp(**{name: getattr(reported, name) for name in SetUp.__struct_fields__})


def digest_of(set_up: SetUp) -> str:
    """Returns the digest that two equal set-ups share."""
    return hashlib.sha256(msgspec.json.encode(set_up, order="sorted")).hexdigest()


def set_up_at(session: Session, agent_id: str, at: datetime) -> tuple[SetUp, AgentHistory] | None:
    """Returns the set-up that held then, with its row; None when nothing had been reported by then."""
    query = select(AgentHistory).where(AgentHistory.agent_id == agent_id, col(AgentHistory.at) <= at)
    row = session.exec(query.order_by(desc(AgentHistory.at), desc(AgentHistory.id)).limit(1)).first()
    return None if row is None else (parse_set_up(row.facts), row)


def next_change(session: Session, agent_id: str, after: datetime) -> datetime | None:
    """Returns when the set-up changed next; None when it still holds."""
    query = select(AgentHistory.at).where(AgentHistory.agent_id == agent_id, col(AgentHistory.at) > after)
    return session.exec(query.order_by(col(AgentHistory.at)).limit(1)).first()


def parse_set_up(facts: dict[str, Any]) -> SetUp:
    """Returns a stored set-up; what another version of the program wrote and this one cannot read is left out."""
    try:
        return msgspec.convert(facts, SetUp)
    except msgspec.ValidationError:
        known = {name: value for name, value in facts.items() if name in {"active", "previous", "camera", "boot_id"}}
        return msgspec.convert({name: str(value) for name, value in known.items()}, SetUp)
