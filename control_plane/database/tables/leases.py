"""Table of leases."""

from datetime import datetime

from sqlmodel import Field, SQLModel

from control_plane.database.tables.columns import time_column


class Lease(SQLModel, table=True):
    """The process that may act as the one leader for a duty, until when, with a fencing number."""

    name: str = Field(primary_key=True)
    holder: str
    fence: int = 0
    until: datetime = Field(sa_column=time_column())
