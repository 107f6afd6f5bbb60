"""Requests that may be repeated: one key is carried out once, however often its request comes.

A client whose answer was lost cannot know whether its request was carried out. It sends the same key again and gets
the answer of the first time. A key is remembered for a week, in the transaction of the change itself.
"""

import hashlib
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlmodel import Session, col, delete

from control_plane.database.tables.requests import AnsweredRequest
from models.errors import ConflictError

MAX_KEY: Final = 128
_KEPT: Final = timedelta(days=7)


def carry_out_once(
    session: Session, key: str, asked: Any, now: datetime, change: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Carries out a change, or returns what it answered the first time under this key.

    Args:
        session: Writing; the caller commits. A change that raises leaves no trace of its key.
        key: The client's; empty = the request is not to be recognised.
        asked: What the request asks for, as JSON takes it.
        now: Aware time.
        change: Makes the change and returns its answer, a small JSON document.

    Raises:
        ConflictError: `api.key_reused`: the key was used for another request.
    """
    if not key:
        return change()
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    insert: Any = postgresql_insert if session.get_bind().dialect.name == "postgresql" else sqlite_insert
    values = {"key": key, "digest": digest, "answer": {}, "answered_at": now}
    # The row comes first: of two equal requests at once the second waits here for the first to commit.
    statement = insert(AnsweredRequest.__table__).values(values).on_conflict_do_nothing()  # type: ignore[attr-defined]
    if session.connection().execute(statement.execution_options(preserve_rowcount=True)).rowcount == 1:
        session.exec(delete(AnsweredRequest).where(col(AnsweredRequest.answered_at) < now - _KEPT))
        answer = change()
        row = session.get_one(AnsweredRequest, key)
        row.answer = answer
        session.add(row)
        return answer
    known = session.get_one(AnsweredRequest, key)
    if known.digest != digest:
        raise ConflictError(
            "api.key_reused",
            "This idempotency key was used for another request.",
            expected="a new key for a new request",
            got=key[:40],
        )
    return known.answer
