"""The audit trail: each entry carries the hash of the one before it."""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import text
from sqlmodel import Session, col, desc, select

from control_plane.database.tables.audit import Audit
from models.errors import InputError

MAX_ACTOR: Final = 64
"""Longest name of an actor, in characters."""


def actor_name(text: str) -> str:
    """Returns a name as the audit trail keeps it: Unicode NFC, no invisible characters, blanks only single and inside.

    Raises:
        InputError: `api.bad_actor` for control characters or more than 64 characters.
    """
    visible = "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) != "Cf")
    name = " ".join(visible.split())
    if len(name) > MAX_ACTOR or any(unicodedata.category(character) in {"Cc", "Cs"} for character in name):
        raise InputError(
            "api.bad_actor",
            "The name of the actor is not usable.",
            expected=f"at most {MAX_ACTOR} printable characters",
            got=ascii(name)[:80],
        )
    return name


def same_actor(one: str, other: str) -> bool:
    """Returns whether two names mean one person; blanks around them and upper or lower case make no difference."""
    return actor_name(one).casefold() == actor_name(other).casefold()


GENESIS: Final = "0" * 64
"""Stands for the hash before the first entry."""


def audit(session: Session, actor: str, action: str, thing: str, details: dict[str, Any], now: datetime) -> None:
    """Appends to the audit trail, in the caller's transaction; each entry carries the hash of the one before."""
    if session.get_bind().dialect.name == "postgresql":
        # Two replicas must not follow the same entry; SQLite has one writer anyway.
        session.execute(text("SELECT pg_advisory_xact_lock(7305)"))
    last = session.exec(select(Audit.hash).order_by(desc(Audit.id)).limit(1)).first()
    entry = Audit(at=now, actor=actor, action=action, object=thing, details=details, previous=last or GENESIS, hash="")
    entry.hash = hash_of(entry)
    session.add(entry)


def newest_entries(session: Session, limit: int, before: int | None = None) -> Sequence[Audit]:
    """Returns entries of the trail, newest first; only those older than the id `before` where one is given."""
    query = select(Audit).order_by(desc(Audit.id)).limit(limit)
    return session.exec(query if before is None else query.where(col(Audit.id) < before)).all()


def hash_of(entry: Audit) -> str:
    """Returns the hash of an entry's content and of the hash of the entry before it."""
    body = [entry.at.isoformat(), entry.actor, entry.action, entry.object, entry.details, entry.previous]
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()


def broken_audit_entry(session: Session) -> int | None:
    """Checks the whole trail; returns the id of the first entry that does not follow from the one before, or None.

    Takes a minute for a million entries; `audit_check.AuditCheck` does it step by step.
    """
    previous = GENESIS
    for entry in session.exec(select(Audit).order_by(col(Audit.id))):
        if entry.previous != previous or entry.hash != hash_of(entry):
            return entry.id
        previous = entry.hash
    return None
