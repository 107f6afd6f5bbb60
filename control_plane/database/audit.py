"""The audit trail: each entry carries the hash of the one before it."""

import hashlib
import json
import unicodedata
from datetime import datetime
from typing import Any, Final

from sqlalchemy import text
from sqlmodel import Session, desc, select

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


def audit(session: Session, actor: str, action: str, thing: str, details: dict[str, Any], now: datetime) -> None:
    """Appends to the audit trail, in the caller's transaction; each entry seals the one before."""
    if session.get_bind().dialect.name == "postgresql":
        # Two replicas must not seal the same entry; SQLite has one writer anyway.
        session.execute(text("SELECT pg_advisory_xact_lock(7305)"))
    last = session.exec(select(Audit).order_by(desc(Audit.id)).limit(1)).first()
    previous = last.hash if last else "0" * 64
    body = [now.isoformat(), actor, action, thing, details, previous]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()
    session.add(
        Audit(at=now, actor=actor, action=action, object=thing, details=details, previous=previous, hash=digest)
    )


def broken_audit_entry(session: Session) -> int | None:
    """Id of the first entry that does not follow from the one before; None when the trail is whole."""
    previous = "0" * 64
    for entry in session.exec(select(Audit).order_by(Audit.id)):  # type: ignore[arg-type]
        body = [entry.at.isoformat(), entry.actor, entry.action, entry.object, entry.details, previous]
        digest = hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()
        if entry.previous != previous or entry.hash != digest:
            return entry.id
        previous = entry.hash
    return None
