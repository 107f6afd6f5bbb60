"""The tables. Enums are strings, times are aware UTC, what travels as a message is kept as it came."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, Column, DateTime, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator


class Utc(TypeDecorator[datetime]):
    """Aware UTC in, aware UTC out, also where the database forgets the zone (SQLite)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuses naive times: they mean nothing."""
        del dialect
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Puts the zone back."""
        del dialect
        return value if value is None or value.tzinfo is not None else value.replace(tzinfo=UTC)


class EnumText(TypeDecorator[StrEnum]):
    """A string enum as text: readable in the database, an enum in the program.

    Args:
        kind: The enum.
    """

    impl = Text
    cache_ok = True

    def __init__(self, kind: type[StrEnum]) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: StrEnum | str | None, dialect: Dialect) -> str | None:
        """Refuses what the enum does not know."""
        del dialect
        return None if value is None else str(self.kind(value))

    def process_result_value(self, value: str | None, dialect: Dialect) -> StrEnum | None:
        """The enum again."""
        del dialect
        return None if value is None else self.kind(value)


def utc_now() -> datetime:
    """Now, aware."""
    return datetime.now(UTC)


def time_column(*, nullable: bool = False, index: bool = False) -> Any:
    """Returns a column of aware UTC times."""
    return Column(Utc(), nullable=nullable, index=index)


def json_column() -> Any:
    """Returns a column that holds one JSON document."""
    return Column(JSON, nullable=False)
