"""Reads and writes many agents at once, with statements that are built once: to build one costs more than to run it."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from sqlalchemy import bindparam, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlmodel import Session, SQLModel, col, select

from control_plane.database.tables.agents import Agent
from control_plane.database.tables.identities import Identity, IdentityState

_AGENTS: Final[Any] = SQLModel.metadata.tables["agent"]
_IDS_AT_ONCE: Final = 500
"""Parameters of one statement: SQLite takes no more than some thousand."""


@dataclass(slots=True)
class KnownAgent:
    """What must be known of an agent to store its messages."""

    boot_id: str
    online: bool
    generation: int
    assigned: dict[str, Any]
    setup_digest: str


def known_agents(session: Session, ids: list[str]) -> dict[str, KnownAgent]:
    """Returns the agents of these names; a new one is made, a revoked one is left out."""
    found: dict[str, KnownAgent] = {}
    for start in range(0, len(ids), _IDS_AT_ONCE):
        part = ids[start : start + _IDS_AT_ONCE]
        revoked = set(session.connection().execute(_revoked_query(), {"agents": part}).scalars())
        admitted = [agent_id for agent_id in part if agent_id not in revoked]
        here = _select_agents(session, admitted)
        missing = [agent_id for agent_id in admitted if agent_id not in here]
        if missing:
            # Two replicas receive the first message at once.
            insert: Any = postgresql_insert if session.get_bind().dialect.name == "postgresql" else sqlite_insert
            new = [Agent(id=agent_id).model_dump() for agent_id in missing]
            session.connection().execute(insert(_AGENTS).on_conflict_do_nothing(), new)
            here |= _select_agents(session, missing)
        found |= here
    return found


def _select_agents(session: Session, ids: list[str]) -> dict[str, KnownAgent]:
    if not ids:
        return {}
    rows = session.connection().execute(_agents_query(), {"agents": ids})
    return {agent_id: KnownAgent(*values) for agent_id, *values in rows}


@cache
def _revoked_query() -> Any:
    chosen = col(Identity.agent_id).in_(bindparam("agents", expanding=True))
    return select(Identity.agent_id).where(chosen, Identity.state == IdentityState.REVOKED)


@cache
def _agents_query() -> Any:
    columns = (Agent.id, Agent.boot_id, Agent.online, Agent.generation, Agent.labels_assigned, Agent.setup_digest)
    return select(*columns).where(col(Agent.id).in_(bindparam("agents", expanding=True)))  # type: ignore[call-overload]


@cache
def _update_statement(names: tuple[str, ...]) -> Any:
    statement = update(_AGENTS).where(_AGENTS.c.id == bindparam("of_agent"))
    return statement.values({name: bindparam(name) for name in names})


@cache
def insert_new(dialect: str, table: Any) -> Any:
    """Returns the statement that inserts records which are not there yet and gives the keys of those."""
    insert: Any = postgresql_insert if dialect == "postgresql" else sqlite_insert
    statement = insert(table).on_conflict_do_nothing()
    return statement.returning(table.c.agent_id, table.c.boot_id, table.c.seq)


def update_agents(session: Session, changes: dict[str, dict[str, Any]]) -> None:
    """Writes the changed columns, one statement for all agents with the same columns.

    Agents are written in the order of their names: replicas that write the same agents rarely wait in a circle, and
    where they do, the database ends one transaction, which is tried again.
    """
    shapes: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for agent_id in sorted(changes):
        values = changes[agent_id]
        if values:
            shapes[tuple(sorted(values))].append({"of_agent": agent_id, **values})
    for names, rows in shapes.items():
        session.connection().execute(_update_statement(names), rows)
